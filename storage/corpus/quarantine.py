"""The quarantine table: what could not become a document, and why.

While a job runs, items are kept in a small database beside the table, so that a killed job loses at most the
items since the last flush, memory does not grow with their number, and an item met again by a resumed job
counts once. `close` turns it into `quarantine.parquet` in one atomic step.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DiskFullError, StorageError
from storage.corpus.document import QuarantinedItem
from storage.durable import fsync_folder

SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
    ]
)
_BATCH_ROWS = 1024


class QuarantineTable:
    """Collects quarantined items and writes them as Parquet, sorted by uri. For one user at a time.

    Opening a path where an earlier run left its table, finished or not, goes on with that table.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, the Parquet file to write; its folder is made.

        Raises:
            StorageError: what an earlier run left there is damaged, or the folder cannot be written.
            DiskFullError: no space.
        """
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._counts: dict[str, int] | None = None
        self._num_unflushed = 0
        is_new = not self._partial.exists()
        with self._explained("opened"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self._partial, check_same_thread=False)
            try:
                self._db.execute(
                    "CREATE TABLE IF NOT EXISTS items (uri TEXT PRIMARY KEY, reason TEXT NOT NULL, "
                    "detail TEXT NOT NULL, size_bytes INTEGER NOT NULL) WITHOUT ROWID"
                )
                if is_new and path.exists():
                    self._load_finished()
                self._db.commit()
            except BaseException:
                self._db.close()
                if is_new:
                    self._partial.unlink(missing_ok=True)
                raise

    def _load_finished(self) -> None:
        with pq.ParquetFile(self.path) as table:
            for batch in table.iter_batches(_BATCH_ROWS, columns=SCHEMA.names):
                rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
                self._db.executemany("INSERT INTO items VALUES (?, ?, ?, ?)", rows)

    def add(self, item: QuarantinedItem) -> None:
        """Keep an item; one of the same uri is replaced."""
        row = (_storable(item.uri), item.reason, _storable(item.detail), item.size_bytes)
        with self._explained("written"):
            self._db.execute("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?)", row)
        self._num_unflushed += 1
        if self._num_unflushed >= _BATCH_ROWS:
            self.flush()

    def extend(self, items: Iterable[QuarantinedItem]) -> None:
        """Keep several items."""
        for item in items:
            self.add(item)

    def discard(self, uri: str) -> None:
        """Forget the item of this uri, if there is one: a resumed job could read it after all."""
        with self._explained("written"):
            self._db.execute("DELETE FROM items WHERE uri = ?", (_storable(uri),))

    def flush(self) -> None:
        """Make what was added so far survive a kill."""
        with self._explained("written"):
            self._db.commit()
        self._num_unflushed = 0

    def counts(self) -> dict[str, int]:
        """Number of items by reason, sorted by reason; also after `close`."""
        if self._counts is not None:
            return dict(self._counts)
        with self._explained("read"):
            return dict(
                self._db.execute("SELECT reason, COUNT(*) FROM items GROUP BY reason ORDER BY reason").fetchall()
            )

    def close(self) -> None:
        """Write the Parquet file under a temporary name, rename it, drop the database. May be repeated."""
        if self._counts is not None:
            return
        counts = self.counts()
        self.flush()
        temporary = self.path.with_name(self.path.name + ".tmp")
        with self._explained("written"):
            try:
                self._write_parquet(temporary)
            except BaseException:
                temporary.unlink(missing_ok=True)
                self._db.close()
                raise
            os.replace(temporary, self.path)
            fsync_folder(self.path.parent)
            self._db.close()
            self._partial.unlink()
        self._counts = counts

    def _write_parquet(self, path: Path) -> None:
        with open(path, "wb") as file:
            with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
                cursor = self._db.execute("SELECT uri, reason, detail, size_bytes FROM items ORDER BY uri")
                while rows := cursor.fetchmany(_BATCH_ROWS):
                    columns = [list(column) for column in zip(*rows, strict=True)]
                    writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, pa.ArrowException, OSError) as error:
            full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            if full or getattr(error, "errno", None) == errno.ENOSPC:
                raise DiskFullError(
                    f"the quarantine table {self.path} cannot be {doing}: the disk is full. Free space and run "
                    "the same command again"
                ) from error
            raise StorageError(
                f"the quarantine table {self.path} cannot be {doing}: {error}. If it is damaged, remove it and "
                f"{self._partial.name} to start a new one"
            ) from error

    def __enter__(self) -> QuarantineTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _storable(text: str) -> str:
    """Lone surrogates (of JSON keys, of file names that are not UTF-8) as escapes; databases take none."""
    return text.encode("utf-8", "backslashreplace").decode()
