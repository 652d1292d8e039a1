"""The stages together, without a cluster: every way of ingest gives the same tree, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors.packing import document_meta
from actors.streaming import DocumentStream
from cluster.config import BaseLMConfig
from storage.memory_tree import MemoryTree
from storage.tree.bulk_writer import BulkWriter
from storage.tree.verify import verify_context
from tests.actors.helpers import (
    assert_same_tree,
    follow,
    ingest,
    make_compactor,
    make_documents,
    open_context,
    tiny_plan,
)

LENGTHS = [900, 3, 77, 1500, 240]


@pytest.mark.parametrize("kind", ["windowed", "block", "last_token"])
@pytest.mark.parametrize("num_vectors", [1, 4])
def test_bulk_streaming_and_batches_agree(
    tmp_path: Path, tiny_lm_config: BaseLMConfig, kind: str, num_vectors: int
) -> None:
    plan = tiny_plan(tiny_lm_config, tmp_path, kind, num_vectors=num_vectors)
    compactor = make_compactor(plan)
    documents = make_documents(LENGTHS)
    rng = np.random.default_rng(0)

    batches = open_context(tmp_path / "batches", plan)
    ingest(batches, plan, compactor, documents, batch=1)

    bulk = open_context(tmp_path / "bulk", plan)
    ingest(BulkWriter(bulk), plan, compactor, documents, batch=7)

    streaming = open_context(tmp_path / "streaming", plan)
    for document in documents:
        stream = DocumentStream(streaming, compactor, document_meta(document))
        tokens = plan.tokenizer.encode(document.text)
        cuts = np.sort(rng.integers(0, len(tokens), size=4))
        for piece in np.split(tokens, cuts):
            stream.push(piece)
        stream.finish()

    memory = MemoryTree(plan.encoding)
    ingest(memory, plan, compactor, documents)

    for writer in (batches, bulk, streaming):
        follow(writer, plan)
    reader = batches.reader()
    assert reader.version.max_lod >= 2
    assert_same_tree(reader, bulk.reader())
    assert_same_tree(reader, streaming.reader())
    np.testing.assert_array_equal(reader.tokens(0, 30)[0], memory.reader().tokens(0, 30)[0])
    for writer in (batches, bulk, streaming):
        writer.close()
        assert verify_context(writer.folder, "c").problems == []


def test_blocks_may_wait_for_their_gists(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = tiny_plan(tiny_lm_config, tmp_path)
    compactor = make_compactor(plan)
    document = make_documents([1200])[0]
    tokens, meta = plan.tokenizer.encode(document.text), document_meta(document)

    writer = open_context(tmp_path / "waiting", plan)
    stream = DocumentStream(writer, compactor, meta, blocks_at_a_time=5)
    assert stream.last_token is None
    waited = 0
    for start in range(0, len(tokens), 20):
        stream.push(tokens[start : start + 20])
        if start == 3000:
            # What waits is durable, and is taken up again.
            stream = DocumentStream(writer, compactor, meta, blocks_at_a_time=5)
        assert stream.last_token == tokens[: start + 20][-1]
        with writer.reader() as reader:
            tail = reader.tail()
            waiting = 0 if tail is None else len(tail.tokens)
            assert reader.version.num_blocks * 32 + waiting == stream.num_tokens
        assert waiting < 6 * 32
        waited = max(waited, waiting)
    assert waited >= 4 * 32
    stream.finish()
    follow(writer, plan)

    bulk = open_context(tmp_path / "bulk", plan)
    ingest(bulk, plan, compactor, [document])
    follow(bulk, plan)
    assert_same_tree(writer.reader(), bulk.reader())
    for other in (writer, bulk):
        other.close()


def test_streams_that_take_turns_with_one_compactor_do_not_meet(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = tiny_plan(tiny_lm_config, tmp_path)
    compactor = make_compactor(plan)
    documents = make_documents([600, 700])
    texts = [plan.tokenizer.encode(document.text) for document in documents]
    writers = [open_context(tmp_path / f"live{i}", plan) for i in range(2)]
    streams = [
        DocumentStream(writer, compactor, document_meta(document), blocks_at_a_time=4)
        for writer, document in zip(writers, documents, strict=True)
    ]
    for start in range(0, max(map(len, texts)), 100):
        for stream, tokens in zip(streams, texts, strict=True):
            stream.push(tokens[start : start + 100])
            # Chunks of the encoder are not cut: what has gists ends with a multiple of blocks_at_a_time.
            assert stream._stored_blocks == stream.num_tokens // 128 * 4
    for stream, writer, document in zip(streams, writers, documents, strict=True):
        stream.finish()
        bulk = open_context(tmp_path / document.uri, plan)
        ingest(bulk, plan, compactor, [document])
        assert_same_tree(writer.reader(), bulk.reader())
        for other in (writer, bulk):
            other.close()


def test_a_stream_goes_on_after_a_restart(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = tiny_plan(tiny_lm_config, tmp_path)
    compactor = make_compactor(plan)
    document = make_documents([1200])[0]
    tokens = plan.tokenizer.encode(document.text)
    meta = document_meta(document)

    whole = open_context(tmp_path / "whole", plan)
    ingest(whole, plan, compactor, [document])

    position = 0
    for size in (10, 1000, 37, 1003, len(tokens)):
        writer = open_context(tmp_path / "pieces", plan)
        stream = DocumentStream(writer, compactor, meta)
        assert stream.num_tokens == position
        stream.push(tokens[position : position + size])
        position = min(position + size, len(tokens))
        if position == len(tokens):
            stream.finish()
        else:
            assert stream.num_tokens == position
        if size != len(tokens):
            writer.close()
    assert_same_tree(whole.reader(), writer.reader())
    writer.close()
    whole.close()


def test_an_exactly_full_stream_ends(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = tiny_plan(tiny_lm_config, tmp_path)
    writer = open_context(tmp_path, plan)
    stream = DocumentStream(writer, make_compactor(plan), document_meta(make_documents([5])[0]))
    stream.push(np.arange(64, dtype=np.uint32))
    stream.finish()
    (document,) = writer.reader().documents()
    assert (document.state, document.num_tokens) == ("complete", 64)
    writer.close()


def test_an_interrupted_ingest_redoes_nothing(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = tiny_plan(tiny_lm_config, tmp_path)
    compactor = make_compactor(plan)
    documents = make_documents(LENGTHS)
    whole = open_context(tmp_path / "whole", plan)
    ingest(whole, plan, compactor, documents)

    writer = open_context(tmp_path / "resumed", plan)
    ingest(writer, plan, compactor, documents[:2])
    writer.close()
    writer = open_context(tmp_path / "resumed", plan)
    before = writer.version().seq
    ingest(writer, plan, compactor, documents)
    after = writer.version().seq
    ingest(writer, plan, compactor, documents)
    assert writer.version().seq == after > before
    assert_same_tree(whole.reader(), writer.reader())
    writer.close()
    whole.close()


def test_a_gist_does_not_depend_on_its_place(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = tiny_plan(tiny_lm_config, tmp_path)
    compactor = make_compactor(plan)
    documents = make_documents([300, 500])
    for name, order in (("ab", documents), ("ba", documents[::-1])):
        writer = open_context(tmp_path / name, plan)
        ingest(writer, plan, compactor, order)
        writer.close()
    readers = [open_context(tmp_path / name, plan).reader() for name in ("ab", "ba")]
    for uri in ("doc0.txt", "doc1.txt"):
        gists = []
        for reader in readers:
            document = next(d for d in reader.documents() if d.meta.uri == uri)
            blocks = np.arange(document.first_block, document.first_block + document.num_blocks)
            gists.append(reader.read("gists", 1, blocks))
        assert gists[0].equal(gists[1])
