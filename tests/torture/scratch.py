"""Where stores lie while they are tortured."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

MEMORY_DISK = Path("/dev/shm")
ENOUGH_BYTES = 2**30


def scratch_parent() -> Path | None:
    """A disk in memory where there is one: what is durable follows from the log, and hundreds of stores are made and
    removed. None: the temporary folder."""
    fits = MEMORY_DISK.is_dir() and os.access(MEMORY_DISK, os.W_OK)
    return MEMORY_DISK if fits and shutil.disk_usage(MEMORY_DISK).free > ENOUGH_BYTES else None


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="torture-", dir=scratch_parent()) as folder:
        yield Path(folder)
