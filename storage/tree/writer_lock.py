"""Who may write to a context: one live process by a file lock, and the newest writer by its epoch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from storage.file_lock import take_lock
from storage.tree import catalogue

LOCK_FILE = "writer.lock"


def committed_epoch(folder: Path) -> int:
    """The newest writer's fencing number, as a context's catalogue has it."""
    with (
        contextlib.closing(catalogue.connect(folder, read_only=True)) as connection,
        catalogue.translated(folder / catalogue.CATALOGUE_FILE),
    ):
        return int(connection.execute("SELECT epoch FROM writer").fetchone()[0])


@contextlib.contextmanager
def writer_lock(folder: Path, name: str) -> Iterator[None]:
    """Keep everybody from writing to a context.

    Raises:
        WriterConflictError: another live process does.
    """
    with contextlib.closing(take_writer_lock(folder, name)):
        yield


def take_writer_lock(folder: Path, name: str) -> IO[str]:
    """The context's lock file, held until closed.

    Raises:
        WriterConflictError: another live process writes.
    """

    def held() -> str:
        return (
            f"context {name!r} is being written by another process ({_describe_owner(folder)}). A context has one "
            "writer: wait for that job, stop it, or write to another context with --store.context."
        )

    return take_lock(folder / LOCK_FILE, f"write to context {name!r}", held)


def _describe_owner(folder: Path) -> str:
    with (
        contextlib.closing(catalogue.connect(folder, read_only=True)) as connection,
        catalogue.translated(folder / catalogue.CATALOGUE_FILE),
    ):
        return str(connection.execute("SELECT owner FROM writer").fetchone()[0])
