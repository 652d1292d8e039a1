"""The measuring instrument against one plain pass of the model, and candidates against a masked one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.evaluation.contents import Contents, Reading
from actors.evaluation.rivals import Condition, contents_of
from actors.evaluation.scorer import BlockCaches, CandidateScorer, FullHistory, Scorer, one_after_the_other
from cluster.config import TOKENS_PER_BLOCK as K
from models.base_lm import BaseLM
from models.focus.layout import Policy, lay_out
from models.focus.working_context import WorkingContext
from storage.memory_tree import MemoryTree
from tests.actors.evaluation.support import byte_tokens, masked_nll, plain_nll, random_tree, reading_of

IDS = byte_tokens(40, 99)
CLOSE = {"rtol": 0, "atol": 1e-4}
"""Nats; the model's own cache differs by as much from one pass."""


@pytest.fixture(scope="module")
def tree() -> MemoryTree:
    """18 blocks: 32 × 8, 14 | 3 | 32 × 8."""
    return random_tree([8 * K + 14, 3, 8 * K])


@pytest.fixture
def reading(lm: BaseLM, tree: MemoryTree) -> Reading:
    return reading_of(lm, tree)


def mixed_rows(reading: Reading) -> Contents:
    """Gists of half the history, raw tokens of the rest."""
    gists = reading.context(WorkingContext.coarsest("overlay", 100, [reading.history])).rows(0, 8)
    return Contents.joined([gists, reading.raw(range(8, 18))])


def test_nll_is_that_of_one_plain_pass(lm: BaseLM, reading: Reading) -> None:
    num_tokens = reading.history.num_tokens
    assert num_tokens == 529
    for rows in (mixed_rows(reading), reading.raw(range(18)), reading.raw([4]), reading.nothing()):
        found = Scorer(lm).nll(rows, IDS, num_tokens)
        assert found.shape == (39,)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, plain_nll(lm, rows, IDS, num_tokens), **CLOSE)


def test_equal_contents_have_equal_nll_to_the_bit_and_others_do_not(lm: BaseLM, reading: Reading) -> None:
    first, second = mixed_rows(reading), mixed_rows(reading)
    assert first.embeds is not second.embeds
    nll = Scorer(lm).nll(first, IDS, 529)
    np.testing.assert_array_equal(nll, Scorer(lm).nll(second, IDS, 529))
    assert np.abs(nll - Scorer(lm).nll(reading.nothing(), IDS, 529)).max() > 0.01


@pytest.mark.parametrize("policy", ["compact", "anchored"])
def test_policies_place_rows_and_horizon(lm: BaseLM, reading: Reading, policy: Policy) -> None:
    rows = mixed_rows(reading)
    layout = lay_out(policy, rows.half_tokens, 3000)
    placed = Contents(rows.embeds, layout.half_tokens)
    expected = plain_nll(lm, placed, IDS, layout.next_half_token / 2)
    found = Scorer(lm, policy).nll(rows, IDS, 3000)
    np.testing.assert_allclose(found, expected, **CLOSE)
    # One scorer serves every policy.
    np.testing.assert_array_equal(Scorer(lm).nll(rows, IDS, 3000, policy), found)
    np.testing.assert_array_equal(Scorer(lm, policy).nll(rows, IDS, 3000, "global"), Scorer(lm).nll(rows, IDS, 3000))
    assert np.abs(Scorer(lm).nll(rows, IDS, 3000) - found).max() > 0.01


def test_on_raw_history_global_and_compact_agree(lm: BaseLM, reading: Reading) -> None:
    rows = reading.raw(range(18))
    np.testing.assert_allclose(
        Scorer(lm, "compact").nll(rows, IDS, 529), Scorer(lm, "global").nll(rows, IDS, 529), **CLOSE
    )


