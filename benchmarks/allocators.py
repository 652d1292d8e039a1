"""How near greedy comes to the optimum of a refocus, and how long every strategy takes.

Items are drawn as sessions meet them: few blocks are worth much, most little; some are short; a few are shown already,
with their bonus; what must be read again grows with how early a block stands. The value compared is what the scores of
the chosen come to, less the price of what is read again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import BenchmarkError, Result, Setting, percentiles, time_in_turns
from cluster.config import TOKENS_PER_BLOCK as K
from models.focus.selection import Candidates, Strategy, select

ROOMS = (6 * K, 24 * K, 96 * K)
"""Rows that may be chosen: of budgets of 512, 2,048 and 8,192."""

STRATEGIES: tuple[Strategy, ...] = ("greedy", "optimal", "stochastic")
KEEP_BONUS, ROW_PRICE, HELD_SHARE, SHORT_SHARE = 0.15, 0.001, 0.5, 0.1


def allocators(setting: Setting) -> Result:
    """The optimum's value over greedy's, the worst mean over sizes and rooms; times of all at every size."""
    sizes = setting.size((1024, 8192, 65_536), (64, 256))
    cases = setting.size(100, 5)
    rounds, warm_up = setting.size((20, 2), (2, 1))
    detail: dict[str, Any] = {"cases": cases}
    means: list[float] = []
    for size in sizes:
        for room in ROOMS:
            ratios = []
            for seed in range(cases):
                items = draw_items(np.random.default_rng([seed, size, room]), size, room)
                greedy, optimal = (
                    select(items, room, row_price=ROW_PRICE, strategy=strategy).value
                    for strategy in ("greedy", "optimal")
                )
                if optimal < greedy - 1e-9:
                    raise BenchmarkError(f"the optimum of {size} items in {room} rows is worse than greedy's choice")
                # Both are compared with what keeping everything as it is would come to, 0 or more.
                ratios.append(optimal / greedy if greedy > 0 else 1.0)
            means.append(float(np.mean(ratios)))
            detail[f"optimum_over_greedy_{size}_{room}"] = {
                "mean": round(float(np.mean(ratios)), 5),
                "worst": round(float(np.max(ratios)), 5),
            }
        seconds = time_in_turns(
            _strategies(draw_items(np.random.default_rng([0, size]), size, ROOMS[0])), rounds, warm_up
        )
        detail[f"ms_{size}"] = {name: percentiles(taken, 1e3, "ms")["p50_ms"] for name, taken in seconds.items()}
    return Result(max(means), (min(means), max(means)), f"{len(means)} sizes and rooms of {cases} cases", detail)


def _strategies(items: Candidates) -> dict[str, Callable[[int], object]]:
    def call(strategy: Strategy) -> Callable[[int], object]:
        return lambda number: select(
            items,
            ROOMS[0],
            row_price=ROW_PRICE,
            strategy=strategy,
            exploration=0.1,
            rng=np.random.default_rng(number),
        )

    return {strategy: call(strategy) for strategy in STRATEGIES}


def draw_items(rng: np.random.Generator, size: int, room: int) -> Candidates:
    """Blocks of one history, oldest first."""
    scores = rng.pareto(3.0, size) * 0.1
    costs = np.where(rng.random(size) < SHORT_SHARE, rng.integers(1, K, size), K)
    behind = np.sort(rng.integers(1, 16 * room, size))[::-1]
    held = np.zeros(size, bool)
    order = rng.permutation(size)
    fits = np.cumsum(costs[order]) <= HELD_SHARE * room
    held[order[fits]] = True
    return Candidates(
        np.arange(size), np.zeros(size, np.int64), scores + KEEP_BONUS * held, costs, behind.astype(np.int64), held
    )
