"""How this program uses Ray Data: in order, in small blocks, quietly."""

from __future__ import annotations

import logging
import time
from typing import Any

from ray.data import DataContext

BLOCK_BYTES = 4 * 2**20

PAUSE_S = 0.1
"""Between two turns of a scheduling loop: a turn takes some milliseconds, and hands on all that is ready."""


class RestingLoop:
    """What Ray Data calls at every turn of the loop that schedules a dataset's tasks: a pause.

    The loop is a thread of the process that consumes the dataset, and waits for tasks only while none is done. With a
    consumer slower than its feed some always is: then it turns without end, takes the interpreter's lock from whoever
    computes beside it, and half a core. Training beside such a loop took more than twice as long.

    Of the shape of `ray.data`'s internal `ExecutionCallback`.
    """

    def before_execution_starts(self, executor: Any) -> None:
        """Nothing to do."""

    def on_execution_step(self, executor: Any) -> None:
        """Called by the loop's thread after each turn."""
        time.sleep(PAUSE_S)

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing to do."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing to do."""


def stream_in_order(*, resting: bool = False) -> DataContext:
    """Set the process's data context: results in the input's order, flowing in small blocks, errors tried again.

    Args:
        resting: for consumers that compute for longer than `PAUSE_S` between blocks; see `RestingLoop`. Where many
            short tasks must follow each other at once it would hold them up.
    """
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.actor_task_retry_on_errors = True
    context.enable_progress_bars = False
    # Reading how much memory a worker uses takes it 2 ms a look; nothing here decides by it.
    context.memory_usage_poll_interval_s = None
    callbacks: Any = [RestingLoop] if resting else []
    context.custom_execution_callback_classes = callbacks
    # Small blocks keep results flowing: with Ray's own 128 MiB a consumer would wait for minutes of work at a time.
    context.target_max_block_size = BLOCK_BYTES
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return context
