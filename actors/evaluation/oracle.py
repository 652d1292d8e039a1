"""The oracle: which blocks a history should have been shown in detail, by measuring what each is worth.

It chooses on one half of the horizon's tokens and is scored on the other (split-half), so that it cannot win by
fitting noise. It chooses from a shortlist. `greedy` ranks blocks by what each is worth alone; `sequential` chooses
the next block given those chosen already.

Sequential choices are lazy (Minoux 1978, "Accelerated greedy algorithms"): a block is measured again, given what was
chosen, only while what it was last known to be worth could still make it the next. Exact where blocks are worth less
the more others are shown; where two blocks are worth more together, the second may be overlooked.

Blocks whose caches are joined have not been read together. That finds a needle; of the hundredths of a nat that blocks
of natural text are worth it finds little (correlation with exact readings 0.3 to 0.8, of four places). So where whole
Working Contexts are compared, `climb` goes on by exact readings from the best of what every rival chose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32

from actors.evaluation.scorer import CandidateScorer

MEASURED_AT_A_TIME = 4
"""Candidates that are measured again together: one batch of the model."""


@dataclass(frozen=True)
class OracleChoice:
    """Positions among the candidates, the best first."""

    greedy: list[int] = field(default_factory=list)
    """All that could be chosen, by what each is worth alone."""
    sequential: list[int] = field(default_factory=list)
    """As many as helped, in the order they were chosen."""
    pool: list[int] = field(default_factory=list)
    """All that could be chosen, as they were given."""
    base: Float32[np.ndarray, " n-1"] = field(default_factory=lambda: np.empty(0, np.float32))
    """NLL of every token with nothing chosen, nats."""
    alone: Float32[np.ndarray, "pool n-1"] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """NLL of every token with each of `pool` alone."""
    single_gains: Float32[np.ndarray, " pool"] = field(default_factory=lambda: np.empty(0, np.float32))
    """NLL without a block minus NLL with it alone, on the tokens that are chosen on, nats a token."""

    def gain(self, candidate: int) -> float:
        """What one is worth alone."""
        return float(self.single_gains[self.pool.index(candidate)])


def choosing_half(nll: np.ndarray) -> np.ndarray:
    """The tokens the oracle chooses on: every other one, from the first."""
    return nll[..., 0::2]


def scoring_half(nll: np.ndarray) -> np.ndarray:
    """The tokens it is scored on: the others."""
    return nll[..., 1::2]


def choose(
    candidates: CandidateScorer,
    pool: Sequence[int],
    ids: np.ndarray,
    max_chosen: int,
    pool_size: int,
    chosen_on: Callable[[np.ndarray], np.ndarray] = choosing_half,
) -> OracleChoice:
    """Choose blocks by their effect on the choosing half of `ids[1:]`.

    Args:
        candidates: contents with nothing chosen, and the blocks that were read.
        pool: positions of those that may be chosen.
        ids: the horizon.
        max_chosen: blocks that can be afforded.
        pool_size: after the first measurement only the best so many go on.
        chosen_on: takes the tokens that are chosen on, from `(…, n - 1)` NLL of `ids[1:]`.
    """
    if not pool:
        return OracleChoice()
    base = candidates.nll([], ids)
    alone = candidates.nll_with_each([], [(c,) for c in pool], ids)
    current = float(chosen_on(base).mean())
    gains = (current - chosen_on(alone).mean(axis=1)).astype(np.float32)
    greedy = [pool[i] for i in np.argsort(-gains, kind="stable").tolist()]

    def measured(chosen: Sequence[int], blocks: Sequence[int]) -> np.ndarray:
        return current - chosen_on(candidates.nll_with_each(chosen, [(c,) for c in blocks], ids)).mean(axis=1)

    known = dict(zip(pool, gains.tolist(), strict=True))
    left = {block: known[block] for block in greedy[:pool_size]}
    chosen: list[int] = []
    while left and len(chosen) < max_chosen:
        best, gain = _best(left) if not chosen else _best_again(left, lambda part: measured(chosen, part))
        if gain <= 0:
            break
        chosen.append(best)
        current -= gain
        del left[best]
    return OracleChoice(greedy, chosen, list(pool), base, alone, gains)


def _best(gains: Mapping[int, float]) -> tuple[int, float]:
    return max(gains.items(), key=lambda pair: pair[1])


def _best_again(left: dict[int, float], measure: Callable[[Sequence[int]], np.ndarray]) -> tuple[int, float]:
    """The best of `left` by what it is worth now; `left` keeps what was learned."""
    fresh: dict[int, float] = {}
    while True:
        worth = max(0.0, max(fresh.values(), default=0.0))
        stale = [block for block in sorted(left, key=lambda b: -left[b]) if block not in fresh and left[block] > worth]
        if not stale:
            return _best(fresh) if fresh else _best(left)
        part = stale[:MEASURED_AT_A_TIME]
        fresh.update(zip(part, measure(part).tolist(), strict=True))
        left.update(fresh)


@dataclass(frozen=True)
class Step:
    """A better choice than all that were read before."""

    num_readings: int
    """Readings besides the starts when it was found; 0: it is a start."""
    blocks: list[int]
    """In the order the choice came together."""
    nll: Float32[np.ndarray, " n-1"]
    """Of every token of the horizon, as measured, nats."""


def climb(
    measure: Callable[[Sequence[int]], np.ndarray],
    starts: Sequence[Sequence[int]],
    ranking: Sequence[int],
    max_chosen: int,
    num_readings: int,
    chosen_on: Callable[[np.ndarray], np.ndarray] = choosing_half,
) -> list[Step]:
    """Choose blocks by exact readings: the best start, then one block after another that makes it better.

    Args:
        measure: NLL of every token of the horizon after what shows some blocks.
        starts: what others chose; never more is lost on the tokens that are chosen on than by the best of them.
        ranking: blocks to be tried, the most promising first: the first 2, 4, 8, ... together, then each beside the
            best choice so far (in its last one's place where it is full), then that choice without each of its blocks;
            and again, until no such change makes it better.
        max_chosen: blocks of a choice.
        num_readings: measurements besides the starts.
        chosen_on: takes the tokens that are chosen on.

    Returns:
        What was better than all before, one after the other; the last is the choice. Empty without starts and readings.
    """
    lowest, best, left = float("inf"), list[int](), num_readings
    steps: list[Step] = []
    tried: set[frozenset[int]] = set()

    def read(blocks: Sequence[int], cost: int = 1) -> None:
        """Measure a choice, unless it was or nothing is left to pay for it."""
        nonlocal lowest, best, left
        if frozenset(blocks) in tried or cost > left:
            return
        tried.add(frozenset(blocks))
        left -= cost
        nll = measure(blocks)
        loss = float(chosen_on(nll).mean())
        if loss < lowest:
            lowest, best = loss, list(blocks)
            steps.append(Step(num_readings - left, best, nll))

    for start in starts:
        read(start[:max_chosen], cost=0)
    size = 2
    while size <= min(max_chosen, len(ranking)):
        read(ranking[:size])
        size *= 2
    num_tried = -1
    while max_chosen and num_tried < len(tried):  # until every change of one block was read
        num_tried = len(tried)
        for block in ranking:
            if block not in best:
                read([*best[: max_chosen - 1], block])
        for block in best.copy():
            read([other for other in best if other != block])
    return steps
