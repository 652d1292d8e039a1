"""Ray Data for training: each worker's windows in the order of the run, from any step on.

The dataset is one of steps, not of text: a row says which step it is, and a task that has the windows mapped reads what
the worker needs of them. So it streams whatever the corpus's size, begins at any step without reading what came before,
and hands every worker the same windows again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import DataIterator
from ray.train import DataConfig

from actors.training.order import ReadingOrder
from cluster.ray_data import stream_in_order
from storage.token_windows import TokenWindows

DATASET = "train"

FEED_CPUS = 0.05
"""Of the tasks that read windows: they copy 4 KB a window."""

STEPS_PER_BLOCK = 32


@dataclass(frozen=True)
class FeedSpec:
    """What every worker reads."""

    folder: Path
    order: ReadingOrder
    windows_per_pass: int
    num_steps: int
    """Of the whole run."""


@dataclass(frozen=True)
class FedBatch:
    """What one forward pass reads."""

    step: int
    samples: np.ndarray
    """(windows,) int64; see `order.MicroBatch`."""
    tokens: np.ndarray
    """(windows, tokens) uint32"""


class ReadSteps:
    """Ray Data task: the windows of one worker for some steps, a row a forward pass."""

    def __init__(self, spec: FeedSpec, rank: int, num_workers: int) -> None:
        self._spec = spec
        self._rank = rank
        self._num_workers = num_workers

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table a step."""
        spec = self._spec
        windows = _windows(spec.folder)
        for step in batch["step"].to_pylist():
            passes = spec.order.micro_batches(step, self._rank, self._num_workers, spec.windows_per_pass)
            columns = {
                "step": pa.array([step] * len(passes), pa.int64()),
                "samples": pa.array([p.samples.tobytes() for p in passes], pa.large_binary()),
                "tokens": pa.array([windows.read(p.windows).tobytes() for p in passes], pa.large_binary()),
            }
            yield pa.table(columns)


@functools.lru_cache(maxsize=2)
def _windows(folder: Path) -> TokenWindows:
    return TokenWindows(folder)


def steps_dataset(spec: FeedSpec, first_step: int, rank: int, num_workers: int) -> ray.data.Dataset:
    """What a worker reads from a step to the run's end."""
    steps = [{"step": step} for step in range(first_step, spec.num_steps)]
    stream_in_order(resting=True)
    return ray.data.from_items(steps, override_num_blocks=-(-len(steps) // STEPS_PER_BLOCK)).map_batches(
        ReadSteps(spec, rank, num_workers),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=FEED_CPUS,
        zero_copy_batch=True,
    )


class StepsConfig(DataConfig):
    """Gives every worker a dataset of its own, from the newest checkpoint's step on.

    `streaming_split`, Ray's own way, deals blocks out to whoever asks first, and begins anew after every failure.
    """

    def __init__(self, spec: FeedSpec, checkpoints: Any) -> None:
        """Args: `checkpoints` has `newest_step()`, asked whenever workers are started."""
        super().__init__()
        self._spec = spec
        self._checkpoints = checkpoints

    def configure(self, datasets: Any, world_size: int, *_args: Any, **_options: Any) -> list[dict[str, DataIterator]]:
        """One iterator a worker."""
        del datasets
        first = self._checkpoints.newest_step()
        return [{DATASET: steps_dataset(self._spec, first, rank, world_size).iterator()} for rank in range(world_size)]


def fed_batches(iterator: DataIterator, window_tokens: int) -> Iterator[FedBatch]:
    """Forward passes as they come."""
    whole_blocks: Any = None  # Ray's annotation of `batch_size` does not say that it may be None
    tables: Any = iterator.iter_batches(batch_size=whole_blocks, batch_format="pyarrow", prefetch_batches=2)
    for table in tables:
        for row in range(table.num_rows):
            samples = np.frombuffer(table["samples"][row].as_buffer(), np.int64)
            tokens = np.frombuffer(table["tokens"][row].as_buffer(), np.uint32).reshape(-1, window_tokens)
            yield FedBatch(table["step"][row].as_py(), samples, tokens)
