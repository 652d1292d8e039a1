"""Where a training step's time goes, stage by stage."""

from __future__ import annotations

import time

import torch


class StageClock:
    """Laps of one step after the other. On CUDA the stages are timed on the device: no lap waits for it.

    Stages that are lapped several times a step are added up.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._laps: list[tuple[str, float | torch.cuda.Event]] = []
        self.restart()

    def restart(self) -> None:
        """A step begins."""
        self._laps = [("", self._now())]

    def lap(self, stage: str) -> None:
        """Everything since the last lap was this stage."""
        self._laps.append((stage, self._now()))

    def seconds(self) -> dict[str, float]:
        """Of every stage since the step began; on CUDA waits for the device."""
        if self._on_cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (_, before), (stage, after) in zip(self._laps[:-1], self._laps[1:], strict=True):
            found[stage] = found.get(stage, 0.0) + _between(before, after)
        return found

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
        return before.elapsed_time(after) / 1e3
    assert isinstance(before, float)
    assert isinstance(after, float)
    return after - before
