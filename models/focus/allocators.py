"""Allocators: from a history, a budget and what retrieval found to a Working Context. Pure functions of their input.

All leave the rest of the history to the coarsest gists there are, and spend what is over on recent raw tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from models.focus.filling import Filling, expand_evenly, show_newest, show_ranked
from models.focus.history import History
from models.focus.working_context import DEFAULT_MODE, Mode, WorkingContext

RankedBlocks = Sequence[tuple[int, int]]
"""Blocks as `(block, source)`, the best first."""

FUSION_CONSTANT = 60.0
"""k of reciprocal rank fusion: Cormack, Clarke and Büttcher 2009."""


@dataclass(frozen=True)
class FocusRequest:
    """What an allocator is asked."""

    histories: Sequence[History]
    budget: int
    """W_max, in vectors."""
    mode: Mode = DEFAULT_MODE
    ranked: RankedBlocks = ()
    """What retrieval, or a measurement, found; ignored by those that do not look."""


class Allocator(Protocol):
    """Decides what a Working Context shows in detail."""

    def allocate(self, request: FocusRequest) -> WorkingContext:
        """A legal Working Context within the budget.

        Raises:
            BudgetError: the budget cannot hold the history; the message names the smallest that can.
        """
        ...


@dataclass(frozen=True)
class Recency:
    """Raw tokens from the newest back, as many as fit."""

    def allocate(self, request: FocusRequest) -> WorkingContext:
        """As `Allocator.allocate`."""
        filling = Filling(request.mode, request.budget, request.histories)
        show_newest(filling)
        return filling.finish()


@dataclass(frozen=True)
class Uniform:
    """The same level of detail everywhere, as fine as the budget allows; what is over refines the newest part."""

    tail_tokens: int = 0
    """Newest tokens that are raw whatever the rest is."""

    def allocate(self, request: FocusRequest) -> WorkingContext:
        """As `Allocator.allocate`."""
        filling = Filling(request.mode, request.budget, request.histories)
        show_newest(filling, self.tail_tokens)
        expand_evenly(filling)
        return filling.finish()


@dataclass(frozen=True)
class Ranked:
    """A raw tail, then what was found, then more tail: the shape of bm25, dense, fusion and oracle alike."""

    tail_tokens: int
    """Newest tokens that are raw before anything found is."""
    max_blocks: int | None = None
    """Blocks of what was found; None for as many as fit."""

    def allocate(self, request: FocusRequest) -> WorkingContext:
        """As `Allocator.allocate`."""
        filling = Filling(request.mode, request.budget, request.histories)
        show_newest(filling, self.tail_tokens)
        show_ranked(filling, request.ranked, self.max_blocks)
        show_newest(filling)
        return filling.finish()


def reciprocal_rank_fusion(rankings: Sequence[RankedBlocks], k: float = FUSION_CONSTANT) -> list[tuple[int, int]]:
    """Blocks by the sum of 1 / (k + rank) over the rankings that hold them (ranks from 1), the best first.

    Ties go to the newer block.
    """
    scores: dict[tuple[int, int], float] = {}
    for ranking in rankings:
        for rank, block in enumerate(ranking, start=1):
            scores[block] = scores.get(block, 0.0) + 1.0 / (k + rank)
    return sorted(scores, key=lambda block: (-scores[block], -block[1], -block[0]))


def ranked_by_score(scores: np.ndarray, first_block: int, source: int = 0, limit: int | None = None) -> RankedBlocks:
    """Blocks `first_block + i` by `scores[i]`, the best first; ties go to the newer block. -inf is left out."""
    scores = np.asarray(scores, np.float64)
    order = np.lexsort((-np.arange(len(scores)), -scores))
    order = order[np.isfinite(scores[order])][:limit]
    return [(first_block + int(position), source) for position in order]
