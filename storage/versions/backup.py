"""Backups: a context copied into another store while it is read and written, and brought up to date later.

Segments never change, so a second backup copies what is new and the catalogue. The catalogue is copied first, by
SQLite's own backup, and takes its place in the target last: until then the target is the backup of before. A segment
that was collected meanwhile means a newer catalogue; then the copy begins again, with all it has.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import sqlite3
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import CorruptTreeError, DiskFullError, StorageError
from storage.durable import fsync_folder, fsync_path
from storage.focus.events import EVENTS_FOLDER
from storage.store import Store
from storage.tree import catalogue
from storage.tree.sealing import SEGMENT_FOLDER, is_ours
from storage.tree.segment import Manifest, check_manifest
from storage.tree.writer_lock import writer_lock
from storage.versions.archive import ARCHIVE_FOLDER

logger = logging.getLogger("megacontext.storage")

ATTEMPTS = 5
"""Looks at the catalogue before giving up: each one follows a garbage collection that ran into the copying."""


@dataclass(frozen=True)
class BackupReport:
    """What a backup did."""

    segments: int
    """Of the context."""
    copied_segments: int
    copied_bytes: int
    removed_segments: int
    """That the context does not have any more."""
    seq: int
    """The newest version of `main` that the backup holds."""


class _SegmentGone(Exception):
    """A segment was collected between the look at the catalogue and its copying."""


def back_up(
    source: Store, name: str, target: Path, *, on_progress: Callable[[int, int], None] | None = None
) -> BackupReport:
    """Copy a context into the store at `target`, which is made when there is none.

    Nothing that the context's jobs do has to stop. The lexical index is not copied: it is built anew from the blocks.
    To restore, open `target` as the store, or copy its folders to where the store was, while nothing runs.

    Args:
        source: the store.
        name: the context.
        target: folder of the store that takes the copy; not the source's.
        on_progress: called with segments done and segments in all.

    Raises:
        ContextNotFoundError: no such context.
        CorruptTreeError: a segment is damaged; the backup of before is as it was.
        DiskFullError, StorageError: the target cannot be written; the same.
        WriterConflictError: something writes to the target's context.
    """
    folder = source.folder(name)
    if target.expanduser().resolve() == source.root.resolve():
        raise StorageError(f"{target} is the store itself; give another folder, best on another disk")
    try:
        store = Store(target, create=True)
        copy = store.root / name
        (copy / SEGMENT_FOLDER).mkdir(parents=True, exist_ok=True)
        with writer_lock(copy, name):
            for _ in range(ATTEMPTS):
                with contextlib.suppress(_SegmentGone):
                    report = _copy(folder, copy, on_progress or (lambda _done, _all: None))
                    store.register(name)
                    return report
    except OSError as error:
        kind = DiskFullError if error.errno in {errno.ENOSPC, errno.EDQUOT} else StorageError
        raise kind(f"cannot write the backup under {target}: {error}. The backup of before is as it was.") from error
    raise StorageError(f"context {name!r} was collected {ATTEMPTS} times while it was copied; run the backup again")


def _copy(folder: Path, copy: Path, on_progress: Callable[[int, int], None]) -> BackupReport:
    fresh = copy / f".{catalogue.CATALOGUE_FILE}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        segments, seq = _copy_catalogue(folder, fresh)
        copied = 0
        num_copied = 0
        for done, (segment, manifest) in enumerate(segments.items()):
            on_progress(done, len(segments))
            if not (copy / SEGMENT_FOLDER / segment).exists():
                copied += _copy_segment(folder / SEGMENT_FOLDER / segment, copy / SEGMENT_FOLDER / segment, manifest)
                num_copied += 1
        on_progress(len(segments), len(segments))
        fsync_folder(copy / SEGMENT_FOLDER)
        for files in (EVENTS_FOLDER, ARCHIVE_FOLDER):
            _copy_files(folder / files, copy / files)
        for suffix in ("-wal", "-shm"):
            (copy / f"{catalogue.CATALOGUE_FILE}{suffix}").unlink(missing_ok=True)
        fresh.rename(copy / catalogue.CATALOGUE_FILE)
        fsync_folder(copy)
        fsync_folder(copy.parent)
    finally:
        fresh.unlink(missing_ok=True)
    old = [p for p in (copy / SEGMENT_FOLDER).iterdir() if p.name not in segments and is_ours(p.name)]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)
    return BackupReport(len(segments), num_copied, copied, len(old), seq)


def _copy_catalogue(folder: Path, fresh: Path) -> tuple[dict[str, Manifest], int]:
    """Copy the catalogue as of one moment: manifests by segment, and the newest version of `main`."""
    with (
        catalogue.translated(folder / catalogue.CATALOGUE_FILE),
        contextlib.closing(catalogue.connect(folder, read_only=True)) as source,
        contextlib.closing(sqlite3.connect(fresh)) as target,
    ):
        source.backup(target)
        segments = {row[0]: json.loads(row[1]) for row in target.execute("SELECT folder, manifest FROM segments")}
        seq = target.execute("SELECT head_seq FROM branches WHERE name = 'main'").fetchone()[0]
    fsync_path(fresh)
    return segments, seq


def _copy_segment(segment: Path, copy: Path, manifest: Manifest) -> int:
    """Copy a segment durably and check it; returns its bytes.

    Raises:
        CorruptTreeError: the copy is not what was sealed, because the source is not.
        _SegmentGone: it is not there any more.
    """
    temporary = copy.with_name(f".{copy.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        try:
            shutil.copytree(segment, temporary)
        except (FileNotFoundError, shutil.Error) as error:
            if not segment.exists():
                raise _SegmentGone from error
            raise
        if problems := check_manifest(temporary, manifest):
            named = problems[0].replace(str(temporary), str(segment))
            raise CorruptTreeError(f"{named}. It was not copied; `tree verify` lists all damage")
        for path, _, files in os.walk(temporary):
            for file in files:
                fsync_path(Path(path) / file)
            fsync_folder(Path(path))
        temporary.rename(copy)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sum(entry["bytes"] for entry in manifest.values())


def _copy_files(folder: Path, copy: Path) -> None:
    """Bring the copy of a folder up to date whose files are written once: focus events, of which merged files replace
    small ones, and archives."""
    if not folder.exists():
        return
    copy.mkdir(exist_ok=True)
    there = {path.name for path in folder.glob("*.parquet")}
    for name in sorted(there - {path.name for path in copy.glob("*.parquet")}):
        temporary = copy / f".{name}.tmp"
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(folder / name, temporary)
            fsync_path(temporary)
            temporary.rename(copy / name)
    for path in copy.glob("*.parquet"):
        if path.name not in there:
            path.unlink()
    fsync_folder(copy)
