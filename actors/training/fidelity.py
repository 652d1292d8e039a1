"""What was measured on validation windows, over all workers; and which checkpoint is best by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from actors.training.checkpoints import Checkpoints
from models.training.distillation import Fidelity

BY_TAIL = ("full", "own", "shuffled", "mean_gist")
OVER_ALL = ("repeat_own", "repeat_shuffled", "node_content")


class FidelityTable:
    """A row for each pair of validation windows, filled by whoever measured it.

    Two runs that are compared pair by pair differ far less by chance than their means do.
    """

    def __init__(self, num_pairs: int, num_groups: int, device: torch.device) -> None:
        """Args: `device` is one whose tensors the process group can add up."""
        self._counts = torch.zeros(num_pairs, num_groups, dtype=torch.float64, device=device)
        self._sums = torch.zeros(len(BY_TAIL), num_pairs, num_groups, dtype=torch.float64, device=device)
        self._others = torch.zeros(2, num_pairs, len(OVER_ALL), dtype=torch.float64, device=device)  # weights, and sums

    def add(self, pair: int, found: Fidelity) -> None:
        """What was found in a pair of windows of equal length."""
        counts = self._counts.new_tensor(found.num_tokens)
        self._counts[pair] = counts
        for number, name in enumerate(BY_TAIL):
            self._sums[number, pair] = self._counts.new_tensor(getattr(found, name)).nan_to_num() * counts
        weights = self._others.new_tensor([1, 1, found.num_behind_nodes])
        values = self._others.new_tensor([getattr(found, name) for name in OVER_ALL])
        self._others[:, pair] = torch.stack((weights, values.nan_to_num() * weights))

    def gather(self) -> None:
        """Put all workers' rows together; all must come."""
        for values in (self._counts, self._sums, self._others):
            dist.all_reduce(values)

    def means(self) -> dict[str, Any]:
        """Over all windows; what no token was asked for is left out."""
        counts = self._counts.sum(dim=0)
        # Of few windows no token may have the longest tails; 0 / 0 would be in every mean over all tails.
        means = (self._sums.sum(dim=1) / counts.clamp(min=1)).tolist()
        weights, sums = self._others.sum(dim=1).tolist()
        others = {name: sums[i] / weights[i] for i, name in enumerate(OVER_ALL) if weights[i]}
        return {"num_tokens": counts.tolist(), **dict(zip(BY_TAIL, means, strict=True)), **others}

    def rows(self) -> dict[str, Any]:
        """Of every pair: tokens by tail, and means over them."""
        means = (self._sums / self._counts.clamp(min=1)).tolist()
        return {"num_tokens": self._counts.tolist(), **dict(zip(BY_TAIL, means, strict=True))}


def best_step(checkpoints: Checkpoints, *, by_repeating: bool = False) -> int | None:
    """The checkpoint whose gists cost least on validation text; None before any was measured.

    By the NLL of what is predicted behind gists, over all tails, or by that of blocks that are said again.
    """
    found = {}
    for step in checkpoints.steps():
        measured = checkpoints.facts(step)["fidelity"]
        if measured is not None and measured["step"] == step:
            behind = float(np.average(measured["own"], weights=measured["num_tokens"]))
            found[step] = measured["repeat_own"] if by_repeating else behind
    return min(found, key=lambda step: found[step]) if found else None
