"""Which blocks to show beside the tail, when showing them means reading again what comes after them.

Reading again costs by the row, and how much depends on the earliest edit only: everything behind it is read anyway.
So for each cut, blocks before it stay as they are and those behind it are chosen freely; the best cut wins. One
sweep from the newest block back gives the exact optimum of every cut (`optimal`, a knapsack by dynamic programming:
n blocks in r rows of room take n·r steps), another the choice by score a row (`greedy`, n·log(n) steps).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from jaxtyping import Bool, Float64, Int64

Strategy = Literal["greedy", "optimal", "stochastic"]


@dataclass(frozen=True, eq=False)
class Candidates:
    """Blocks that are shown or could be, each once, in any order."""

    block: Int64[np.ndarray, " n"]
    source: Int64[np.ndarray, " n"]
    score: Float64[np.ndarray, " n"]
    """What showing it is worth; what keeps it, if it is shown, included."""
    cost: Int64[np.ndarray, " n"]
    """Rows it takes, at least 1."""
    rows_behind: Int64[np.ndarray, " n"]
    """Rows that must be read again where its being shown changes; no more for a later block than for an earlier one."""
    shown: Bool[np.ndarray, " n"]

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, float, int, int, bool]]) -> Self:
        """From `(block, source, score, cost, rows behind, shown)` each."""
        columns = zip(*rows, strict=True) if rows else ((),) * 6
        dtypes = (np.int64, np.int64, np.float64, np.int64, np.int64, np.bool_)
        return cls(*(np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)))

    def __len__(self) -> int:
        """n."""
        return len(self.block)

    def part(self, positions: np.ndarray) -> Self:
        """Those at some positions."""
        columns = (self.block, self.source, self.score, self.cost, self.rows_behind, self.shown)
        return type(self)(*(column[positions] for column in columns))


@dataclass(frozen=True, eq=False)
class Selection:
    """What a strategy decided."""

    chosen: Int64[np.ndarray, " chosen"]
    """Positions among the candidates, in timeline order."""
    value: float
    """Scores of the chosen less the price of the rows read again."""
    rows_read: int


def select(
    candidates: Candidates,
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
        candidates: what can be chosen.
        room: rows the chosen may take.
        row_price: of a row read again, in units of score.
        forced_rows: rows that are read again in any case.
        strategy: `stochastic` is `greedy` on scores with Gumbel noise, which draws blocks as a softmax of their scores
            over `exploration` would, without replacement.
        exploration: scale of that noise.
        rng: where it comes from.

    Returns:
        The selection of the highest value; of equal ones that which reads less again. Candidates of no positive score
        are never added, and given up where their place can change for nothing.
    """
    order = np.lexsort((candidates.block, candidates.source))
    if strategy == "stochastic" and len(candidates):
        noise = exploration * (rng or np.random.default_rng()).gumbel(size=len(candidates))
        candidates = replace(candidates, score=candidates.score + noise)
    items = candidates.part(order)
    # What stays before each cut.
    kept_cost = np.concatenate([[0], np.cumsum(np.where(items.shown, items.cost, 0))])
    kept_score = np.concatenate([[0.0], np.cumsum(np.where(items.shown, items.score, 0.0))])
    free = (_Optimum if strategy == "optimal" else _Greedy)(items, room - kept_cost)

    rows = np.maximum(forced_rows, np.append(items.rows_behind, 0))
    values = kept_score + free.values - row_price * rows
    # Later cuts read less, so of equal values the last.
    cut = len(values) - 1 - int(np.argmax((values >= values.max() - 1e-12)[::-1]))
    kept = np.flatnonzero(items.shown[:cut]).tolist()
    chosen = kept + free.chosen(cut)
    value = float(items.score[chosen].sum()) - row_price * int(rows[cut])
    return Selection(order[chosen], value, int(rows[cut]))


class _Optimum:
    """For every cut what the best of the items behind it within their room is worth, and which they are: one step an
    item and row of room, from the newest item back."""

    def __init__(self, items: Candidates, room: Int64[np.ndarray, " n_plus_1"]) -> None:
        self._cost = items.cost.tolist()
        self._room = room
        self.values = np.where(room >= 0, 0.0, -np.inf)
        whole = max(0, int(room[0]))
        best = np.zeros(whole + 1)
        self._taken = np.zeros((len(items), whole + 1), bool)
        for i in range(len(items) - 1, -1, -1):
            cost = self._cost[i]
            if items.score[i] > 0 and cost <= whole:
                with_it = best[: whole + 1 - cost] + items.score[i]
                self._taken[i, cost:] = with_it > best[cost:]
                best[cost:] = np.maximum(best[cost:], with_it)
            if room[i] >= 0:
                self.values[i] = best[room[i]]

    def chosen(self, cut: int) -> list[int]:
        found, room = [], int(self._room[cut])
        for i in range(cut, len(self._cost)):
            if self._taken[i, room]:
                found.append(i)
                room -= self._cost[i]
        return found


class _Greedy:
    """The same by score a row: for all cuts in n·log(n) steps, from the newest item back, as if the first that does not
    fit were the last; those chosen in the end may fill what such a one leaves."""

    def __init__(self, items: Candidates, room: Int64[np.ndarray, " n_plus_1"]) -> None:
        self._cost = items.cost.tolist()
        self._room = room
        density = items.score / np.maximum(items.cost, 1)
        order = np.lexsort((-np.arange(len(items)), -density))
        self._order = order[items.score[order] > 0].tolist()
        self.values = np.where(room >= 0, 0.0, -np.inf)
        scores, densities = items.score.tolist(), density.tolist()
        taken: list[tuple[float, int]] = []  # the worst first
        left: list[tuple[float, int]] = []  # the best first
        cost, value = 0, 0.0
        for i, capacity in reversed(list(enumerate(room[:-1].tolist()))):
            if scores[i] > 0:
                heapq.heappush(taken, (densities[i], i))
                cost, value = cost + self._cost[i], value + scores[i]
            while taken and cost > capacity:
                worst, j = heapq.heappop(taken)
                heapq.heappush(left, (-worst, j))
                cost, value = cost - self._cost[j], value - scores[j]
            # Room grows where what was kept becomes free: for what was left, before it is for what is worth less.
            while left:
                worth, j = -left[0][0], left[0][1]
                if cost + self._cost[j] > capacity:
                    if not taken or taken[0][0] >= worth:
                        break
                    worst, k = taken[0]
                    if cost + self._cost[j] - self._cost[k] > capacity:
                        break
                    heapq.heapreplace(left, (-worst, k))
                    heapq.heapreplace(taken, (worth, j))
                    cost, value = cost + self._cost[j] - self._cost[k], value + scores[j] - scores[k]
                    continue
                heapq.heappop(left)
                heapq.heappush(taken, (worth, j))
                cost, value = cost + self._cost[j], value + scores[j]
            if capacity >= 0:
                self.values[i] = value

    def chosen(self, cut: int) -> list[int]:
        found, room = [], int(self._room[cut])
        for i in self._order:
            if i >= cut and self._cost[i] <= room:
                found.append(i)
                room -= self._cost[i]
        return sorted(found)
