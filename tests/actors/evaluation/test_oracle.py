"""The oracle against the same search written out, and against a horizon that one block brought about."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.evaluation.contents import Contents, Reading
from actors.evaluation.oracle import MEASURED_AT_A_TIME, choose, choosing_half, climb, scoring_half
from actors.evaluation.scorer import BlockCaches, CandidateScorer, Scorer
from models.base_lm import BaseLM
from models.focus.working_context import WorkingContext
from tests.actors.evaluation.support import byte_tokens, continued, random_tree, reading_of

IDS = np.arange(8)


class Table(CandidateScorer):
    """Seven tokens' NLL as any function of the set of chosen blocks."""

    def __init__(self, num_blocks: int, seed: int, odd_seed: int = 0) -> None:
        self._single = np.random.default_rng(seed).normal(0, 1, (num_blocks, 7))
        self._pairs = np.random.default_rng(seed + 1).normal(0, 0.7, (num_blocks, num_blocks, 7))
        self._single[:, 1::2] += np.random.default_rng(odd_seed).normal(0, 5, (num_blocks, 3))
        self.asked: list[tuple[list[int], list[int]]] = []
        """What was chosen, and the blocks that were measured beside it."""

    def of(self, blocks: Sequence[int]) -> np.ndarray:
        chosen = sorted(blocks)
        pairs = [self._pairs[a, b] for a in chosen for b in chosen if a < b]
        return np.sum([np.full(7, 9.0), *(self._single[c] for c in chosen), *pairs], axis=0)

    def nll(self, chosen: Sequence[int], ids: np.ndarray) -> np.ndarray:
        return self.of(chosen)

    def nll_with_each(self, chosen: Sequence[int], added: Sequence[Sequence[int]], ids: np.ndarray) -> np.ndarray:
        assert all(len(more) == 1 for more in added)
        self.asked.append((list(chosen), [block for (block,) in added]))
        return np.stack([self.of([*chosen, *more]) for more in added])


class Covering(Table):
    """The more is shown, the less another block adds: of every token the block that says most of it counts.

    And every block costs something, so that some are worth nothing.
    """

    def of(self, blocks: Sequence[int]) -> np.ndarray:
        best = np.max([np.zeros(7), *(self._single[c] for c in blocks)], axis=0)
        return 9.0 - best + sum(0.3 + 0.01 * c for c in blocks)


def loss_of(table: Table, blocks: Sequence[int]) -> float:
    return float(np.mean([table.of(blocks)[i] for i in (0, 2, 4, 6)]))


def written_out(table: Table, pool: list[int], max_chosen: int, pool_size: int) -> tuple[list[int], list[int]]:
    """Every block that is left is measured again at every step."""

    def loss(blocks: list[int]) -> float:
        return loss_of(table, blocks)

    greedy = sorted(pool, key=lambda block: loss([block]))
    chosen: list[int] = []
    while len(chosen) < max_chosen:
        rest = [block for block in greedy[:pool_size] if block not in chosen]
        better = [block for block in rest if loss([*chosen, block]) < loss(chosen)]
        if not better:
            break
        chosen.append(min(better, key=lambda block: loss([*chosen, block])))
    return greedy, chosen


@st.composite
def searches(draw: st.DrawFn) -> tuple[int, list[int], int, int, int]:
    """Blocks, those that may be chosen in any order, how many, how many go on, seed."""
    num_blocks = draw(st.integers(0, 12))
    pool = draw(st.permutations(range(num_blocks)))[: draw(st.integers(0, 12))]
    return num_blocks, pool, draw(st.integers(0, 6)), draw(st.integers(1, 12)), draw(st.integers(0, 10_000))


@given(search=searches())
@settings(deadline=None, max_examples=200)
def test_where_blocks_are_worth_less_the_more_are_shown_the_search_is_the_one_written_out(
    search: tuple[int, list[int], int, int, int],
) -> None:
    num_blocks, pool, max_chosen, pool_size, seed = search
    table = Covering(num_blocks, seed)
    choice = choose(table, pool, IDS, max_chosen, pool_size)
    greedy, sequential = written_out(table, pool, max_chosen, pool_size)
    assert choice.greedy == greedy
    assert choice.sequential == sequential
    # Lazily: no more than all that are left, each once a step, a few at a time, the best first.
    worthless = {block for block in pool if loss_of(table, [block]) >= loss_of(table, [])}
    steps: dict[int, list[int]] = {}
    for chosen, asked in table.asked[1:]:
        assert chosen == sequential[: len(chosen)]
        assert len(asked) <= MEASURED_AT_A_TIME
        assert worthless.isdisjoint(asked)
        steps.setdefault(len(chosen), []).extend(asked)
    for taken, asked in steps.items():
        assert 1 <= taken < max_chosen
        assert len(set(asked)) == len(asked)
        assert set(asked) <= set(greedy[:pool_size]) - set(sequential[:taken])
    if 2 in steps:
        # What was learned at one step is kept for the next: it begins with the best of what was known then.
        known = {block: loss_of(table, []) - loss_of(table, [block]) for block in greedy[:pool_size]}
        known |= {b: loss_of(table, sequential[:1]) - loss_of(table, [sequential[0], b]) for b in steps.get(1, ())}
        left = [block for block in known if block not in sequential[:2]]
        assert steps[2][0] == max(left, key=lambda block: known[block])


