"""The command line, cutting a corpus as fine as a large one: `python -m tests.torture.small_blocks compact …`.

A small corpus is one task of Ray Data with one block of output, which is done before anything can happen to it. Cut
like this, tasks and blocks are as many as of a corpus a hundred times as large.
"""

from __future__ import annotations

import functools
import sys

from ray.data import DataContext

import cluster.ray_data
import storage.corpus.source
from cluster.cli import main
from ray_job import JOBS
from storage.corpus.shard import ShardLimits

SHARD_BYTES = 24 * 2**10
BLOCK_BYTES = 16 * 2**10
IN_FLIGHT_BYTES = 8 * BLOCK_BYTES
"""What may wait between stages: then tokenisers wait for compactors, as they do where a corpus outgrows the memory."""


def cut_small() -> None:
    """Make this process, a job's driver, cut what it hands out small."""
    cluster.ray_data.BLOCK_BYTES = BLOCK_BYTES
    storage.corpus.source.ShardLimits = functools.partial(ShardLimits, group_bytes=SHARD_BYTES)  # pyright: ignore
    limits = DataContext.get_current().execution_options.resource_limits
    DataContext.get_current().execution_options.resource_limits = limits.copy(object_store_memory=IN_FLIGHT_BYTES)


if __name__ == "__main__":
    cut_small()
    sys.exit(main(JOBS))
