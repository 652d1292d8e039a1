"""How datasets are consumed."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator

import pyarrow as pa
import ray
import ray.data

from cluster.config import RayConfig
from cluster.ray_data import stream_in_order
from cluster.ray_runtime import ray_session

LOOK_S = 3.0


def rows_apart(table: pa.Table) -> Iterator[pa.Table]:
    """One block a row."""
    return (table.slice(row, 1) for row in range(table.num_rows))


def test_a_slow_consumer_is_left_its_core_and_gets_everything_in_order() -> None:
    """Without pauses the scheduling loop took half a core of this process."""
    with ray_session(RayConfig()):
        stream_in_order(resting=True)
        dataset = ray.data.range(3200, override_num_blocks=100).map_batches(
            rows_apart, batch_size=None, batch_format="pyarrow", num_cpus=0.05
        )
        whole_blocks: Callable[..., object] | None = None
        tables = iter(dataset.iter_batches(batch_size=whole_blocks, batch_format="pyarrow", prefetch_batches=1))
        first = next(tables)
        time.sleep(2.0)
        before = resource.getrusage(resource.RUSAGE_SELF)
        time.sleep(LOOK_S)
        after = resource.getrusage(resource.RUSAGE_SELF)
        rows = pa.concat_tables([first, *tables])["id"].to_pylist()
    assert rows == list(range(3200))
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 0.25 * LOOK_S
