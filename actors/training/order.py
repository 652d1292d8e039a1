"""Which windows each step of a training run reads: a pure function of the seed and the step.

Every epoch is a permutation of all windows. A step takes the next `windows_per_step` of them and deals them out to
workers and forward passes. So the windows of a step are the same whatever the number of workers, and a run's position
in its data is its step: nothing is skipped or repeated when it goes on.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from cluster.errors import ConfigError


@dataclass(frozen=True)
class MicroBatch:
    """What one worker reads for one forward pass."""

    samples: Int64[np.ndarray, " n"]
    """Numbers of the samples since the run's beginning: they seed what is drawn at random for each."""
    windows: Int64[np.ndarray, " n"]
    """Which windows they are."""


@dataclass(frozen=True)
class ReadingOrder:
    """The order of a run.

    Raises:
        ConfigError: fewer windows than a step takes.
    """

    num_windows: int
    windows_per_step: int
    """Over all workers and micro-batches."""
    seed: int

    def __post_init__(self) -> None:
        if self.num_windows < self.windows_per_step:
            raise ConfigError(
                f"the corpus has {self.num_windows} windows and a step takes {self.windows_per_step}; give it more "
                "text, or lower training.windows_per_step"
            )

    def micro_batches(self, step: int, rank: int, num_workers: int, windows_per_pass: int) -> list[MicroBatch]:
        """What a worker reads in a step, a forward pass after the other.

        Args:
            step: from 0.
            rank: of the worker.
            num_workers: that share the step.
            windows_per_pass: windows of one forward pass of one worker.

        Raises:
            ConfigError: a step that cannot be dealt out evenly.
        """
        passes = num_passes(self.windows_per_step, num_workers, windows_per_pass)
        first = step * self.windows_per_step
        dealt = np.arange(first, first + self.windows_per_step).reshape(passes, num_workers, windows_per_pass)
        return [MicroBatch(samples, self._windows(samples)) for samples in dealt[:, rank]]

    def _windows(self, samples: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        epochs, places = np.divmod(samples, self.num_windows)
        found = [_permutation(self.num_windows, self.seed, epoch) for epoch in epochs.tolist()]
        return np.array([order[place] for order, place in zip(found, places.tolist(), strict=True)], np.int64)


def num_passes(windows_per_step: int, num_workers: int, windows_per_pass: int) -> int:
    """Forward passes of each worker in a step (gradient accumulation).

    Raises:
        ConfigError: a step that cannot be dealt out evenly.
    """
    at_once = num_workers * windows_per_pass
    if windows_per_step % at_once:
        raise ConfigError(
            f"training.windows_per_step={windows_per_step} must be a multiple of num_workers * windows_per_pass = "
            f"{num_workers} * {windows_per_pass}"
        )
    return windows_per_step // at_once


@functools.lru_cache(maxsize=2)
def _permutation(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_windows)
