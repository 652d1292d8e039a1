"""What every benchmark shares: its setting, its result, interleaved timing, and ratios with their spread."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cluster.config import BaseLMConfig
from cluster.errors import MegaContextError

T = TypeVar("T")

NUM_SPREAD_BLOCKS = 5
"""Parts a long run of timings is cut into; their ratios' smallest and largest are the spread."""


class BenchmarkError(MegaContextError):
    """A measurement that would compare different things, or a measured process that was lost."""


@dataclass(frozen=True)
class Setting:
    """How large, and where."""

    quick: bool
    """Small sizes and the tiny model: shows that the program works. Its ratios mean nothing."""

    cache: Path
    """Corpora are kept here, and everything that is written for a measurement is made and removed here: on the
    disk that stores use."""

    def size(self, full: T, quick: T) -> T:
        """The value for this setting."""
        return quick if self.quick else full

    @property
    def base_lm(self) -> BaseLMConfig:
        """The real language model, or the tiny one."""
        if self.quick:
            return BaseLMConfig(source="tiny", dtype="float32", device="cpu", cache_dir=self.cache / "models")
        return BaseLMConfig(device="cpu")

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder that is removed afterwards."""
        self.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="run-", dir=self.cache) as folder:
            yield Path(folder)


@dataclass(frozen=True)
class Result:
    """What a benchmark found: subject over rival."""

    value: float
    spread: tuple[float, float]
    """Smallest and largest ratio of the repeats."""
    repeats: str
    """What a repeat was."""
    detail: Mapping[str, Any] = field(default_factory=dict)
    """Absolute numbers behind the ratio, units in their names."""

    @classmethod
    def of_repeats(cls, ratios: Sequence[float], repeats: str, detail: Mapping[str, Any]) -> Result:
        """The median of repeats and their extremes."""
        return cls(float(np.median(ratios)), (float(min(ratios)), float(max(ratios))), repeats, detail)


def say(text: str) -> None:
    """A line of progress; standard output holds the table alone."""
    print(text, file=sys.stderr, flush=True)


def time_each(call: Callable[[T], object], arguments: Sequence[T]) -> np.ndarray:
    """Seconds of `call(argument)` for each argument, `(len(arguments),)` float64."""
    clock = time.perf_counter_ns
    seconds = np.empty(len(arguments))
    for position, argument in enumerate(arguments):
        started = clock()
        call(argument)
        seconds[position] = clock() - started
    return seconds / 1e9


def time_in_turns(calls: Mapping[str, Callable[[int], object]], rounds: int, warm_up: int) -> dict[str, np.ndarray]:
    """Seconds of every call in every round, `(rounds,)` each; in a round each is called once, with the round's number.

    The order turns from round to round, so that nobody always follows the same neighbour. The first `warm_up` rounds
    are not kept.
    """
    names = list(calls)
    seconds = {name: np.empty(rounds + warm_up) for name in names}
    for number in range(rounds + warm_up):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name][number] = time_each(calls[name], [number])[0]
    return {name: taken[warm_up:] for name, taken in seconds.items()}


def median_ratio(subject: np.ndarray, rival: np.ndarray, unit: str, detail: Mapping[str, Any]) -> Result:
    """Ratio of the medians of consecutive parts of a run: what slows the machine for a while slows both sides."""
    parts = zip(np.array_split(subject, NUM_SPREAD_BLOCKS), np.array_split(rival, NUM_SPREAD_BLOCKS), strict=True)
    ratios = [float(np.median(mine) / np.median(theirs)) for mine, theirs in parts if len(mine) and len(theirs)]
    return Result.of_repeats(ratios, f"{len(ratios)} parts of {len(subject)} {unit}", detail)


def percentiles(seconds: np.ndarray, scale: float, unit: str) -> dict[str, float]:
    """p50 and p99 of timings in another unit, for a benchmark's detail."""
    return {f"p{q}_{unit}": round(float(np.percentile(seconds, q) * scale), 4) for q in (50, 99)}
