"""The background work of a writer: full segments leave the journal for Zarr while commits go on."""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from cluster.errors import DiskFullError, OutOfOrderError, StaleWriterError, StorageError
from storage.durable import SYNCS_AT_ONCE
from storage.schema import Encoding
from storage.tree import journal, sealing
from storage.tree.levels import level_counts, sealed_nodes
from storage.tree.segment import WriteFile

if TYPE_CHECKING:
    from storage.tree.writer import ContextWriter

logger = logging.getLogger("megacontext.storage")


class Sealer:
    """Seals for one writer. A full disk makes it wait, with everything still in the journal."""

    def __init__(self, writer: ContextWriter, segment_nodes: int, write_file: WriteFile | None) -> None:
        """Make a sealer; `start` gives it a thread.

        Args:
            writer: whose journal is sealed.
            segment_nodes: nodes of a level that make a segment (blocks, for the lowest).
            write_file: writes one file, which is synced afterwards; None is the ordinary way.
        """
        self.segment_nodes = segment_nodes
        self.error: StorageError | None = None
        self._writer = writer
        self._write_file = write_file
        self._num_written = 0
        # Its threads begin with the first segment, and end with `stop`.
        self._pool = ThreadPoolExecutor(SYNCS_AT_ONCE, f"sync-{writer.name}")
        self._one_at_a_time = threading.Lock()
        self._wake = threading.Condition()
        # True at first: a dead writer may have left full segments unsealed.
        self._requested = True
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Seal in the background from now on."""
        self._thread = threading.Thread(target=self._loop, name=f"seal-{self._writer.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the segment it is writing."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._pool.shutdown()

    def notify(self, first: int, count: int) -> None:
        """Nodes `[first, first + count)` of a level were committed; wake up if they completed a segment."""
        if first // self.segment_nodes < (first + count) // self.segment_nodes:
            with self._wake:
                self._requested = True
                self._wake.notify()

    def seal(self) -> None:
        """Seal every full segment before returning. Not to be called with the writer's lock held: the sealing thread
        takes it last.

        Raises:
            DiskFullError, StorageError: the disk refused; the journal still holds everything.
        """
        with self._one_at_a_time:
            while self._seal_once():
                pass
        self.error = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No segment is being sealed inside the `with`. Not to be entered with the writer's lock held."""
        with self._one_at_a_time:
            yield

    @contextlib.contextmanager
    def written(self, parts: list[sealing.Part]) -> Iterator[sealing.SealedSegment]:
        """A segment whose files are on disk, for the caller to record in a commit inside the `with`.

        When that commit is known to have failed, the files are removed. Any other error may come after the commit
        reached the disk, so the files stay: the next writer's recovery knows. Names are never used twice.

        Raises:
            DiskFullError, StorageError: the disk refused; nothing is left behind.
        """
        sealed = self._write(parts)
        try:
            yield sealed
        except (DiskFullError, StaleWriterError, OutOfOrderError):
            shutil.rmtree(self._writer.folder / sealing.SEGMENT_FOLDER / sealed.folder_name, ignore_errors=True)
            raise

    def _write(self, parts: list[sealing.Part]) -> sealing.SealedSegment:
        writer = self._writer
        self._num_written += 1
        # Epochs come again in a context that was restored, and backups tell segments apart by their names.
        tag = f"w{writer.epoch}-{self._num_written}-{secrets.token_hex(4)}"
        attributes = {
            "context": writer.name,
            "branch": writer.version().branch,
            "encoding_id": parts[-1].level.encoding_id,
        }
        try:
            return sealing.write(writer.folder, tag, parts, attributes, self._write_file, self._pool)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise DiskFullError(
                    f"no space for a segment under {writer.folder}; what was acknowledged is safe in the journal. "
                    "Free space and run the same command again."
                ) from error
            raise StorageError(f"cannot write a segment under {writer.folder}: {error}") from error

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._requested or self._stopping)
                self._requested = False
            try:
                with self._one_at_a_time:
                    while not self._stopping and self._seal_once():
                        pass
                self.error = None
            except StorageError as error:
                if self.error is None:
                    logger.warning("context %s: sealing waits: %s", self._writer.name, error)
                self.error = error
            except Exception as error:
                # A dead thread would let the journal grow without a word.
                logger.exception("context %s: sealing failed", self._writer.name)
                self.error = StorageError(f"sealing of context {self._writer.name!r} failed: {error!r}")
            if self._stopping:
                return

    def _full_levels(self, db: sqlite3.Connection) -> list[tuple[journal.Level, int, int]]:
        """`(level, first node, nodes)` of the next segment: one level, or the tokens with their gists; else nothing.

        Segments end at multiples of `segment_nodes`, also when an earlier writer had another segment size.
        """
        writer = self._writer
        num_blocks = writer.version().num_blocks
        base = writer.branch.block_level()
        gists = writer.branch.level(writer.encoding_id, writer.encoding, 1)
        levels = [(base, num_blocks), (gists, num_blocks)]
        for encoding_id, body in db.execute("SELECT encoding_id, body FROM encodings").fetchall():
            encoding = Encoding.from_json(body)
            for lod, count in enumerate(level_counts(db, writer.branch, encoding_id, encoding), start=1):
                if lod > 1 or encoding_id != writer.encoding_id:
                    levels.append((writer.branch.level(encoding_id, encoding, lod), count))
        full = []
        for level, count in levels:
            first = sealed_nodes(db, level)
            size = self.segment_nodes - first % self.segment_nodes
            if count - first >= size:
                full.append((level, first, size))
        # Tokens and their gists share a segment unless a rebuild left one of them behind.
        together = len(full) > 1 and full[0][0] is base and full[1][0] is gists and full[0][1:] == full[1][1:]
        return full[:2] if together else full[:1]

    def _seal_once(self) -> bool:
        writer = self._writer
        with writer.reading() as db:
            parts = [
                sealing.Part(level, first, size, journal.read_range(db, level, first, size))
                for level, first, size in self._full_levels(db)
            ]
        if not parts:
            return False
        # Files are written without the lock: commits go on meanwhile.
        with self.written(parts) as sealed, writer.commit() as db:
            sealed.record(db)
            for part in parts:
                journal.delete_range(db, part.level, part.first, part.count)
        logger.debug("context %s: sealed %s (%d bytes)", writer.name, sealed.folder_name, sealed.stored_bytes)
        return True
