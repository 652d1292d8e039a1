"""How datasets are consumed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest
import ray
import ray.data

from cluster import ray_data
from cluster.config import RayConfig
from cluster.ray_runtime import ray_session

LOOK_S = 2.0


def rows_apart(table: pa.Table) -> Iterator[pa.Table]:
    """One block a row."""
    return (table.slice(row, 1) for row in range(table.num_rows))


def test_the_loop_beside_a_slow_consumer_rests_and_everything_comes_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns are counted, as how much processor time they take depends on what else the machine does."""
    turns = []

    class Counted(ray_data.RestingLoop):
        """The pause, and when it ended."""

        def on_execution_step(self, executor: Any) -> None:
            super().on_execution_step(executor)
            turns.append(time.monotonic())

    monkeypatch.setattr(ray_data, "RestingLoop", Counted)
    with ray_session(RayConfig()):
        ray_data.stream_in_order(resting=True)
        dataset = ray.data.range(3200, override_num_blocks=100).map_batches(
            rows_apart, batch_size=None, batch_format="pyarrow", num_cpus=0.05
        )
        whole_blocks: Callable[..., object] | None = None
        tables = iter(dataset.iter_batches(batch_size=whole_blocks, batch_format="pyarrow", prefetch_batches=1))
        first = next(tables)
        time.sleep(LOOK_S)
        rows = pa.concat_tables([first, *tables])["id"].to_pylist()
    assert rows == list(range(3200))
    assert len(turns) > 2
    assert all(later - earlier >= ray_data.PAUSE_S for earlier, later in itertools.pairwise(turns))


def test_who_computes_little_between_blocks_is_not_held_up() -> None:
    assert ray_data.stream_in_order(resting=True).custom_execution_callback_classes == [ray_data.RestingLoop]
    assert ray_data.stream_in_order().custom_execution_callback_classes == []
