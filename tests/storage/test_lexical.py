"""Lexical search gives BM25's ranking, whatever part of the context is indexed by now."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError, NodeMissingError
from storage.contract import SpanWrite, TreeReader
from storage.lexical.index import LEXICAL_FILE, LexicalWriter
from storage.lexical.search import LexicalParameters, LexicalSearcher, ReplacedText
from storage.memory_tree import MemoryTree
from tests.storage.lexical_support import (
    ENCODING,
    UNPRUNED,
    bm25_scores,
    decode,
    span,
    words_of_blocks,
    write,
)

Found = tuple[np.ndarray, np.ndarray]

WORDS = ["alpha", "beta", "gamma", "delta", "pi", "rho", "x", "omicron", "zeta9"]
DOCUMENTS = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=60).map(" ".join),
    min_size=1,
    max_size=6,
)


def tree_of(*texts: str) -> MemoryTree:
    tree = MemoryTree(ENCODING)
    write(tree, *texts)
    return tree


def index(folder: Path, reader: TreeReader, batch_blocks: int = 3) -> int:
    with LexicalWriter(folder, decode, batch_blocks=batch_blocks) as writer:
        return writer.advance(reader)


def search(folder: Path, reader: TreeReader, query: str, limit: int = 1000, *bounds: int, **options) -> Found:
    with LexicalSearcher(folder, decode) as searcher:
        return searcher.search(reader, query, limit, *bounds, **{"parameters": UNPRUNED, **options})


def assert_same(found: Found, expected: Found) -> None:
    np.testing.assert_array_equal(found[0], expected[0])
    # Not merely close: how far the index has come must not show.
    np.testing.assert_array_equal(found[1], expected[1])


@settings(max_examples=30, deadline=None)
@given(
    texts=DOCUMENTS,
    query=st.lists(st.sampled_from([*WORDS, "absent"]), min_size=1, max_size=6),
    k1=st.floats(0, 3),
    b=st.floats(0, 1),
    num_indexed=st.integers(0, 6),
)
def test_scores_are_bm25(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], query: list[str], k1: float, b: float, num_indexed: int
) -> None:
    folder = tmp_path_factory.mktemp("lexical")
    tree = tree_of(*texts[:num_indexed])
    index(folder, tree.reader())
    write(tree, *texts[num_indexed:])
    parameters = LexicalParameters(k1, b, max_share=1.0)
    blocks, scores = search(folder, tree.reader(), " ".join(query), parameters=parameters)
    expected = np.array(bm25_scores(words_of_blocks(texts), set(query), k1, b))
    order = sorted(np.flatnonzero(expected > 0), key=lambda block: (-expected[block], -block))
    np.testing.assert_allclose(scores, expected[order], rtol=1e-9)
    np.testing.assert_allclose(expected[blocks], expected[order], rtol=1e-9)
    assert set(blocks.tolist()) == set(order)
    assert blocks.dtype == np.int64
    assert scores.dtype == np.float64


@settings(max_examples=25, deadline=None)
@given(texts=DOCUMENTS, num_indexed=st.integers(0, 6), bounds=st.tuples(st.integers(0, 40), st.integers(0, 40)))
def test_how_far_the_index_is_does_not_show(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], num_indexed: int, bounds: tuple[int, int]
) -> None:
    folder = tmp_path_factory.mktemp("lexical")
    tree = tree_of(*texts[:num_indexed])
    index(folder, tree.reader())
    write(tree, *texts[num_indexed:])
    reader = tree.reader()
    stop = min(max(bounds), reader.version.num_blocks)
    first = min(*bounds, stop)
    with LexicalSearcher(folder, decode) as searcher:

        def found() -> Found:
            return searcher.search(reader, "gamma pi omicron", 9, first, stop, parameters=UNPRUNED)

        before = found()
        assert_same(search(folder / "none", reader, "gamma pi omicron", 9, first, stop), before)
        index(folder, reader)
        assert_same(found(), before)
        assert_same(search(folder, reader, "gamma pi omicron", 9, first, stop), before)
    assert all(first <= block < stop for block in before[0])


def prose(num_words: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(f"w{rank}" for rank in rng.zipf(1.3, num_words) % 500)


@pytest.mark.parametrize(
    ("planted", "query"),
    [
        ("the vault code is 7391840", "what is the code of the vault?"),
        ("id 550e8400-e29b-41d4-a716-446655440000", "show 550E8400-E29B-41D4-A716-446655440000"),
        ("def read_lexical_mark():", "lexical"),
        ("class LexicalMark:", "where is the mark of lexical search"),
        ("storage.lexical.search.mark = 1", "storage.lexical.search.mark"),
    ],
)
@pytest.mark.parametrize("num_indexed", [0, 1, 3])
def test_a_needle_is_found(tmp_path: Path, planted: str, query: str, num_indexed: int) -> None:
    texts = [prose(2000), prose(500, 1) + " " + planted + " " + prose(500, 2), prose(2000, 3)]
    tree = tree_of(*texts[:num_indexed])
    index(tmp_path, tree.reader())
    write(tree, *texts[num_indexed:])
    blocks, _ = search(tmp_path, tree.reader(), query, 2, parameters=LexicalParameters())
    place = (len((texts[1].split(planted)[0]).encode()) + len(planted) // 2) // 32
    # A compound across an edge counts with both blocks.
    assert place + -(-len(texts[0]) // 32) in blocks


def test_a_cut_word_finds_both_of_its_blocks(tmp_path: Path) -> None:
    text = "a" * 27 + " unmistakable " + "b" * 40
    reader = tree_of(prose(300), text).reader()
    first = reader.documents()[1].first_block
    for _ in range(2):
        assert sorted(search(tmp_path, reader, "unmistakable")[0]) == [first, first + 1]
        index(tmp_path, reader)


def test_nothing_behind_the_range_is_known(tmp_path: Path) -> None:
    text = "a" * 27 + " unmistakable " + "b" * 40
    reader = tree_of(text).reader()
    for _ in range(2):
        assert len(search(tmp_path, reader, "unmistakable", 9, 0, 1)[0]) == 0
        assert search(tmp_path, reader, "unmi", 9, 0, 1)[0].tolist() == [0]
        assert sorted(search(tmp_path, reader, "unmistakable", 9, 0, 2)[0]) == [0, 1]
        assert search(tmp_path, reader, "unmistakable", 9, 1, 3)[0].tolist() == [1]
        index(tmp_path, reader)


def test_ranges(tmp_path: Path) -> None:
    tree = tree_of(*[f"needle number{n}" for n in range(10)])
    reader = tree.reader()
    index(tmp_path, reader)
    with LexicalSearcher(tmp_path, decode) as searcher:
        blocks, scores = searcher.search(reader, "needle", 10, 3, 7)
        # Equal scores: the newer first.
        assert blocks.tolist() == [6, 5, 4, 3]
        assert np.all(scores == scores[0])
        assert searcher.search(reader, "needle", 2)[0].tolist() == [9, 8]
        assert searcher.search(reader, "number4", 10, 0, 4)[0].tolist() == []
        assert searcher.search(reader, "needle", 10, 5, 5)[0].tolist() == []
        assert searcher.search(reader, "needle", 0)[0].tolist() == []
        for first, stop in ((0, 11), (-1, 3), (5, 4)):
            with pytest.raises(NodeMissingError, match="not all in version"):
                searcher.search(reader, "needle", 10, first, stop)


def test_an_older_version_sees_no_later_block(tmp_path: Path) -> None:
    tree = tree_of("needle one", "needle two")
    old = tree.reader()
    write(tree, "needle three")
    index(tmp_path, tree.reader())
    with LexicalSearcher(tmp_path, decode) as searcher:
        assert searcher.search(old, "needle", 10)[0].tolist() == [1, 0]
        assert searcher.search(tree.reader(), "needle", 10)[0].tolist() == [2, 1, 0]
        assert searcher.search(old, "needle", 10)[0].tolist() == [1, 0]


def test_a_growing_document_is_searched_to_its_end(tmp_path: Path) -> None:
    tree = MemoryTree(ENCODING)
    text = prose(100) + " unmistakable " + "b" * 70
    last = len(text.split("unmistakable")[0]) // 32
    with LexicalSearcher(tmp_path, decode) as searcher, LexicalWriter(tmp_path, decode) as writer:
        for stop in range(1, last + 3):
            tree.append([span("d", text, stop - 1, stop)])
            reader = tree.reader()
            assert writer.advance(reader) == min(1, stop - 1)
            found = set(searcher.search(reader, "unmistakable w1 w2", 99, parameters=UNPRUNED)[0].tolist())
            words = words_of_blocks([text[: 32 * stop]])
            assert found == {n for n, block in enumerate(words) if {"unmistakable", "w1", "w2"} & set(block)}


def test_pruning_keeps_the_rarest(tmp_path: Path) -> None:
    texts = [f"common {'often' if n % 4 == 0 else 'never'} rare{n}" for n in range(200)]
    reader = tree_of(*texts).reader()
    index(tmp_path, reader)

    def found(query: str, **bounds) -> list[int]:
        return search(tmp_path, reader, query, parameters=LexicalParameters(**bounds))[0].tolist()

    assert found("common rare7 often") == found("rare7 often")
    assert found("common rare7 often", max_terms=1) == [7]
    assert found("common rare7 often", max_postings=50) == [7]
    assert found("common rare7 often rare8", max_postings=2) == [8, 7]
    assert found("often common", min_common_blocks=0) == []
    assert len(found("often common", min_common_blocks=0, max_share=0.25)) == 50
    assert len(found("often common", min_common_blocks=0, max_share=1.0)) == 200
    assert found("common") == found("") == found("unheard of") == found(" .,;!") == []


@pytest.mark.parametrize(
    "query",
    [
        'plain"',
        '"plain',
        "plain OR",
        "AND plain",
        "NOT plain",
        "NEAR(plain, 3)",
        "plain*",
        "^plain",
        "terms: plain",
        "-plain + plain",
        "{plain}",
        "plain\x00",
        "'; DROP TABLE terms; -- plain",
        "plain#2",
    ],
)
@settings(max_examples=5, deadline=None)
@given(noise=st.text())
def test_a_query_has_no_syntax(tmp_path_factory: pytest.TempPathFactory, query: str, noise: str) -> None:
    folder = tmp_path_factory.mktemp("lexical")
    reader = tree_of("plain text", "more text", "AND OR NOT NEAR").reader()
    index(folder, reader)
    with LexicalSearcher(folder, decode) as searcher:
        assert 0 in searcher.search(reader, query, 10)[0]
        searcher.search(reader, noise, 10)
        assert 0 in searcher.search(reader, query, 10)[0]


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=120), min_size=1, max_size=4), query=st.text(max_size=60))
def test_any_text_is_indexed_as_it_is_searched(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], query: str
) -> None:
    folder = tmp_path_factory.mktemp("lexical")
    reader = tree_of(*texts).reader()
    for wanted in (query, *texts):
        unindexed = search(folder / "none", reader, wanted)
        (folder / LEXICAL_FILE).unlink(missing_ok=True)
        index(folder, reader)
        assert_same(search(folder, reader, wanted), unindexed)


def test_a_long_unindexed_history_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = tree_of("x" * 32 * 8200).reader()
    with caplog.at_level(logging.WARNING), LexicalSearcher(tmp_path, decode) as searcher:
        searcher.search(reader, "x", 1)
        searcher.search(reader, "y", 1)
    assert caplog.text.count("8200 blocks are in no lexical index") == 1


@pytest.mark.parametrize("values", [{"k1": -0.1}, {"b": 1.1}, {"b": float("nan")}, {"max_terms": -1}])
def test_parameters_without_meaning_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        LexicalParameters(**values)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), texts=st.lists(st.integers(40, 250), min_size=1, max_size=4), num_indexed=st.integers(0, 4))
def test_replaced_text_is_searched_as_if_it_had_been_stored(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, texts: list[int], num_indexed: int
) -> None:
    folder = tmp_path_factory.mktemp("lexical")
    stored = [prose(size, seed) for seed, size in enumerate(texts)]
    tree = tree_of(*stored[:num_indexed])
    index(folder, tree.reader())
    write(tree, *stored[num_indexed:])
    reader = tree.reader()
    num_blocks = reader.version.num_blocks
    # Blocks change places with text of other documents of the same sizes, words cut anywhere.
    other = tree_of(*(prose(size, 100 + seed)[: len(text)].ljust(len(text), "y") for seed, (size, text) in
                      enumerate(zip(texts, stored, strict=True))))  # fmt: skip
    blocks = np.array(sorted(data.draw(st.sets(st.integers(0, num_blocks - 1), max_size=6))), np.int64)
    mixed = _mixed(tree, other, set(blocks.tolist()))
    stop = data.draw(st.integers(0, num_blocks))
    first = data.draw(st.integers(0, stop))
    query = " ".join(f"w{number}" for number in (1, 2, 3, 5, 8, 13, 40, 77))
    with LexicalSearcher(folder, decode) as searcher:
        before = searcher.search(reader, query, 1000, first, stop)
        replaced = ReplacedText(mixed.reader(), blocks)
        found = searcher.search(reader, query, 1000, first, stop, replaced=replaced)
        assert_same(found, search(folder / "none", mixed.reader(), query, 1000, first, stop, parameters=None))
        assert_same(searcher.search(reader, query, 1000, first, stop), before)


def _mixed(tree: MemoryTree, other: MemoryTree, blocks: set[int]) -> MemoryTree:
    """The first tree with some blocks of the second."""
    mixed = MemoryTree(ENCODING)
    for document in tree.reader().documents():
        tokens, counts = tree.reader().tokens(document.first_block, document.num_blocks)
        for row in range(document.num_blocks):
            if document.first_block + row in blocks:
                tokens[row] = other.reader().tokens(document.first_block + row, 1)[0][0]
        gists = np.zeros((document.num_blocks, ENCODING.arrays[0].width), np.float32)
        mixed.append([SpanWrite(document.meta, 0, tokens, counts, {"gists": gists}, last=True)])
    return mixed
