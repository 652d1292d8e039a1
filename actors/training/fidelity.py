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


class FidelitySums:
    """Sums over windows and workers, by tail."""

    def __init__(self, num_groups: int, device: torch.device) -> None:
        """Args: `device` is one whose tensors the process group can add up."""
        self._counts = torch.zeros(num_groups, dtype=torch.float64, device=device)
        self._sums = torch.zeros(len(BY_TAIL), num_groups, dtype=torch.float64, device=device)
        self._others = torch.zeros(2, len(OVER_ALL), dtype=torch.float64, device=device)  # weights, and sums

    def add(self, found: Fidelity) -> None:
        """What was found in windows of equal length."""
        counts = self._counts.new_tensor(found.num_tokens)
        self._counts += counts
        for number, name in enumerate(BY_TAIL):
            self._sums[number] += self._counts.new_tensor(getattr(found, name)).nan_to_num() * counts
        weights = self._others.new_tensor([1, 1, found.num_behind_nodes])
        values = self._others.new_tensor([getattr(found, name) for name in OVER_ALL])
        self._others += torch.stack((weights, values.nan_to_num() * weights))

    def reduced(self) -> dict[str, Any]:
        """Means over all workers' windows; what no token was asked for is left out. All workers must come."""
        for sums in (self._counts, self._sums, self._others):
            dist.all_reduce(sums)
        # Of few windows no token may have the longest tails; 0 / 0 would be in every mean over all tails.
        means = (self._sums / self._counts.clamp(min=1)).tolist()
        weights, sums = self._others.tolist()
        others = {name: sums[i] / weights[i] for i, name in enumerate(OVER_ALL) if weights[i]}
        return {"num_tokens": self._counts.tolist(), **dict(zip(BY_TAIL, means, strict=True)), **others}


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