def test_full_history_equals_its_raw_contents_however_it_was_read(lm: BaseLM, tree: MemoryTree) -> None:
    """Growing, standing still, going back, and another beginning."""
    full = FullHistory(lm)
    for first, stop in ((0, 5), (0, 9), (0, 9), (0, 18), (0, 7), (2, 7), (2, 16), (0, 16)):
        reading = reading_of(lm, tree, first, stop)
        expected = Scorer(lm).nll(reading.raw(range(first, stop)), IDS, reading.history.num_tokens)
        np.testing.assert_allclose(full.nll(reading, IDS), expected, **CLOSE)


def test_a_rival_given_all_the_history_equals_full(lm: BaseLM, tree: MemoryTree) -> None:
    reading = reading_of(lm, tree, 1, 17)
    full = FullHistory(lm).nll(reading, IDS)
    num_tokens = reading.history.num_tokens
    for chooser in ("recency", "uniform", "bm25"):
        for form in ("raw", "overlay", "strict"):
            if (chooser, form) != ("uniform", "raw"):
                rows, _ = contents_of(Condition(chooser, form), reading, [(4, 0)], num_tokens, 64, 8)
                np.testing.assert_allclose(Scorer(lm).nll(rows, IDS, num_tokens), full, **CLOSE)


# -- candidates ----------------------------------------------------------------------------------------------------


def parts_of(reading: Reading) -> tuple[Contents, list[Contents], Contents]:
    """Stand-ins, blocks of 32, 14 and 3 tokens, and a tail."""
    stand_ins = reading.context(WorkingContext.coarsest("overlay", 100, [reading.history]))
    blocks = [reading.raw([block]) for block in (2, 8, 5, 9, 11, 0, 1, 3, 4, 6, 7)]
    return stand_ins, blocks, reading.raw(range(16, 18))


@pytest.mark.parametrize("num_tokens", [529, 5000])
def test_nothing_chosen_is_exact_and_chosen_blocks_are_as_masked(lm: BaseLM, reading: Reading, num_tokens: int) -> None:
    """At true places, however far the model was trained."""
    stand_ins, blocks, tail = parts_of(reading)
    scorer = CandidateScorer(BlockCaches(lm, stand_ins, blocks, num_tokens), tail)
    exact = Scorer(lm).nll(Contents.joined([stand_ins, tail]), IDS, num_tokens)
    np.testing.assert_allclose(scorer.nll([], IDS), exact, **CLOSE)
    for chosen in ([0], [1], [3, 0], [2, 4, 1, 5]):
        expected = masked_nll(lm, stand_ins, tail, [blocks[i] for i in chosen], IDS, num_tokens)
        np.testing.assert_allclose(scorer.nll(chosen, IDS), expected, **CLOSE)
    assert np.abs(scorer.nll([0], IDS) - exact).max() > 0.01


def test_each_added_in_turn_is_each_added_alone(lm: BaseLM, reading: Reading) -> None:
    """More than one batch, blocks of three lengths, none and two at a time; rows come in the order asked for."""
    stand_ins, blocks, tail = parts_of(reading)
    scorer = CandidateScorer(BlockCaches(lm, stand_ins, blocks, 529), tail)
    added = [(i,) for i in range(len(blocks)) if i != 4] + [(), (0, 1), (3, 2)]
    found = scorer.nll_with_each([4], added, IDS)
    assert found.shape == (len(added), 39)
    for row, more in zip(found, added, strict=True):
        expected = masked_nll(lm, stand_ins, tail, [blocks[4], *(blocks[i] for i in more)], IDS, 529)
        np.testing.assert_allclose(row, expected, **CLOSE)
    # Nothing that was asked changed what is kept.
    np.testing.assert_array_equal(found, scorer.nll_with_each([4], added, IDS))


