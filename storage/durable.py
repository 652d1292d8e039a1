"""Files and names that survive a power cut: written, synced, and only then relied on."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Self

from cluster.errors import DiskFullError, StorageError

SYNCS_AT_ONCE = 8


WRITE_BYTES = 1 << 20
"""Of one call of the operating system. Linux 6.18 took up to ten times as long for 9 MB in one call as for 1 MB at a
time: it looks for memory in pieces as large as the call."""


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a new file; syncing it is another matter."""
    view = memoryview(data)
    with path.open("wb", buffering=0) as file:
        done = 0
        while done < len(view):
            done += file.write(view[done : done + WRITE_BYTES])


def write_file_durably(path: Path, data: bytes) -> None:
    """Write a new file and sync it; its name is durable once its folder is synced too."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fsync_path(folder)


class PendingSyncs:
    """Files and folders that are made durable together, several at a time.

    The file system gathers the commits of concurrent syncs: the 22 files and folders of a segment take 8 ms instead of
    55 on ext4. Each is held open from `add` on, because the kernel may forget a closed file's failed write.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        """Args: `pool` syncs, `SYNCS_AT_ONCE` at a time by its number of threads; it must outlive this."""
        self._pool = pool
        self._descriptors: list[int] = []
        self._later: list[int] = []
        self._begun: list[Future[None]] = []

    def add(self, path: Path, *, now: bool = False) -> None:
        """Sync a file's bytes, or the names in a folder, with the next `wait`.

        Args:
            path: which is complete.
            now: begin at once, while others are written; worth it for large files.
        """
        descriptor = os.open(path, os.O_RDONLY)
        self._descriptors.append(descriptor)
        if now:
            self._begun.append(self._pool.submit(os.fsync, descriptor))
        else:
            self._later.append(descriptor)

    def wait(self) -> None:
        """Make all of them durable.

        Raises:
            OSError: the disk refused one of them.
        """
        self._begun += [self._pool.submit(os.fsync, descriptor) for descriptor in self._later]
        self._later.clear()
        for sync in self._begun:
            sync.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # A descriptor must not be closed, and given to another file, under a sync that was begun.
        wait(self._begun)
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


def make_folder_durably(folder: Path) -> None:
    """Make a folder, and those above it that are missing, so that a power cut does not take their names away.

    One that is there already may be what a killed process made and did not come to sync, so it is synced too.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
    for path in missing or [folder]:
        fsync_folder(path.parent)


@contextlib.contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn the operating system's errors into ours. `doing` begins the message: "cannot make the store at ..."."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFullError(f"{doing}: the disk (or quota) is full. Free space and run it again.") from error
        raise StorageError(f"{doing}: {error}. Check the disk and the folder's permissions.") from error
