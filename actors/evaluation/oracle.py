"""The oracle: which blocks a history should have been shown in detail, by measuring what each is worth.

It chooses on one half of the horizon's tokens and is scored on the other (split-half), so that it cannot win by
fitting noise. It chooses from a shortlist. `greedy` ranks blocks by what each is worth alone; `sequential` chooses
the next block given those chosen already.

Sequential choices are lazy (Minoux 1978, "Accelerated greedy algorithms"): a block is measured again, given what was
chosen, only while what it was last known to be worth could still make it the next. Exact where blocks are worth less
the more others are shown; where two blocks are worth more together, the second may be overlooked.
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
