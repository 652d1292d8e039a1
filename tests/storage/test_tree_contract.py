"""What every tree promises, held against every kind of tree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import IncompatibleTreeError, InvalidWriteError, NodeMissingError, OutOfOrderError
from storage.codec import encode_arrays
from storage.contract import SpanWrite, TreeReader, TreeWriter
from storage.geometry import NO_TOKEN
from tests.storage.conftest import MakeTree
from tests.storage.support import (
    Text,
    assert_holds,
    encoding_of,
    follow,
    nodes_of,
    put,
    vectors,
)

ENCODING = encoding_of()


def test_satisfies_the_protocols(tree: TreeWriter) -> None:
    assert isinstance(tree, TreeWriter)
    assert isinstance(tree.reader(), TreeReader)


def test_an_empty_tree_reads_as_empty(tree: TreeWriter) -> None:
    reader = tree.reader()
    assert reader.version.num_blocks == reader.version.num_tokens == reader.version.max_lod == 0
    assert reader.documents() == []
    assert reader.tail() is None
    assert reader.tokens_before(np.array([0])).tolist() == [0]
    with pytest.raises(NodeMissingError):
        reader.read_node("gists", 1, 0)
    with pytest.raises(NodeMissingError):
        reader.document_at(0)


# -- appending ---------------------------------------------------------------------------------------------------------


def test_what_is_appended_is_read_back(tree: TreeWriter) -> None:
    texts = [Text("one", 70), Text("two", 32), Text("three", 1), Text("four", 1300)]
    assert put(tree, *(text.span(ENCODING) for text in texts)) == (46, 0)
    assert_holds(tree.reader(), texts, ENCODING)
    assert all(document.state == "complete" for document in tree.reader().documents())
    assert [document.first_block for document in tree.reader().documents()] == [0, 3, 4, 5]


def test_a_span_that_is_stored_already_is_skipped(tree: TreeWriter) -> None:
    text = Text("doc", 300)
    assert put(tree, text.span(ENCODING)) == (10, 0)
    assert put(tree, text.span(ENCODING)) == (0, 10)
    assert put(tree, text.span(ENCODING, 3, 5)) == (0, 2)
    assert_holds(tree.reader(), [text], ENCODING)


def test_of_an_overlapping_span_only_the_new_part_is_stored(tree: TreeWriter) -> None:
    text = Text("doc", 300)
    assert put(tree, text.span(ENCODING, 0, 4)) == (4, 0)
    assert put(tree, text.span(ENCODING, 2, 7)) == (3, 2)
    assert put(tree, text.span(ENCODING, 0, 10)) == (3, 7)
    assert_holds(tree.reader(), [text], ENCODING)


def test_the_same_span_twice_in_one_call_is_stored_once(tree: TreeWriter) -> None:
    one, two = Text("one", 100), Text("two", 40)
    spans = [one.span(ENCODING, 0, 3), one.span(ENCODING, 0, 4), one.span(ENCODING), two.span(ENCODING)]
    assert put(tree, *spans, *spans) == (6, 3 + 4 + 3 + 4 + 4 + 2)
    assert_holds(tree.reader(), [one, two], ENCODING)


def test_retries_across_segment_boundaries_neither_lose_nor_double(tree: TreeWriter) -> None:
    text = Text("doc", 150 * K - 5)
    for first in range(0, 150, 20):
        stop = min(first + 20, 150)
        tree.append([text.span(ENCODING, max(first - 7, 0), stop)])
        tree.append([text.span(ENCODING, first, stop)])
    tree.flush()
    assert_holds(tree.reader(), [text], ENCODING)


def test_a_gap_is_refused_and_nothing_of_the_call_is_stored(tree: TreeWriter) -> None:
    text, other = Text("doc", 300), Text("other", 10)
    put(tree, other.span(ENCODING))
    with pytest.raises(OutOfOrderError, match="stored up to block 2; the span starts at 3"):
        put(tree, text.span(ENCODING, 0, 2), text.span(ENCODING, 3, 5))
    tree.flush()
    assert_holds(tree.reader(), [other], ENCODING)
    assert tree.marks(["doc", "other"]).keys() == {"other"}
    put(tree, text.span(ENCODING))
    assert_holds(tree.reader(), [other, text], ENCODING)


def test_only_one_document_is_open(tree: TreeWriter) -> None:
    one, two = Text("one", 300), Text("two", 300)
    put(tree, one.span(ENCODING, 0, 4))
    assert tree.open_document() == one.meta
    with pytest.raises(OutOfOrderError, match="'two' cannot begin: 'one' is still open"):
        put(tree, two.span(ENCODING))
    with pytest.raises(OutOfOrderError, match="'two' cannot begin"):
        tree.append_tail(two.meta, 0, two.tokens(0, 3))
    put(tree, one.span(ENCODING, 4), two.span(ENCODING))
    assert tree.open_document() is None
    assert_holds(tree.reader(), [one, two], ENCODING)


def test_a_complete_document_does_not_grow(tree: TreeWriter) -> None:
    put(tree, Text("doc", 64).span(ENCODING))
    with pytest.raises(OutOfOrderError, match="is complete with 2 blocks and cannot grow"):
        put(tree, Text("doc", 96).span(ENCODING))
    with pytest.raises(OutOfOrderError, match="is complete and cannot grow"):
        tree.append_tail(Text("doc", 96).meta, 64, np.arange(5, dtype=np.uint32))
    assert_holds(tree.reader(), [Text("doc", 64)], ENCODING)


def test_a_document_that_is_ended_by_a_repeated_span_says_what_to_do(tree: TreeWriter) -> None:
    text = Text("doc", 64)
    put(tree, text.span(ENCODING, ends=False))
    with pytest.raises(OutOfOrderError, match="close_document"):
        put(tree, text.span(ENCODING))
    tree.close_document("doc", complete=True)
    assert put(tree, text.span(ENCODING)) == (0, 2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: {"tokens": s.tokens.astype(np.int64)}, "tokens are int64"),
        (lambda s: {"tokens": s.tokens[:, :31]}, r"expected uint32\(3, 32\)"),
        (lambda s: {"num_tokens": np.array([32, 9, 32], np.uint8)}, "only a document's last block may be short"),
        (lambda s: {"num_tokens": np.array([32, 32, 0], np.uint8)}, "from 1 to 32"),
        (lambda s: {"num_tokens": np.array([32, 32, 3], np.uint8)}, "must hold NO_TOKEN"),
        (lambda s: {"last": False}, "only a document's last block may be short"),
        (lambda s: {"first_block": -1}, "begins at block 0"),
        (lambda s: {"arrays": {}}, "'gists' is missing"),
        (lambda s: {"arrays": {**s.arrays, "extra": s.arrays["gists"]}}, "holds no array 'extra'"),
        (lambda s: {"arrays": {"gists": s.arrays["gists"][:2]}}, "'gists' has shape"),
        (lambda s: {"arrays": {"gists": torch.zeros(3, 3)}}, "'gists'"),
        (lambda s: {"arrays": {"gists": s.arrays["gists"] * float("nan")}}, "not finite"),
        (lambda s: {"arrays": {"gists": (s.arrays["gists"] * float("inf")).numpy()}}, "not finite"),
    ],
)
def test_a_malformed_span_is_refused(tree: TreeWriter, spoil: Callable, message: str) -> None:
    good = Text("doc", 70).span(ENCODING)
    bad = SpanWrite(**{**vars(good), **spoil(good)})
    before = Text("before", 20)
    with pytest.raises(InvalidWriteError, match=message):
        put(tree, before.span(ENCODING), bad)
    assert put(tree, before.span(ENCODING), good)[0] == 4
    assert_holds(tree.reader(), [before, Text("doc", 70)], ENCODING)


# -- tails -------------------------------------------------------------------------------------------------------------


def test_a_tail_grows_by_what_is_new(tree: TreeWriter) -> None:
    text = Text("doc", 100)
    tree.append_tail(text.meta, 0, text.tokens(0, 10))
    tree.append_tail(text.meta, 0, text.tokens(0, 10))
    tree.append_tail(text.meta, 5, text.tokens(5, 25))
    with pytest.raises(OutOfOrderError, match="stored up to token 25; the write starts at 26"):
        tree.append_tail(text.meta, 26, text.tokens(26, 30))
    tail = tree.reader().tail()
    assert tail is not None
    assert tail.document == text.meta
    np.testing.assert_array_equal(tail.tokens, text.tokens(0, 25))
    mark = tree.marks(["doc"])["doc"]
    assert (mark.num_blocks, mark.num_tokens, mark.tail_tokens, mark.state) == (0, 0, 25, "open")
    assert tree.reader().documents() == []


def test_blocks_take_their_tokens_out_of_the_tail(tree: TreeWriter) -> None:
    text = Text("doc", 100)
    tree.append_tail(text.meta, 0, text.tokens(0, 70))
    put(tree, text.span(ENCODING, 0, 1))
    tail = tree.reader().tail()
    assert tail is not None
    np.testing.assert_array_equal(tail.tokens, text.tokens(32, 70))
    # Offsets count the document's tokens, wherever they are stored.
    tree.append_tail(text.meta, 20, text.tokens(20, 80))
    assert tree.marks(["doc"])["doc"].tail_tokens == 48
    put(tree, text.span(ENCODING, 1, 3))
    assert tree.reader().tail() is None
    put(tree, text.span(ENCODING, 3))
    assert_holds(tree.reader(), [text], ENCODING)


def test_blocks_that_contradict_the_tail_are_refused(tree: TreeWriter) -> None:
    text = Text("doc", 100)
    tree.append_tail(text.meta, 0, text.tokens(0, 10) + 1)
    with pytest.raises(OutOfOrderError, match="differ from the stored tail"):
        put(tree, text.span(ENCODING))
    tree.close_document("doc")
    put(tree, text.span(ENCODING))
    assert_holds(tree.reader(), [text], ENCODING)


def test_a_last_block_does_not_leave_a_tail_behind(tree: TreeWriter) -> None:
    long, short = Text("doc", 100), Text("doc", 64)
    tree.append_tail(long.meta, 0, long.tokens(0, 70))
    with pytest.raises(OutOfOrderError, match="6 tail tokens follow its last block"):
        put(tree, short.span(ENCODING))
    put(tree, long.span(ENCODING))
    assert tree.reader().tail() is None


def test_an_empty_slot_is_no_tail_token(tree: TreeWriter) -> None:
    with pytest.raises(InvalidWriteError, match="0xffffffff"):
        tree.append_tail(Text("doc", 9).meta, 0, np.array([1, NO_TOKEN], np.uint32))


def test_a_tail_is_read_only_while_the_version_is_the_newest(tree: TreeWriter) -> None:
    text = Text("doc", 100)
    tree.append_tail(text.meta, 0, text.tokens(0, 10))
    reader = tree.reader()
    assert reader.tail() is not None
    tree.append_tail(text.meta, 10, text.tokens(10, 12))
    assert reader.tail() is None


# -- ending documents --------------------------------------------------------------------------------------------------


def test_a_cut_document_stays_and_frees_its_key(tree: TreeWriter) -> None:
    text = Text("doc", 100)
    put(tree, text.span(ENCODING, 0, 2))
    tree.append_tail(text.meta, 64, text.tokens(64, 80))
    tree.close_document("doc")
    assert tree.open_document() is None
    assert tree.reader().tail() is None
    assert tree.marks(["doc"]) == {}
    put(tree, text.span(ENCODING))
    cut, whole = tree.reader().documents()
    assert (cut.meta, cut.state, cut.first_block, cut.num_blocks, cut.num_tokens) == (text.meta, "cut", 0, 2, 64)
    assert (whole.meta, whole.state, whole.first_block, whole.num_blocks) == (text.meta, "complete", 2, 4)


def test_completing_a_document_keeps_its_key(tree: TreeWriter) -> None:
    text = Text("doc", 64)
    put(tree, text.span(ENCODING, ends=False))
    tree.close_document("doc", complete=True)
    assert tree.marks(["doc"])["doc"].state == "complete"
    assert put(tree, text.span(ENCODING)) == (0, 2)
    assert_holds(tree.reader(), [text], ENCODING)


def test_completing_does_not_lose_a_tail(tree: TreeWriter) -> None:
    text = Text("doc", 64)
    tree.append_tail(text.meta, 0, text.tokens(0, 3))
    with pytest.raises(OutOfOrderError, match="3 tail tokens are in no block yet"):
        tree.close_document("doc", complete=True)
    assert tree.marks(["doc"])["doc"].tail_tokens == 3
    put(tree, text.span(ENCODING))
    assert_holds(tree.reader(), [text], ENCODING)


def test_only_the_open_document_can_be_ended(tree: TreeWriter) -> None:
    put(tree, Text("done", 5).span(ENCODING))
    for key in ("done", "unknown"):
        with pytest.raises(OutOfOrderError, match="is not open"):
            tree.close_document(key)


def test_a_document_of_a_tail_alone_can_be_cut_and_started_again(tree: TreeWriter) -> None:
    text = Text("doc", 40)
    for _ in range(2):
        tree.append_tail(text.meta, 0, text.tokens(0, 7))
        tree.close_document("doc")
    assert tree.reader().documents() == []
    put(tree, text.span(ENCODING))
    assert_holds(tree.reader(), [text], ENCODING)
    assert tree.reader().document_at(0).meta == text.meta


# -- upper levels ------------------------------------------------------------------------------------------------------


def test_upper_nodes_are_put_in_order_and_once(tree: TreeWriter) -> None:
    put(tree, Text("doc", 100 * K).span(ENCODING))
    assert tree.put_nodes(2, 0, nodes_of(ENCODING, 2, 0, 2)).new_nodes == 2
    assert tree.put_nodes(2, 0, nodes_of(ENCODING, 2, 0, 2)).new_nodes == 0
    assert tree.put_nodes(2, 1, nodes_of(ENCODING, 2, 1, 3)).new_nodes == 1
    assert tree.version().level_counts == (100, 3)
    with pytest.raises(OutOfOrderError, match="LOD2 node 3 needs 128 nodes of LOD1; there are 100"):
        tree.put_nodes(2, 3, nodes_of(ENCODING, 2, 3, 4))
    with pytest.raises(OutOfOrderError, match="LOD2 has 3 nodes; the write starts at 4"):
        tree.put_nodes(2, 4, nodes_of(ENCODING, 2, 4, 5))
    with pytest.raises(OutOfOrderError, match="LOD3 node 0 needs 32 nodes of LOD2; there are 3"):
        tree.put_nodes(3, 0, nodes_of(ENCODING, 3, 0, 1))
    with pytest.raises(OutOfOrderError, match="there are 0"):
        tree.put_nodes(9, 0, nodes_of(ENCODING, 9, 0, 1))
    read = tree.reader().read("gists", 2, [2, 0, 1])
    assert torch.equal(read, vectors(0, 2, np.array([2, 0, 1]), ENCODING.arrays[0]).reshape(3, 1, 4))


@pytest.mark.parametrize(
    ("lod", "first", "arrays", "message"),
    [
        (1, 0, {"gists": torch.zeros(1, 4)}, "takes LOD2 and above"),
        (2, 0, {}, "'gists' is missing"),
        (2, -1, {"gists": torch.zeros(1, 4)}, "no node -1"),
        (2, 0, {"gists": torch.zeros(1, 3)}, r"a node is \(1, 4\)"),
        (2, 0, {"gists": torch.zeros(1, 4), "x": torch.zeros(1, 4)}, "holds no array 'x'"),
        (2, 0, {"gists": torch.full((1, 4), float("inf"))}, "not finite"),
    ],
)
def test_malformed_nodes_are_refused(tree: TreeWriter, lod: int, first: int, arrays: dict, message: str) -> None:
    put(tree, Text("doc", 40 * K).span(ENCODING))
    with pytest.raises(InvalidWriteError, match=message):
        tree.put_nodes(lod, first, arrays)
    assert tree.version().level_counts == (40,)


def test_levels_grow_with_the_context(make_tree: MakeTree) -> None:
    encoding = encoding_of(width=1)
    tree = make_tree(encoding, segment_super_blocks=256)
    text = Text("doc", (K**3 + 40) * K)
    tree.append([text.span(encoding, 0, 2000)])
    tree.append([text.span(encoding, 2000)])
    tree.flush()
    follow(tree, encoding)
    assert tree.version().level_counts == (K**3 + 40, K**2 + 1, K, 1)
    assert tree.version().max_lod == 4
    reader = tree.reader()
    for lod, index in ((2, K**2), (3, 31), (4, 0)):
        wanted = vectors(0, lod, np.array([index]), encoding.arrays[0])
        assert torch.equal(reader.read_node("gists", lod, index), wanted)
        with pytest.raises(NodeMissingError):
            reader.read_node("gists", lod, reader.version.num_nodes(lod))
    with pytest.raises(NodeMissingError):
        reader.read_node("gists", 5, 0)
    assert_holds(reader, [text], encoding)
    reader.close()


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_several_rows_and_several_arrays_a_node(make_tree: MakeTree, rows: int) -> None:
    encoding = encoding_of(width=3, rows=rows, key_width=5)
    tree = make_tree(encoding)
    texts = [Text("one", 40 * K), Text("two", 7), Text("three", 35 * K)]
    put(tree, *(text.span(encoding) for text in texts))
    follow(tree, encoding)
    reader = tree.reader()
    assert_holds(reader, texts, encoding)
    for lod in (1, 2):
        assert reader.read("gists", lod, [0, 1]).shape == (2, rows, 3)
        assert reader.read_node("gists", lod, 1).shape == (rows, 3)
        assert reader.read("keys", lod, [1]).shape == (1, 1, 5)
    groups = [reader.read_group("gists", 1, group) for group in range(3)]
    assert [len(group) for group in groups] == [32, 32, 12]
    assert torch.equal(torch.cat(groups), reader.read("gists", 1, np.arange(76)))
    assert torch.equal(reader.read_node("gists", 1, 33), groups[1][1])
    assert torch.equal(reader.read_group("keys", 2, 0), reader.read("keys", 2, [0, 1]))


def test_nodes_come_in_the_order_asked_for(tree: TreeWriter) -> None:
    text = Text("doc", 90 * K)
    put(tree, text.span(ENCODING))
    wanted = [89, 0, 31, 32, 32, 64, 5]
    read = tree.reader().read("gists", 1, wanted)
    assert torch.equal(read, vectors(text.seed, 1, np.array(wanted), ENCODING.arrays[0]).reshape(7, 1, 4))
    assert tree.reader().read("gists", 1, []).shape == (0, 1, 4)


def test_a_range_across_segments_and_journal(tree: TreeWriter) -> None:
    text = Text("doc", 90 * K)
    put(tree, text.span(ENCODING))
    reader = tree.reader()
    for first, count in ((0, 90), (20, 60), (31, 2), (64, 26), (89, 1), (10, 0)):
        tokens, counts = reader.tokens(first, count)
        np.testing.assert_array_equal(tokens, text.packed(first, first + count)[0])
        assert counts.tolist() == [K] * count


def test_prefix_sums_and_documents_by_block(tree: TreeWriter) -> None:
    texts = [Text("one", 70), Text("two", 1), Text("three", 64)]
    put(tree, *(text.span(ENCODING) for text in texts))
    reader = tree.reader()
    before = reader.tokens_before(np.array([[6, 0, 3], [4, 5, 1]]))
    assert before.tolist() == [[135, 0, 70], [71, 103, 32]]
    assert before.dtype == np.int64
    assert [reader.document_at(block).meta.key for block in range(6)] == ["one"] * 3 + ["two"] + ["three"] * 2


def test_what_is_not_there_is_refused(tree: TreeWriter) -> None:
    put(tree, Text("doc", 40 * K).span(ENCODING))
    reader = tree.reader()
    refused: list[Callable[[], object]] = [
        lambda: reader.tokens(39, 2),
        lambda: reader.tokens(-1, 1),
        lambda: reader.tokens_before(np.array([41])),
        lambda: reader.tokens_before(np.array([-1])),
        lambda: reader.read("gists", 1, [3, 40]),
        lambda: reader.read("gists", 1, [-1]),
        lambda: reader.read_node("gists", 2, 0),
        lambda: reader.read_node("gists", 0, 0),
        lambda: reader.read_group("gists", 1, 2),
        lambda: reader.read_group("gists", 1, -1),
        lambda: reader.document_at(40),
        lambda: reader.document_at(-1),
    ]
    for ask in refused:
        with pytest.raises(NodeMissingError):
            ask()
    with pytest.raises(IncompatibleTreeError, match="no array 'keys'; it holds gists"):
        reader.read("keys", 1, [0])


def test_a_pinned_reader_does_not_see_later_writes(tree: TreeWriter) -> None:
    one, two = Text("one", 40 * K), Text("two", 50 * K)
    put(tree, one.span(ENCODING))
    half = Text("two", 10 * K, size_bytes=two.num_tokens)
    put(tree, two.span(ENCODING, 0, 10))
    untouched, touched = tree.reader(), tree.reader()
    version = touched.version
    assert_holds(touched, [one, half], ENCODING)
    put(tree, two.span(ENCODING, 10))
    follow(tree, ENCODING)
    put(tree, Text("three", 100 * K).span(ENCODING))
    for reader in (untouched, touched):
        assert reader.version == version
        assert_holds(reader, [one, half], ENCODING)
        assert reader.document_at(45).num_tokens == half.num_tokens
        assert reader.document_at(45).state == "open"
        with pytest.raises(NodeMissingError):
            reader.read_node("gists", 1, 50)
        with pytest.raises(NodeMissingError):
            reader.read_node("gists", 2, 0)
    assert tree.reader().version.num_blocks == 190


def test_versions_are_numbered_and_acknowledged(tree: TreeWriter) -> None:
    first = tree.version()
    put(tree, Text("one", 40).span(ENCODING))
    ack = tree.flush()
    assert ack.version.seq > first.seq
    assert ack.version == tree.version() == tree.reader().version
    assert ack.pending_blocks == 0
    assert (ack.version.num_tokens, ack.version.num_nodes(0), ack.version.num_nodes(1)) == (40, 64, 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_encoded_arrays_are_taken_like_floats(make_tree: MakeTree, dtype) -> None:
    encoding = encoding_of(dtype, width=70, rows=2)
    text = Text("doc", 40 * K)
    plain = text.span(encoding)
    encoded = encode_arrays(encoding.arrays, plain.arrays, plain.num_blocks)
    floats, bytes_ = make_tree(encoding), make_tree(encoding)
    put(floats, plain)
    put(bytes_, SpanWrite(**{**vars(plain), "arrays": encoded}))
    bytes_.put_nodes(2, 0, encode_arrays(encoding.arrays, nodes_of(encoding, 2, 0, 1), 1))
    floats.put_nodes(2, 0, nodes_of(encoding, 2, 0, 1))
    for lod in (1, 2):
        one = floats.reader().read("gists", lod, [0]).float()
        two = bytes_.reader().read("gists", lod, [0]).float()
        torch.testing.assert_close(one, two, rtol=0, atol=0.02 if dtype == "int8" else 0)
