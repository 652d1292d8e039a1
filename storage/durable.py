"""Files and names that survive a power cut: written, synced, and only then relied on."""

from __future__ import annotations

import os
from pathlib import Path


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
