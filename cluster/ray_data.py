"""How this program uses Ray Data: in order, in small blocks, quietly."""

from __future__ import annotations

import logging

from ray.data import DataContext

BLOCK_BYTES = 4 * 2**20


def stream_in_order() -> DataContext:
    """Set the process's data context: results in the input's order, flowing in small blocks, errors tried again."""
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.actor_task_retry_on_errors = True
    context.enable_progress_bars = False
    # Reading how much memory a worker uses takes it 2 ms a look; nothing here decides by it.
    context.memory_usage_poll_interval_s = None
    # Small blocks keep results flowing: with Ray's own 128 MiB a consumer would wait for minutes of work at a time.
    context.target_max_block_size = BLOCK_BYTES
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return context
