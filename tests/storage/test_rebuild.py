"""Another GistNet's gists for the same tokens: built beside the old ones, then switched to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import IncompatibleTreeError, InvalidWriteError, OutOfOrderError
from storage.geometry import complete_nodes, deepest_lod
from storage.schema import Encoding
from storage.store import Store
from storage.tree.rebuild import EncodingBuilder
from storage.tree.verify import verify_context
from tests.storage.support import (
    CONTEXT,
    IDENTITY,
    Text,
    assert_holds,
    encoding_of,
    follow,
    mean_cosine_loss,
    new_store,
    nodes_of,
    open_context,
    rows,
    vectors,
)

OLD = encoding_of("float32", width=4, key_width=3)
NUM_BLOCKS = 1100
TEXTS = [Text("one", 700 * K - 9), Text("two", 400 * K)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    new_store(tmp_path, OLD)
    with open_context(tmp_path) as writer:
        writer.append([text.span(OLD) for text in TEXTS])
        follow(writer, OLD)
        writer.flush()
    return tmp_path


def build(builder: EncodingBuilder, num_blocks: int, *, stop_at: int | None = None) -> None:
    """Derive what is missing, in pieces of 200 nodes; LOD1 only up to node `stop_at`."""
    for lod in range(1, deepest_lod(num_blocks) + 1):
        counts = builder.level_counts()
        have = counts[lod - 1] if lod <= len(counts) else 0
        whole = complete_nodes(lod, num_blocks)
        for first in range(have, stop_at or whole, 200):
            stop = min(first + 200, stop_at or whole)
            builder.put_nodes(lod, first, nodes_of(builder.encoding, lod, first, stop))
        if stop_at is not None:
            return


def assert_new_gists(reader, encoding: Encoding) -> None:
    assert reader.version.encoding == encoding
    for lod in range(1, reader.version.max_lod + 1):
        nodes = np.arange(reader.version.num_nodes(lod))
        for spec in encoding.arrays:
            wanted = vectors(0, lod, nodes, spec).reshape(len(nodes), spec.rows_per_node, spec.width)
            read = reader.read(spec.name, lod, nodes)
            if spec.dtype == "int8":
                assert float(mean_cosine_loss(read, wanted)) < 1e-3
            else:
                assert torch.equal(read.float(), wanted)


@pytest.mark.parametrize(
    "new",
    [
        encoding_of("float16", width=7),
        encoding_of("bfloat16", width=4, rows=4, key_width=2),
        encoding_of("int8", width=70, rows=2),
    ],
    ids=["float16", "bfloat16 m=4", "int8 m=2"],
)
def test_a_rebuilt_tree_reads_the_new_gists_and_old_readers_the_old(root: Path, new: Encoding) -> None:
    with open_context(root) as writer:
        before, untouched = writer.reader(), writer.reader()
        assert_holds(before, TEXTS, OLD)
        builder = EncodingBuilder(writer, new)
        assert not builder.active
        build(builder, NUM_BLOCKS)
        # Until it is activated nobody sees it.
        with writer.reader() as reader:
            assert reader.version == before.version
        ack = builder.activate()
        assert ack.version.seq > before.version.seq
        assert ack.version.encoding == new
        assert ack.version.level_counts == (1100, 34, 1)
        assert builder.active
        assert builder.activate().version == ack.version
        with writer.reader() as reader:
            assert reader.version == ack.version
            assert_new_gists(reader, new)
            tokens, _ = reader.tokens(0, 700)
            np.testing.assert_array_equal(tokens, TEXTS[0].packed(0, 700)[0])
        for old in (before, untouched):
            assert_holds(old, TEXTS, OLD)
            assert torch.equal(old.read("keys", 3, [0])[0], vectors(0, 3, np.array([0]), OLD.arrays[1]))
            old.close()
        writer.flush()
    assert verify_context(root / CONTEXT, CONTEXT).ok
    assert Store(root).identity(CONTEXT) == (IDENTITY, new)
    with pytest.raises(IncompatibleTreeError, match="gistnet_digest"):
        Store(root).open_writer(CONTEXT, IDENTITY, OLD)


def test_an_interrupted_rebuild_goes_on_where_it_stopped(root: Path) -> None:
    new = encoding_of("float16", width=6)
    with open_context(root) as writer:
        builder = EncodingBuilder(writer, new)
        build(builder, NUM_BLOCKS, stop_at=330)
        first_id = builder.encoding_id
    with open_context(root) as writer:
        builder = EncodingBuilder(writer, new)
        assert builder.encoding_id == first_id
        assert builder.level_counts() == (330,)
        with pytest.raises(OutOfOrderError, match="has 330 of 1100 LOD1 nodes; run the same rebuild again"):
            builder.activate()
        with writer.reader() as reader:
            assert_holds(reader, TEXTS, OLD)
        # Work that is done is not done again, also when it is sent again.
        assert builder.put_nodes(1, 200, nodes_of(new, 1, 200, 330)).new_nodes == 0
        assert builder.put_nodes(1, 300, nodes_of(new, 1, 300, 340)).new_nodes == 10
        build(builder, NUM_BLOCKS)
        builder.activate()
        with writer.reader() as reader:
            assert_new_gists(reader, new)


def test_an_incomplete_encoding_is_not_activated(root: Path) -> None:
    new = encoding_of("float16", width=6)
    with open_context(root) as writer:
        builder = EncodingBuilder(writer, new)
        with pytest.raises(OutOfOrderError, match="0 of 1100 LOD1"):
            builder.activate()
        for lod, count in ((1, 1100), (2, 34)):
            builder.put_nodes(lod, 0, nodes_of(new, lod, 0, count))
            with pytest.raises(OutOfOrderError, match=rf"0 of \d+ LOD{lod + 1} nodes"):
                builder.activate()
        builder.put_nodes(3, 0, nodes_of(new, 3, 0, 1))
        writer.append([Text("late", 40).span(OLD)])
        with pytest.raises(OutOfOrderError, match="1100 of 1102 LOD1"):
            builder.activate()
        builder.put_nodes(1, 1100, nodes_of(new, 1, 1100, 1102))
        builder.activate()
        with writer.reader() as reader:
            assert_new_gists(reader, new)


def test_gaps_missing_children_and_wrong_arrays_are_refused(root: Path) -> None:
    new = encoding_of("float16", width=6)
    with open_context(root) as writer:
        builder = EncodingBuilder(writer, new)
        with pytest.raises(OutOfOrderError, match="LOD1 has 0 nodes; the write starts at 1"):
            builder.put_nodes(1, 1, nodes_of(new, 1, 1, 2))
        with pytest.raises(OutOfOrderError, match="LOD2 node 0 needs 32 nodes of LOD1; there are 0"):
            builder.put_nodes(2, 0, nodes_of(new, 2, 0, 1))
        with pytest.raises(OutOfOrderError, match="LOD1 node 1100 needs"):
            builder.put_nodes(1, 0, nodes_of(new, 1, 0, 1101))
        with pytest.raises(InvalidWriteError, match="'keys'"):
            builder.put_nodes(1, 0, nodes_of(OLD, 1, 0, 1))
        assert builder.level_counts() == ()


def test_appending_and_sealing_go_on_after_the_switch(root: Path) -> None:
    new = encoding_of("float16", width=6)
    with open_context(root) as writer:
        builder = EncodingBuilder(writer, new)
        build(builder, NUM_BLOCKS)
        builder.activate()
        more = Text("more", 150 * K)
        with pytest.raises(InvalidWriteError):
            writer.append([more.span(OLD)])
        writer.append([more.span(new, 0, 70)])
        # Tokens and new gists are sealed to the same point again.
        writer.flush()
        extents = "SELECT max(first + count) FROM extents WHERE lod = ? AND encoding_id = ?"
        for lod, encoding_id in ((0, 0), (1, builder.encoding_id)):
            assert rows(writer, extents, lod, encoding_id) == [(1170 // 32 * 32,)]
    with open_context(root) as writer:
        assert writer.encoding == new
        writer.append([more.span(new, 70)])
        have = writer.version().num_nodes(2)
        writer.put_nodes(2, have, nodes_of(new, 2, have, 1250 // 32))
        writer.flush()
        with writer.reader() as reader:
            assert reader.version.level_counts == (1250, 39, 1)
            gists = reader.read("gists", 1, np.arange(1100, 1250)).reshape(150, 6).float()
            assert torch.equal(gists, more.gists(0, 150, new.arrays[0]))
            assert torch.equal(
                reader.read("gists", 1, [0, 1099]).reshape(2, 6).float(),
                vectors(0, 1, np.array([0, 1099]), new.arrays[0]),
            )
            assert torch.equal(reader.read_node("gists", 2, 38).float(), vectors(0, 2, np.array([38]), new.arrays[0]))
            assert [document.num_blocks for document in reader.documents()] == [700, 400, 150]
    assert verify_context(root / CONTEXT, CONTEXT).ok


def test_the_old_encoding_can_be_taken_up_again(root: Path) -> None:
    new = encoding_of("float16", width=6)
    with open_context(root) as writer:
        builder = EncodingBuilder(writer, new)
        build(builder, NUM_BLOCKS)
        builder.activate()
        back = EncodingBuilder(writer, OLD)
        assert back.level_counts() == (1100, 34, 1)
        back.activate()
        with writer.reader() as reader:
            assert_holds(reader, TEXTS, OLD)
