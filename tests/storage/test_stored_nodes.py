"""Nodes gathered from many segments and the journal at once are those that were written, and checked as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import CorruptTreeError, NodeMissingError
from storage.schema import Encoding
from storage.tree.reader import ContextReader
from storage.tree.sealing import SEGMENT_FOLDER
from storage.tree.segment import SegmentArray
from tests.storage.support import CONTEXT, Text, encoding_of, new_store, open_context

NUM_BLOCKS = 170
NUM_SEALED = 128
TEXT = Text("doc", NUM_BLOCKS * K - 5)


def fill(root: Path, encoding: Encoding) -> None:
    """Segments of 32, 32 and 64 blocks; the rest stays in the journal."""
    new_store(root, encoding)
    for size, stop in ((1, 32), (2, NUM_BLOCKS)):
        with open_context(root, segment_super_blocks=size) as writer:
            writer.append([TEXT.span(encoding, writer.version().num_blocks, stop)])
            writer.flush()
    assert len(list((root / CONTEXT / SEGMENT_FOLDER).iterdir())) == 3


def open_reader(root: Path) -> ContextReader:
    return ContextReader(root / CONTEXT, CONTEXT)


def wanted(encoding: Encoding, nodes: list[int]) -> torch.Tensor:
    spec = encoding.arrays[0]
    return TEXT.gists(0, NUM_BLOCKS, spec).reshape(NUM_BLOCKS, spec.rows_per_node, spec.width)[nodes]


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32", "int8"])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Encoding]:
    root = tmp_path_factory.mktemp("nodes")
    encoding = encoding_of(request.param, width=70, rows=2)
    fill(root, encoding)
    return root, encoding


@given(
    st.lists(
        st.one_of(
            st.lists(st.integers(0, NUM_BLOCKS - 1), max_size=40),
            st.integers(0, NUM_BLOCKS - 1).map(lambda node: list(range(node, NUM_BLOCKS))),
            st.integers(0, NUM_BLOCKS - 1),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None)
def test_any_order_of_reads(filled: tuple[Path, Encoding], reads: list[list[int] | int]) -> None:
    # Slices map segments that a gather has not seen, and the other way round.
    root, encoding = filled
    spec = encoding.arrays[0]
    with open_reader(root) as reader:
        for asked in reads:
            nodes = [asked] if isinstance(asked, int) else asked
            found = (
                reader.read_node(spec.name, 1, asked)[None]
                if isinstance(asked, int)
                else reader.read(spec.name, 1, nodes)
            )
            assert found.shape == (len(nodes), spec.rows_per_node, spec.width)
            atol = 0.01 if spec.dtype == "int8" else 0
            torch.testing.assert_close(found.float(), wanted(encoding, nodes), atol=atol, rtol=0)
            before = np.minimum(np.array(nodes, np.int64) * K, TEXT.num_tokens)
            np.testing.assert_array_equal(reader.tokens_before(np.array(nodes, np.int64)), before)


def test_what_is_gathered_is_a_copy(tmp_path: Path) -> None:
    encoding = encoding_of()
    fill(tmp_path, encoding)
    nodes = list(range(NUM_BLOCKS))
    with open_reader(tmp_path) as reader:
        found = reader.read("gists", 1, nodes)
        reader.read("gists", 1, nodes).zero_()
        assert torch.equal(reader.read("gists", 1, nodes), found)
    # It outlives the maps.
    assert torch.equal(found, wanted(encoding, nodes))


def test_nodes_outside_the_version_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, encoding_of())
    with open_reader(tmp_path) as reader:
        for nodes in ([-1, 3], [3, NUM_BLOCKS]):
            with pytest.raises(NodeMissingError, match=f"has {NUM_BLOCKS}"):
                reader.read("gists", 1, nodes)


def test_a_group_is_checked_when_first_touched_and_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, encoding_of())
    checked: list[int] = []
    verify = SegmentArray.verify_chunk

    def counting(array: SegmentArray, chunk: int) -> None:
        checked.append(chunk)
        verify(array, chunk)

    monkeypatch.setattr(SegmentArray, "verify_chunk", counting)
    with open_reader(tmp_path) as reader:
        reader.read("gists", 1, [NUM_SEALED - 1, 5, 6])
        assert checked == [0, 1]
        reader.read("gists", 1, [NUM_SEALED - K, 0])
        reader.read_node("gists", 1, 31)
        assert len(checked) == 2
        reader.read_node("gists", 1, 40)
        reader.read("gists", 1, [63, 32])
        assert len(checked) == 3


def test_a_damaged_group_is_refused_every_time_and_no_other(tmp_path: Path) -> None:
    encoding = encoding_of()
    fill(tmp_path, encoding)
    folder = next((tmp_path / CONTEXT / SEGMENT_FOLDER).glob("*_0000000032_32_*"))
    path = folder / "lod1/gists/c.0.0"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with open_reader(tmp_path) as reader:
        for nodes in ([0, 40, 100], [40], [0, 40, 100]):
            with pytest.raises(CorruptTreeError, match=rf"{folder.name}/lod1/gists/c.0.0: checksum of rows 0-31"):
                reader.read("gists", 1, nodes)
        fine = [169, 0, 64, 95, 100, 31]
        assert torch.equal(reader.read("gists", 1, fine), wanted(encoding, fine))
