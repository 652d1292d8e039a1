"""Candidates and their signals, on text whose answer is known; nothing behind the history is looked at."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from actors.focus_signals import (
    NUM_NEWEST,
    NUM_OPENING,
    Hits,
    Question,
    find_candidates,
    newest_keys,
    search_history,
    signals,
)
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig
from models.base_lm import BaseLM
from models.focus.dense import KeySpace
from models.focus.history import History
from models.lensnet.features import CandidateSet
from storage.schema import KEYS
from tests.actors.evaluation.support import NEEDLE, StoredText, stored, text_with_needle

NEEDLE_BLOCK = 12
STOP, SHOWN_FROM = 35, 31
"""End of the history, and where its raw tail begins."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig) -> Iterator[StoredText]:
    """Blocks 0-2 are a document; the other has the needle in block 12 and asks for it in its 32nd."""
    text = text_with_needle(32, NEEDLE_BLOCK - 3, end="; again: the quokka of zanzibar ")
    after = text_with_needle(8, 7, seed=4)
    with stored(tiny_lm_config, tmp_path_factory.mktemp("tree"), ["y" * 80, f"{text}{NEEDLE} {after}"]) as tree:
        yield tree


def asked(lm: BaseLM, tree: StoredText, space: KeySpace | None = None) -> tuple[History, Question, Hits, KeySpace]:
    history = History.of(tree.reader, 0, STOP)
    tokens, counts = tree.reader.tokens(STOP - 8, 8)
    newest = tokens[np.arange(K) < counts[:, None]].astype(np.int64)
    question = Question.of(lm, tree.gistnet, tree.plan.tokenizer, newest)
    space = space or KeySpace.of_net(tree.gistnet, tree.reader, array=KEYS)
    hits = search_history(tree.reader, history, tree.lexical, space, question, SHOWN_FROM, 32)
    return history, question, hits, space


def told(
    lm: BaseLM, tree: StoredText, blocks: list[int], space: KeySpace | None = None, **more: dict[int, int]
) -> CandidateSet:
    history, question, hits, space = asked(lm, tree, space)
    wanted = np.array(blocks, np.int64)
    tail = newest_keys(tree.reader, history)
    return signals(
        tree.reader, history, tree.gistnet, space, question, hits, wanted, SHOWN_FROM, tail_keys=tail, own=True, **more
    )  # fmt: skip


def test_the_needle_is_a_candidate_and_looks_like_one(lm: BaseLM, tree: StoredText) -> None:
    history, _, hits, _ = asked(lm, tree)
    assert next(iter(hits.lexical)) == NEEDLE_BLOCK
    assert len(hits.dense) == SHOWN_FROM
    blocks = find_candidates(tree.reader, history, hits, SHOWN_FROM, opening=True)
    assert NEEDLE_BLOCK in blocks
    assert NEEDLE_BLOCK + 1 in blocks, "what goes on behind it, too"
    assert set(range(SHOWN_FROM - NUM_NEWEST, SHOWN_FROM)) <= set(blocks.tolist()), "more of the tail"
    assert set(range(3, 3 + NUM_OPENING)) <= set(blocks.tolist()), "the document's beginning"
    assert blocks.tolist() == sorted(set(blocks.tolist()))
    assert 0 <= blocks.min() <= blocks.max() < SHOWN_FROM

    found = told(lm, tree, blocks.tolist())
    needle = blocks.tolist().index(NEEDLE_BLOCK)
    assert found.column("lexical_score")[needle] == 1.0
    assert found.column("lexical_rank")[needle] == 1.0
    assert found.column("suffix_match")[needle] == found.column("suffix_match").max() == pytest.approx(np.log2(9) / 4)
    assert found.column("pair_overlap")[needle] == found.column("pair_overlap").max()
    np.testing.assert_allclose(np.linalg.norm(found.keys, axis=1), 1.0, atol=1e-4)
    np.testing.assert_allclose(found.keys @ found.query, found.column("key_match_32"), atol=1e-5)
    assert np.isfinite(found.features).all()


def test_where_and_what_a_block_is(lm: BaseLM, tree: StoredText) -> None:
    found = told(lm, tree, [0, 2, 3, 12, 30], shown={12: 3})
    assert found.column("same_document").tolist() == [0, 0, 1, 1, 1]
    assert found.column("log_document_offset")[[0, 2]].tolist() == pytest.approx([0.0, np.log2(2) / 16], abs=1)
    assert found.column("log_document_offset")[2] == 0.0
    assert found.column("log_tokens").tolist() == pytest.approx([5 / 16, 4 / 16, 5 / 16, 5 / 16, 5 / 16]), "16 of 2½"
    distance = found.column("log_distance")
    assert distance[-1] == 0.0
    assert (np.diff(distance) < 0).all()
    assert distance[3] == pytest.approx(np.log2(1 + (30 - 12) * K) / 24)
    assert found.column("is_shown").tolist() == [0, 0, 0, 1, 0]
    assert found.column("shown_before").tolist() == pytest.approx([0, 0, 0, 2 / 8, 0])
    assert (found.column("lod") * 8).tolist() == [2, 2, 2, 0, 2]


def test_nothing_behind_the_history_is_looked_at(lm: BaseLM, tree: StoredText, tiny_lm_config: BaseLMConfig) -> None:
    # Where untrained keys are compared is measured on the whole context; here on the same for both.
    space = KeySpace.plain(tree.gistnet.key_dim)
    before = told(lm, tree, [3, 12, 20], space)
    text = text_with_needle(32, NEEDLE_BLOCK - 3, end="; again: the quokka of zanzibar ")
    root = tree.folder.parent / "cut"
    with stored(tiny_lm_config, root, ["y" * 80, text]) as cut:
        np.testing.assert_allclose(told(lm, cut, [3, 12, 20], space).features, before.features, atol=1e-5)


def test_a_history_without_the_raw_tail_is_compared_with_where_it_is(lm: BaseLM, tree: StoredText) -> None:
    """A context that a session only reads: its newest blocks are not what is at hand."""
    history, question, hits, space = asked(lm, tree)
    blocks = np.array([3, 12, 34])

    def of(tail: np.ndarray) -> CandidateSet:
        keys = tree.reader.read(KEYS, 1, tail).flatten(1).float()
        return signals(
            tree.reader, history, tree.gistnet, space, question, hits, blocks, STOP, tail_keys=keys, own=False
        )  # fmt: skip

    like_12, like_nothing = of(np.array([12])), of(np.empty(0, np.int64))
    assert like_12.column("tail_match_max").argmax() == 1
    assert like_12.column("tail_match_max")[1] == pytest.approx(1.0, abs=1e-4)
    assert not like_nothing.column("tail_match_max").any()
    assert not like_12.column("same_document").any()


def test_no_candidates_are_an_empty_set(lm: BaseLM, tree: StoredText) -> None:
    found = told(lm, tree, [])
    assert len(found) == 0
    assert found.keys.shape == (0, len(found.query))
