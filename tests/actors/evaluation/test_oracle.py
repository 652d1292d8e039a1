"""The oracle against the same search written out, and against a horizon that one block brought about."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.evaluation.contents import Contents, Reading
from actors.evaluation.oracle import choose, choosing_half, scoring_half
from actors.evaluation.scorer import BlockCaches, CandidateScorer, Scorer
from models.base_lm import BaseLM
from models.focus.working_context import WorkingContext
from models.positions import Positions
from tests.actors.evaluation.support import byte_tokens, random_tree, reading_of

IDS = np.arange(8)


class Table(CandidateScorer):
    """Seven tokens' NLL as any function of the set of chosen blocks."""

    def __init__(self, num_blocks: int, seed: int, odd_seed: int = 0) -> None:
        self._single = np.random.default_rng(seed).normal(0, 1, (num_blocks, 7))
        self._pairs = np.random.default_rng(seed + 1).normal(0, 0.7, (num_blocks, num_blocks, 7))
        self._single[:, 1::2] += np.random.default_rng(odd_seed).normal(0, 5, (num_blocks, 3))
        self.asked: list[int] = []

    def of(self, blocks: Sequence[int]) -> np.ndarray:
        chosen = sorted(blocks)
        pairs = [self._pairs[a, b] for a in chosen for b in chosen if a < b]
        return np.sum([np.full(7, 9.0), *(self._single[c] for c in chosen), *pairs], axis=0)

    def nll(self, chosen: Sequence[int], ids: np.ndarray) -> np.ndarray:
        return self.of(chosen)

    def nll_with_each(self, chosen: Sequence[int], added: Sequence[Sequence[int]], ids: np.ndarray) -> np.ndarray:
        self.asked.append(len(added))
        return np.stack([self.of([*chosen, *more]) for more in added])


def written_out(table: Table, num_blocks: int, max_chosen: int, pool_size: int) -> tuple[list[int], list[int]]:
    def loss(blocks: list[int]) -> float:
        return float(np.mean([table.of(blocks)[i] for i in (0, 2, 4, 6)]))

    greedy = sorted(range(num_blocks), key=lambda block: loss([block]))
    chosen: list[int] = []
    while len(chosen) < max_chosen:
        rest = [block for block in greedy[:pool_size] if block not in chosen]
        better = [block for block in rest if loss([*chosen, block]) < loss(chosen)]
        if not better:
            break
        chosen.append(min(better, key=lambda block: loss([*chosen, block])))
    return greedy, chosen


@given(
    num_blocks=st.integers(0, 12),
    max_chosen=st.integers(0, 6),
    pool_size=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=200)
def test_the_search_is_the_one_written_out(num_blocks: int, max_chosen: int, pool_size: int, seed: int) -> None:
    table = Table(num_blocks, seed)
    choice = choose(table, num_blocks, IDS, max_chosen, pool_size)
    greedy, sequential = written_out(table, num_blocks, max_chosen, pool_size)
    assert choice.greedy == greedy
    assert choice.sequential == sequential
    gains = [float(np.mean((table.of([]) - table.of([block]))[::2])) for block in range(num_blocks)]
    np.testing.assert_allclose(choice.single_gains, gains, atol=1e-5)
    # Each step measures what is left of the pool, once.
    steps = [min(pool_size, num_blocks) - taken for taken in range(1, len(sequential) + 1)]
    assert table.asked[1:] == [size for size in steps if size > 0][: max(0, max_chosen - 1)]
    # What it is scored on plays no part.
    other = choose(Table(num_blocks, seed, odd_seed=7), num_blocks, IDS, max_chosen, pool_size)
    assert (other.greedy, other.sequential) == (greedy, sequential)


@given(num_tokens=st.integers(2, 70))
def test_the_halves_are_disjoint_and_complete(num_tokens: int) -> None:
    tokens = np.stack([np.arange(num_tokens), -np.arange(num_tokens)])
    choosing, scoring = choosing_half(tokens), scoring_half(tokens)
    assert not set(choosing[0]) & set(scoring[0])
    assert set(choosing[0]) | set(scoring[0]) == set(range(num_tokens))
    assert choosing.shape[1] - scoring.shape[1] in {0, 1}
    assert set(choosing[1]) == {-value for value in choosing[0]}


def continued(lm: BaseLM, rows: Contents, num_tokens: int, length: int) -> np.ndarray:
    """What the model itself would write after some contents."""
    ids = [7]
    with torch.inference_mode():
        for _ in range(length - 1):
            tokens = torch.tensor([ids])
            places = np.concatenate([rows.half_tokens, 2 * (num_tokens + np.arange(len(ids)))])
            embeds = torch.cat([rows.embeds[None], lm.embed(tokens)], dim=1)
            logits = lm.logits(embeds, positions=Positions(torch.from_numpy(places)[None]), last_only=True)
            ids.append(int(logits[0, -1].argmax()))
    return np.array(ids)


def parts(lm: BaseLM) -> tuple[Reading, Contents, list[Contents], Contents]:
    reading = reading_of(lm, random_tree([byte_tokens(18 * 32, 3)]))
    stand_ins = reading.context(WorkingContext.coarsest("overlay", 100, [reading.history]))
    return reading, stand_ins, [reading.raw([block]) for block in range(16)], reading.raw([16, 17])


@pytest.mark.parametrize("needle", [0, 5, 11])
def test_the_block_that_brought_the_horizon_about_is_found(lm: BaseLM, needle: int) -> None:
    """The horizon is what the model writes with the needle in view; nothing else predicts it as well."""
    reading, stand_ins, blocks, tail = parts(lm)
    num_tokens = reading.history.num_tokens
    seen = Contents.joined([stand_ins, blocks[needle], tail])
    ids = continued(lm, seen, num_tokens, 33)
    candidates = CandidateScorer(BlockCaches(lm, stand_ins, blocks, num_tokens), tail)
    choice = choose(candidates, len(blocks), ids, 4, 8)
    assert choice.greedy[0] == needle
    assert choice.sequential[0] == needle
    # Measured exactly, on the half that was not chosen on.
    scorer = Scorer(lm)
    with_needle = scoring_half(scorer.nll(seen, ids, num_tokens)).mean()
    without = scoring_half(scorer.nll(Contents.joined([stand_ins, tail]), ids, num_tokens)).mean()
    assert with_needle < without


def test_of_no_blocks_none_is_chosen(lm: BaseLM) -> None:
    reading, stand_ins, _, tail = parts(lm)
    candidates = CandidateScorer(BlockCaches(lm, stand_ins, [], reading.history.num_tokens), tail)
    choice = choose(candidates, 0, byte_tokens(20, 1), 4, 8)
    assert (choice.greedy, choice.sequential, len(choice.single_gains)) == ([], [], 0)