@given(search=searches())
@settings(deadline=None, max_examples=200)
def test_whatever_blocks_do_together_those_that_are_chosen_helped(
    search: tuple[int, list[int], int, int, int],
) -> None:
    num_blocks, pool, max_chosen, pool_size, seed = search
    table = Table(num_blocks, seed)
    choice = choose(table, pool, IDS, max_chosen, pool_size)
    assert choice.greedy == written_out(table, pool, max_chosen, pool_size)[0]
    assert choice.pool == pool
    gains = {block: float(np.mean((table.of([]) - table.of([block]))[::2])) for block in pool}
    np.testing.assert_allclose(choice.single_gains, [gains[block] for block in pool], atol=1e-5)
    for block in pool:
        assert choice.gain(block) == pytest.approx(gains[block], abs=1e-5)
    if pool:
        np.testing.assert_allclose(choice.base, table.of([]))
        np.testing.assert_allclose(choice.alone, [table.of([block]) for block in pool])
    assert len(choice.sequential) <= max_chosen
    assert set(choice.sequential) <= {block for block in choice.greedy[:pool_size] if gains[block] > 0}
    losses = [loss_of(table, choice.sequential[:taken]) for taken in range(len(choice.sequential) + 1)]
    assert losses == sorted(losses, reverse=True)
    # What it is scored on plays no part.
    other = choose(Table(num_blocks, seed, odd_seed=7), pool, IDS, max_chosen, pool_size)
    assert (other.greedy, other.sequential) == (choice.greedy, choice.sequential)


def test_of_many_blocks_few_are_measured_again() -> None:
    table = Covering(100, 1)
    choice = choose(table, range(100), IDS, 6, 50)
    assert choice.sequential == written_out(table, list(range(100)), 6, 50)[1]
    num_steps = min(5, len(choice.sequential))
    assert num_steps >= 2
    assert sum(len(asked) for _, asked in table.asked[1:]) < num_steps * 50 / 2


def test_what_is_chosen_on_may_be_other_tokens() -> None:
    table = Covering(9, 3)
    choice = choose(table, range(9), IDS, 4, 9, lambda nll: nll[..., -2:])
    gains = [float((table.of([]) - table.of([block]))[-2:].mean()) for block in range(9)]
    assert choice.greedy == np.argsort(-np.array(gains)).tolist() != choose(table, range(9), IDS, 4, 9).greedy
    np.testing.assert_allclose(choice.single_gains, gains, atol=1e-5)
    assert choice.sequential[0] == choice.greedy[0]


def test_two_blocks_that_help_only_together_may_be_overlooked() -> None:
    """The price of not measuring what alone is worth nothing."""

    class Pair(Table):
        def of(self, blocks: Sequence[int]) -> np.ndarray:
            return np.full(7, 9.0 - 1.0 * (0 in blocks) + 0.5 * (1 in blocks) - 4.0 * ({0, 1} <= set(blocks)))

    table = Pair(3, 0)
    assert choose(table, range(3), IDS, 3, 3).sequential == [0]
    assert table.asked == [([], [0, 1, 2])]
    assert written_out(table, [0, 1, 2], 3, 3)[1] == [0, 1]


