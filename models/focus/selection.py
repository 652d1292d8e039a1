"""Which blocks to show beside the tail, when showing them means reading again what comes after them.

Reading again costs by the row, and how much depends on the earliest edit only: everything behind it is read anyway.
So for each cut, blocks before it stay as they are and those behind it are chosen freely; the best cut wins. One
sweep from the newest block back gives the exact optimum of every cut (`optimal`, a knapsack by dynamic programming);
`greedy` fills each cut by score a row.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Strategy = Literal["greedy", "optimal", "stochastic"]


@dataclass(frozen=True)
class Item:
    """A block that is shown or could be."""

    block: int
    source: int
    score: float
    """What showing it is worth; what keeps it, if it is shown, included."""
    cost: int
    """Rows it takes, at least 1."""
    rows_behind: int
    """Rows that must be read again where its being shown changes."""
    shown: bool = False


@dataclass(frozen=True)
class Selection:
    """What a strategy decided."""

    chosen: tuple[Item, ...]
    """In timeline order."""
    value: float
    """Scores of the chosen less the price of the rows read again."""
    rows_read: int


def select(
    items: Sequence[Item],
    room: int,
    *,
    row_price: float,
    forced_rows: int = 0,
    strategy: Strategy = "greedy",
    exploration: float = 0.0,
    rng: np.random.Generator | None = None,
) -> Selection:
    """The best choice within a room.

    Args:
        items: each block once.
        room: rows the chosen may take.
        row_price: of a row read again, in units of score.
        forced_rows: rows that are read again in any case.
        strategy: `stochastic` is `greedy` on scores with Gumbel noise, which draws blocks as a softmax of their scores
            over `exploration` would, without replacement.
        exploration: scale of that noise.
        rng: where it comes from.

    Returns:
        The selection of the highest value; of equal ones that which reads less again. Items of no positive score are
        never added, and given up where their place can change for nothing.
    """
    ordered = sorted(items, key=lambda item: (item.source, item.block))
    scores = np.array([item.score for item in ordered], np.float64)
    if strategy == "stochastic" and len(ordered):
        scores = scores + exploration * (rng or np.random.default_rng()).gumbel(size=len(ordered))
    ordered, scores = _undominated(ordered, scores, room)
    behind = _OptimumBehind.of if strategy == "optimal" else _GreedyBehind
    free = behind(ordered, scores, room)

    best: tuple[float, int, list[int]] | None = None
    kept: list[int] = []
    kept_cost, kept_score = 0, 0.0
    for cut in range(len(ordered) + 1):
        if kept_cost > room:
            break
        rows = max(forced_rows, ordered[cut].rows_behind if cut < len(ordered) else 0)
        chosen = free.chosen(cut, room - kept_cost)
        value = kept_score + float(scores[chosen].sum()) - row_price * rows
        # Later cuts read less, so of equal values the last.
        if best is None or value >= best[0] - 1e-12:
            best = (value, rows, kept + chosen)
        if cut < len(ordered) and ordered[cut].shown:
            kept.append(cut)
            kept_cost += ordered[cut].cost
            kept_score += float(scores[cut])
    assert best is not None  # the first cut keeps nothing, and fits
    return Selection(tuple(ordered[i] for i in best[2]), best[0], best[1])


def _undominated(items: list[Item], scores: np.ndarray, room: int) -> tuple[list[Item], np.ndarray]:
    """Without items that no optimum of any cut holds: what is not shown, and behind which stand as many better ones of
    no more cost as there is room for. Of n items of one cost about m·ln(n/m) stay for m places."""
    if not items:
        return items, scores
    dearest = max(item.cost for item in items)
    places = room // max(1, min(item.cost for item in items))
    better: list[float] = []  # the best scores behind, at most `places`
    stays = np.zeros(len(items), bool)
    for i in range(len(items) - 1, -1, -1):
        beaten = len(better) >= places and (not better or scores[i] <= better[0])
        stays[i] = items[i].shown or (scores[i] > 0 and not (beaten and items[i].cost == dearest))
        if scores[i] > 0 and places:
            (heapq.heappushpop if len(better) >= places else heapq.heappush)(better, float(scores[i]))
    kept = np.flatnonzero(stays)
    return [items[i] for i in kept], scores[kept]


class _GreedyBehind:
    """By score a row, the newer first."""

    def __init__(self, items: Sequence[Item], scores: np.ndarray, room: int) -> None:
        del room  # what is left of it comes with every cut
        self._cost = [item.cost for item in items]
        density = scores / np.maximum(np.array(self._cost, np.float64), 1.0)
        order = np.lexsort((-np.arange(len(items)), -density))
        self._order = [int(i) for i in order if scores[i] > 0]

    def chosen(self, cut: int, room: int) -> list[int]:
        found = []
        for i in self._order:
            if i >= cut and self._cost[i] <= room:
                found.append(i)
                room -= self._cost[i]
        return sorted(found)


class _OptimumBehind:
    """Of a table: `taken[i, w]` says whether the best of items `i, i + 1, …` within w rows holds item i."""

    def __init__(self, costs: list[int], taken: np.ndarray) -> None:
        self._costs = costs
        self._taken = taken

    @classmethod
    def of(cls, items: Sequence[Item], scores: np.ndarray, room: int) -> _OptimumBehind:
        """For every cut and every room up to this one: n·room steps."""
        best = np.zeros(room + 1)
        taken = np.zeros((len(items), room + 1), bool)
        for i in range(len(items) - 1, -1, -1):
            cost = items[i].cost
            if scores[i] <= 0 or cost > room:
                continue
            with_it = best[: room + 1 - cost] + scores[i]
            taken[i, cost:] = with_it > best[cost:]
            best[cost:] = np.maximum(best[cost:], with_it)
        return cls([item.cost for item in items], taken)

    def chosen(self, cut: int, room: int) -> list[int]:
        found = []
        for i in range(cut, len(self._costs)):
            if self._taken[i, room]:
                found.append(i)
                room -= self._costs[i]
        return found
