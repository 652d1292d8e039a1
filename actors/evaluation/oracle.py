"""The oracle: which blocks a history should have been shown in detail, by measuring what each is worth.

It chooses on one half of the horizon's tokens and is scored on the other (split-half), so that it cannot win by
fitting noise. It chooses from a shortlist. `greedy` ranks blocks by what each is worth alone; `sequential` chooses
the next block given those chosen already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from actors.evaluation.scorer import CandidateScorer


@dataclass(frozen=True)
class OracleChoice:
    """Positions in the shortlist, the best first."""

    greedy: list[int]
    """All of the shortlist, by what each is worth alone."""
    sequential: list[int]
    """As many as helped, in the order they were chosen."""
    single_gains: Float32[np.ndarray, " shortlist"]
    """NLL without a block minus NLL with it alone, on the half that is chosen on, nats a token."""


def choosing_half(nll: np.ndarray) -> np.ndarray:
    """The tokens the oracle chooses on: every other one, from the first."""
    return nll[..., 0::2]


def scoring_half(nll: np.ndarray) -> np.ndarray:
    """The tokens it is scored on: the others."""
    return nll[..., 1::2]


def choose(
    candidates: CandidateScorer,
    num_blocks: int,
    ids: np.ndarray,
    max_chosen: int,
    pool_size: int,
    chosen_on: Callable[[np.ndarray], np.ndarray] = choosing_half,
) -> OracleChoice:
    """Choose blocks by their effect on the choosing half of `ids[1:]`.

    Args:
        candidates: contents with nothing chosen, and the shortlist.
        num_blocks: blocks of the shortlist.
        ids: the horizon.
        max_chosen: blocks that can be afforded.
        pool_size: after the first measurement only the best so many go on; each further step costs one forward pass
            over the horizon for each.
        chosen_on: takes the tokens that are chosen on, from `(…, n - 1)` NLL of `ids[1:]`.
    """
    if num_blocks == 0:
        return OracleChoice([], [], np.zeros(0, np.float32))

    def measured(chosen: Sequence[int], pool: Sequence[int]) -> np.ndarray:
        return chosen_on(candidates.nll_with_each(chosen, [(c,) for c in pool], ids)).mean(axis=1)

    current = float(chosen_on(candidates.nll([], ids)).mean())
    everyone = list(range(num_blocks))
    alone = measured([], everyone)
    gains = (current - alone).astype(np.float32)
    greedy = np.argsort(-gains, kind="stable").tolist()
    chosen: list[int] = []
    pool = greedy[:pool_size]
    found = alone[pool]
    while pool and len(chosen) < max_chosen:
        best = int(np.argmin(found))
        if found[best] >= current:
            break
        current = float(found[best])
        chosen.append(pool.pop(best))
        if pool and len(chosen) < max_chosen:
            found = measured(chosen, pool)
    return OracleChoice(greedy, chosen, gains)