@given(search=searches(), starts=st.lists(st.lists(st.integers(0, 11), max_size=6, unique=True), max_size=4))
@settings(deadline=None, max_examples=200)
def test_climbing_loses_nothing_of_the_best_start_and_reads_no_more_than_it_may(
    search: tuple[int, list[int], int, int, int], starts: list[list[int]]
) -> None:
    _, ranking, most, num_readings, seed = search
    starts = [[], *starts]
    table = Table(12, seed)
    read: list[list[int]] = []

    def measure(blocks: Sequence[int]) -> np.ndarray:
        read.append(list(blocks))
        return table.of(blocks)

    steps = climb(measure, starts, ranking, most, num_readings)
    losses = [loss_of(table, step.blocks) for step in steps]
    assert losses == sorted(set(losses), reverse=True)
    assert all((step.nll == table.of(step.blocks)).all() for step in steps)
    # Stopped earlier, it would have had what it had then.
    for step, better in zip(steps, [*steps[1:], None], strict=True):
        assert climb(table.of, starts, ranking, most, step.num_readings)[-1].num_readings == step.num_readings
        if better is None or better.num_readings > step.num_readings:
            assert climb(table.of, starts, ranking, most, step.num_readings)[-1].blocks == step.blocks
    found = steps[-1].blocks
    assert found in read
    assert loss_of(table, found) == min(loss_of(table, blocks) for blocks in read)
    assert all(len(set(blocks)) == len(blocks) <= most for blocks in read)
    assert len({frozenset(blocks) for blocks in read}) == len(read)
    cut = [start[:most] for start in starts]
    assert {frozenset(blocks) for blocks in cut} <= {frozenset(blocks) for blocks in read}
    others = [blocks for blocks in read if frozenset(blocks) not in {frozenset(start) for start in cut}]
    assert len(others) <= num_readings
    assert found == climbed_by_hand(table, starts, ranking, most, num_readings)
    # What it is scored on plays no part.
    assert found == climb(Table(12, seed, odd_seed=7).of, starts, ranking, most, num_readings)[-1].blocks


@given(search=searches(), start=st.lists(st.integers(0, 11), max_size=6, unique=True))
@settings(deadline=None)
def test_with_readings_enough_no_change_of_one_block_is_better(
    search: tuple[int, list[int], int, int, int], start: list[int]
) -> None:
    _, ranking, most, _, seed = search
    table = Table(12, seed)
    found = climb(table.of, [[], start], ranking, most, num_readings=10_000)[-1].blocks
    added = [[*found[: most - 1], block] for block in ranking if block not in found] if most else []
    for other in [*added, *([b for b in found if b != block] for block in found)]:
        assert loss_of(table, other) >= loss_of(table, found)


def test_a_block_that_no_longer_helps_is_left_out_again() -> None:
    class Replaced(Table):
        """Block 0 helps, 1 helps more, and beside 1 the other harms."""

        def of(self, blocks: Sequence[int]) -> np.ndarray:
            return np.full(7, 9.0 - 1.0 * (0 in blocks) - 3.0 * (1 in blocks) + 2.0 * ({0, 1} <= set(blocks)))

    found = [(step.num_readings, step.blocks) for step in climb(Replaced(2, 0).of, [[], [0]], [1], 2, num_readings=2)]
    assert found == [(0, []), (0, [0]), (1, [0, 1]), (2, [1])]


def climbed_by_hand(
    table: Table, starts: list[list[int]], ranking: list[int], most: int, num_readings: int
) -> list[int]:
    """The best start; the first 2, 4, 8 of the ranking; then each beside the best, and it without each, over again."""
    known: dict[frozenset[int], tuple[float, list[int]]] = {}
    for start in starts:
        known.setdefault(frozenset(start[:most]), (loss_of(table, start[:most]), start[:most]))
    num_starts = len(known)

    def best() -> list[int]:
        return min(known.values(), key=lambda pair: pair[0])[1]

    def read(blocks: list[int]) -> None:
        if len(known) < num_starts + num_readings and len(blocks) <= most:
            known.setdefault(frozenset(blocks), (loss_of(table, blocks), blocks))

    for size in (2, 4, 8):
        if size <= len(ranking):
            read(ranking[:size])
    num_known = -1
    while most and num_known < len(known):
        num_known = len(known)
        for block in ranking:
            if block not in best():
                read([*best()[: most - 1], block])
        for block in best():
            read([other for other in best() if other != block])
    return best()


@given(num_tokens=st.integers(2, 70))
def test_the_halves_are_disjoint_and_complete(num_tokens: int) -> None:
    tokens = np.stack([np.arange(num_tokens), -np.arange(num_tokens)])
    choosing, scoring = choosing_half(tokens), scoring_half(tokens)
    assert not set(choosing[0]) & set(scoring[0])
    assert set(choosing[0]) | set(scoring[0]) == set(range(num_tokens))
    assert choosing.shape[1] - scoring.shape[1] in {0, 1}
    assert set(choosing[1]) == {-value for value in choosing[0]}


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
    choice = choose(candidates, range(len(blocks)), ids, 4, 8)
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
    choice = choose(candidates, [], byte_tokens(20, 1), 4, 8)
    assert (choice.greedy, choice.sequential, choice.pool, len(choice.single_gains)) == ([], [], [], 0)
