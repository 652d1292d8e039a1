"""Reads a context's lexical index while its writer works: one short SQLite snapshot a search.

An index that is missing, damaged or not made from what is searched counts as one of no blocks: the search then reads
the tree instead, slower and with the same result. Cheap to open; use one a thread.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from storage import row_checksums
from storage.contract import TreeReader
from storage.lexical.index import LENGTHS_PER_ROW, IndexState, is_damage, load_lengths, no_index, primary_code
from storage.tree import catalogue

logger = logging.getLogger("megacontext.storage")

T = TypeVar("T")

_FileId = tuple[int, int, int]
"""Device, inode, time of the last change of the inode in ns."""

_UNREADABLE = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
"""Removed while we looked, without permission, or with a log that a read-only folder cannot take part in."""


class IndexSnapshot:
    """One state of the index; valid inside `IndexReader.read`."""

    def __init__(self, db: sqlite3.Connection | None, num_blocks: int, num_terms: int, lengths: np.ndarray) -> None:
        self._db = db
        self.num_blocks = num_blocks
        """Blocks `[0, num_blocks)` are indexed."""
        self.num_terms = num_terms
        """Sum of their lengths."""
        self.lengths = lengths
        """Terms of each block, counted as often as they occur: `(at least num_blocks,)` uint32."""

    def frequency(self, term: str) -> tuple[int, int]:
        """In how many blocks a term occurs, and how often at most in one."""
        if self._db is None:
            return 0, 0
        found = self._db.execute("SELECT num_blocks, most FROM terms WHERE term = ?", (term,)).fetchone()
        return found or (0, 0)

    def postings(self, term: str, most: int, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Where in blocks `[first, stop)` a term occurs and how often: int64 and float64, ascending."""
        blocks = self._blocks(term, first, stop)
        counts = np.ones(len(blocks))
        for n in range(2, most + 1):
            counts[np.searchsorted(blocks, self._blocks(f"{term}#{n}", first, stop))] += 1
        return blocks, counts

    def _blocks(self, term: str, first: int, stop: int) -> np.ndarray:
        if self._db is None or first >= stop:
            return np.empty(0, np.int64)
        # One string: fetching a Python object a row takes twice the time. Quoted, a term is a string and no syntax.
        quoted = '"' + term.replace('"', '""') + '"'
        listed = self._db.execute(
            "SELECT group_concat(rowid) FROM postings WHERE postings MATCH ? AND rowid >= ? AND rowid < ?",
            (quoted, first, stop),
        ).fetchone()[0]
        return np.sort(np.fromstring(listed or "", np.int64, sep=","))


_NOTHING = IndexSnapshot(None, 0, 0, np.empty(0, "<u4"))


class IndexReader:
    """Follows the index file of one context, also when it is rebuilt meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._file: _FileId | None = None
        self._refused: _FileId | None = None
        self._foreign: tuple[object, str] = (None, "")
        self._said = ""
        self._lengths = np.empty(0, "<u4")

    def read(self, reader: TreeReader, search: Callable[[IndexSnapshot], T]) -> T:
        """`search(snapshot)` of the index as it is now; of an empty one where it cannot be used, which is said.

        Raises:
            StorageError: the machine refused to read, or `search` met it.
        """
        try:
            db = self._connected()
            if db is not None:
                with catalogue.snapshot(db):
                    snapshot = self._load(db, reader)
                    if snapshot is not None:
                        return search(snapshot)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            # SQLite cannot even say what is wrong with a schema whose text is damaged: Python fails to decode it.
            if isinstance(error, sqlite3.Error) and not is_damage(error) and primary_code(error) not in _UNREADABLE:
                with catalogue.translated(self._path):
                    raise
            self._say(str(error))
            # The same file is not tried again; a rebuilt one is another.
            self._refused = self._file
            self.close()
        return search(_NOTHING)

    def _connected(self) -> sqlite3.Connection | None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            self.close()
            return None
        # While it is open its inode cannot be given to another; of one that was refused, the time tells.
        inode = (status.st_dev, status.st_ino)
        if self._db is not None and self._file is not None and self._file[:2] == inode:
            return self._db
        self.close()
        if (*inode, status.st_ctime_ns) == self._refused:
            return None
        self._file = (*inode, status.st_ctime_ns)
        self._db = _connect(self._path)
        return self._db

    def _load(self, db: sqlite3.Connection, reader: TreeReader) -> IndexSnapshot | None:
        state = IndexState.load(db)
        version = reader.version
        key = (state, version.context, version.branch_id, version.num_blocks >= state.num_blocks)
        if key != self._foreign[0]:
            self._foreign = (key, state.foreign_to(reader))
        if why := self._foreign[1]:
            self._say(why)
            return None
        if len(self._lengths) < state.num_blocks:
            number = len(self._lengths) // LENGTHS_PER_ROW
            self._lengths = np.concatenate([self._lengths[: number * LENGTHS_PER_ROW], load_lengths(db, number)])
            total = int(self._lengths[: state.num_blocks].sum(dtype=np.int64))
            if len(self._lengths) < state.num_blocks or total != state.num_terms:
                raise no_index("lengths of its blocks are missing or damaged")
        return IndexSnapshot(db, state.num_blocks, state.num_terms, self._lengths)

    def _say(self, why: str) -> None:
        if why != self._said:
            logger.warning("%s cannot be used (%s); blocks are searched without it", self._path, why)
            self._said = why

    def close(self) -> None:
        """Release the file."""
        if self._db is not None:
            self._db.close()
        self._db = self._file = None
        self._foreign = (None, "")
        self._lengths = self._lengths[:0]


def _connect(path: Path) -> sqlite3.Connection:
    # Where nobody can write, SQLite cannot make the `-shm` file a log is read through; without a log none is needed.
    beside = any(Path(f"{path}{suffix}").exists() for suffix in ("-wal", "-shm"))
    frozen = not beside and not os.access(path.parent, os.W_OK)
    uri = path.absolute().as_uri() + "?mode=ro" + ("&immutable=1" if frozen else "")
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=30.0)
    row_checksums.register(connection)
    return connection
