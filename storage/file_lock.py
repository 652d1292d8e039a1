"""Locks by file: one process at a time, for as long as it lives."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import IO

from cluster.errors import StorageError, WriterConflictError


def take_lock(path: Path, doing: str, held: Callable[[], str]) -> IO[str]:
    """The lock file, held until closed; the kernel frees it when the process dies, however it dies.

    Args:
        path: of the file, which is made when there is none.
        doing: what the lock is for, as in "write to context 'docs'".
        held: what to say when another process holds it, and what to do then.

    Raises:
        WriterConflictError: another live process holds it.
        StorageError: the file cannot be made or locked.
    """
    try:
        file = path.open("a+")
    except OSError as error:
        raise StorageError(f"cannot {doing}: {error}. Check the folder's permissions.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise WriterConflictError(held()) from error
    except OSError as error:
        file.close()
        raise StorageError(f"cannot lock {path}: {error}. Keep the store on a file system that has locks.") from error
    return file