def test_one_set_of_blocks_serves_many_questions(lm: BaseLM, reading: Reading) -> None:
    stand_ins, blocks, tail = parts_of(reading)
    caches = BlockCaches(lm, stand_ins, blocks, 529)
    for question_tail in (tail, reading.nothing(), reading.raw([15, 16, 17])):
        found = CandidateScorer(caches, question_tail).nll([1, 2], IDS)
        expected = masked_nll(lm, stand_ins, question_tail, [blocks[1], blocks[2]], IDS, 529)
        np.testing.assert_allclose(found, expected, **CLOSE)


def placed(rows: Contents, first: int) -> Contents:
    """The same rows at places `first`, `first + 1` and so on."""
    return Contents(rows.embeds, 2 * np.arange(first, first + rows.num_rows))


@pytest.mark.parametrize("policy", ["compact", "anchored"])
def test_other_policies_put_stand_ins_all_blocks_and_the_tail_one_after_the_other(
    lm: BaseLM, reading: Reading, policy: Policy
) -> None:
    """Blocks in timeline order, whatever order they are given in, as if all were shown, whichever are."""
    stand_ins, blocks, tail = parts_of(reading)
    caches = BlockCaches(lm, stand_ins, blocks, 10**6, policy)
    timeline = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    first = dict(zip(timeline, np.cumsum([stand_ins.num_rows, *([32] * 8), 14, 3]).tolist(), strict=True))
    at = [placed(rows, first[block]) for rows, block in zip(blocks, (2, 8, 5, 9, 11, 0, 1, 3, 4, 6, 7), strict=True)]
    end = stand_ins.num_rows + 9 * 32 + 14 + 3
    assert first[11] + 32 == end
    for shown, behind in ((tail, end + tail.num_rows), (reading.nothing(), end)):
        assert caches.behind(shown)[1] == 2 * behind
        scorer = CandidateScorer(caches, shown)
        for chosen in ([], [0], [3, 0], [2, 4, 1, 5]):
            expected = masked_nll(lm, placed(stand_ins, 0), placed(shown, end), [at[i] for i in chosen], IDS, behind)
            np.testing.assert_allclose(scorer.nll(chosen, IDS), expected, **CLOSE)
    # What was given is as it was.
    assert stand_ins.half_tokens.tolist() != list(range(0, 2 * stand_ins.num_rows, 2))
    assert blocks[0].half_tokens[0] == 2 * 2 * K


def test_rows_that_are_put_one_after_the_other_keep_their_vectors(reading: Reading) -> None:
    parts = one_after_the_other([reading.raw([11]), reading.nothing(), reading.raw([3, 9])])
    assert [part.half_tokens.tolist() for part in parts] == [list(range(0, 64, 2)), [], list(range(64, 134, 2))]
    assert torch.equal(parts[0].embeds, reading.raw([11]).embeds)
    assert torch.equal(parts[2].embeds, reading.raw([3, 9]).embeds)


@pytest.mark.parametrize("policy", ["global", "compact"])
def test_no_blocks_are_stand_ins_and_tail(lm: BaseLM, reading: Reading, policy: Policy) -> None:
    stand_ins, _, tail = parts_of(reading)
    found = CandidateScorer(BlockCaches(lm, stand_ins, [], 529, policy), tail).nll([], IDS)
    expected = Scorer(lm, policy).nll(Contents.joined([stand_ins, tail]), IDS, 529)
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_without_stand_ins_blocks_stand_alone(lm: BaseLM, reading: Reading) -> None:
    _, blocks, tail = parts_of(reading)
    nothing = reading.nothing()
    scorer = CandidateScorer(BlockCaches(lm, nothing, blocks, 529), tail)
    np.testing.assert_allclose(scorer.nll([1], IDS), masked_nll(lm, nothing, tail, [blocks[1]], IDS, 529), **CLOSE)
    bare = CandidateScorer(BlockCaches(lm, nothing, [], 529), nothing)
    np.testing.assert_allclose(bare.nll([], IDS), Scorer(lm).nll(nothing, IDS, 529), **CLOSE)
