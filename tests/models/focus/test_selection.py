"""`optimal` is the optimum of all cuts, and `greedy` is near it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.focus.selection import Candidates, Selection
from models.focus.selection import select as select_positions


class Item(NamedTuple):
    block: int
    source: int
    score: float
    cost: int
    rows_behind: int
    shown: bool = False


@dataclass(frozen=True)
class Chosen:
    """A selection by its items."""

    chosen: tuple[Item, ...]
    value: float


def select(items: Sequence[Item], room: int, **how: Any) -> Chosen:
    found: Selection = select_positions(Candidates.of(items), room, **how)
    return Chosen(tuple(items[i] for i in found.chosen.tolist()), found.value)


def value_of(items: Sequence[Item], chosen: Sequence[Item], row_price: float, forced_rows: int) -> float:
    changed = [item.rows_behind for item in items if item.shown != (item in chosen)]
    return sum(item.score for item in chosen) - row_price * max([forced_rows, *changed])


def brute_force(items: Sequence[Item], room: int, row_price: float, forced_rows: int) -> float:
    best = -np.inf
    for size in range(len(items) + 1):
        for chosen in itertools.combinations(items, size):
            if sum(item.cost for item in chosen) <= room:
                best = max(best, value_of(items, chosen, row_price, forced_rows))
    return float(best)


@st.composite
def cases(draw: st.DrawFn, most: int = 9) -> tuple[list[Item], int, float, int]:
    size = draw(st.integers(0, most))
    behind = sorted(draw(st.lists(st.integers(0, 500), min_size=size, max_size=size)), reverse=True)
    items = [
        Item(
            block,
            0,
            draw(st.floats(0, 2, width=16)),
            draw(st.sampled_from([32, 32, 32, 31, 20, 7])),
            behind[block],
            draw(st.booleans()),
        )
        for block in range(size)
    ]
    return items, draw(st.integers(0, 200)), draw(st.sampled_from([0.0, 0.001, 0.01])), draw(st.integers(0, 300))


def check(selection: Chosen, items: Sequence[Item], room: int, row_price: float, forced_rows: int) -> None:
    assert sum(item.cost for item in selection.chosen) <= room
    assert len(set(selection.chosen)) == len(selection.chosen)
    blocks = [item.block for item in selection.chosen]
    assert blocks == sorted(blocks)
    # What it says it is worth is a lower bound: a cut may turn out to change nothing.
    assert selection.value <= value_of(items, selection.chosen, row_price, forced_rows) + 1e-9


@given(cases())
@settings(deadline=None, max_examples=300)
def test_optimal_is_the_optimum_of_all_choices(case) -> None:
    items, room, row_price, forced_rows = case
    found = select(items, room, row_price=row_price, forced_rows=forced_rows, strategy="optimal")
    check(found, items, room, row_price, forced_rows)
    expected = brute_force(items, room, row_price, forced_rows)
    assert value_of(items, found.chosen, row_price, forced_rows) == pytest.approx(expected, abs=1e-9)


@given(cases())
@settings(deadline=None, max_examples=100)
def test_greedy_and_stochastic_are_legal(case) -> None:
    items, room, row_price, forced_rows = case
    check(select(items, room, row_price=row_price, forced_rows=forced_rows), items, room, row_price, forced_rows)
    drawn = select(items, room, row_price=0.0, strategy="stochastic", exploration=0.5, rng=np.random.default_rng(0))
    assert sum(item.cost for item in drawn.chosen) <= room


def test_greedy_is_the_optimum_where_blocks_cost_alike() -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        items = [Item(i, 0, float(s), 32, 1000 - i, bool(rng.random() < 0.1)) for i, s in enumerate(rng.random(300))]
        greedy = select(items, 192, row_price=0.001)
        optimal = select(items, 192, row_price=0.001, strategy="optimal")
        assert greedy.value == pytest.approx(optimal.value)


def test_edits_are_made_when_they_pay_for_what_is_read_again() -> None:
    held = Item(1, 0, 0.5, 32, 400, shown=True)
    better = Item(0, 0, 0.8, 32, 450)
    assert select([held, better], 32, row_price=0.0).chosen == (better,)
    assert select([held, better], 32, row_price=0.001).chosen == (held,)
    # Where all of it is read anyway, the edit is free.
    assert select([held, better], 32, row_price=0.001, forced_rows=450).chosen == (better,)


def test_noise_draws_blocks_as_a_softmax_of_their_scores() -> None:
    scores, scale = np.array([0.0001, 0.5, 1.0]), 0.7
    items = [Item(i, 0, float(score), 32, 0) for i, score in enumerate(scores)]
    counts = np.zeros(3)
    for seed in range(4000):
        rng = np.random.default_rng(seed)
        shifted = [Item(i.block, 0, i.score + 10, 32, 0) for i in items]
        chosen = select(shifted, 32, row_price=0.0, strategy="stochastic", exploration=scale, rng=rng).chosen
        counts[chosen[0].block] += 1
    expected = np.exp(scores / scale) / np.exp(scores / scale).sum()
    assert np.allclose(counts / counts.sum(), expected, atol=0.03)


def test_many_more_items_than_there_is_room_for() -> None:
    rng = np.random.default_rng(1)
    items = [Item(i, 0, float(score), 32, 70_000 - i) for i, score in enumerate(rng.random(64_000))]
    greedy, optimal = (select(items, 6 * 32, row_price=1e-5, strategy=strategy) for strategy in ("greedy", "optimal"))
    assert greedy.value == pytest.approx(optimal.value)
    best = sorted((item.score for item in items), reverse=True)[:6]
    free = select(items, 6 * 32, row_price=0.0)
    assert sorted((item.score for item in free.chosen), reverse=True) == pytest.approx(best)
