"""Files and names that survive a power cut: written, synced, and only then relied on."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import DiskFullError, StorageError


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
