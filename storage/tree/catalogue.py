"""The catalogue of a context: one SQLite file that is also the journal.

WAL mode with synchronous=FULL: a commit is one transaction, one fsync, one acknowledgement. Versions, documents,
segments and the recent super-blocks change together or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c

from cluster.errors import CorruptTreeError, DiskFullError, IncompatibleTreeError, StorageError
from storage import row_checksums
from storage.schema import FORMAT_VERSION
from storage.tree import journal

CATALOGUE_FILE = "catalogue.sqlite"

_SCHEMA_CRC = "schema_crc"

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE writer (only INTEGER PRIMARY KEY CHECK (only = 1), epoch INTEGER NOT NULL, owner TEXT NOT NULL);
CREATE TABLE encodings (encoding_id INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL);

-- A branch is a movable tip. What it shares with its parent, the version fork_seq up to block fork_block, it has in
-- encoding fork_encoding_id; all of that is NULL without a parent. bases: the first node of its own, of LOD0 (blocks),
-- LOD1, ... as JSON. documents_from: the first block of its own documents. state: live, retired or
-- collected.
CREATE TABLE branches (
  branch_id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, encoding_id INTEGER NOT NULL,
  parent_branch_id INTEGER, fork_block INTEGER, head_seq INTEGER NOT NULL, fork_seq INTEGER,
  fork_encoding_id INTEGER, bases TEXT NOT NULL DEFAULT '[]', documents_from INTEGER NOT NULL DEFAULT 0,
  state TEXT NOT NULL DEFAULT 'live', created_at REAL NOT NULL DEFAULT 0, retired_at REAL);

-- One row a commit: an immutable version. level_counts: nodes of LOD1, LOD2, ... as JSON. The newest row is never
-- deleted, so that no seq comes twice.
CREATE TABLE commits (
  seq INTEGER PRIMARY KEY, branch_id INTEGER NOT NULL, encoding_id INTEGER NOT NULL,
  num_tokens INTEGER NOT NULL, level_counts TEXT NOT NULL, created_at REAL NOT NULL, request_id TEXT NOT NULL,
  author TEXT NOT NULL DEFAULT '', job TEXT NOT NULL DEFAULT '', message TEXT NOT NULL DEFAULT '');

-- The counts of an open document are those of when it began: it reaches to the end of its branch, in full blocks.
CREATE TABLE documents (
  document_id INTEGER PRIMARY KEY AUTOINCREMENT, branch_id INTEGER NOT NULL, key TEXT NOT NULL, uri TEXT NOT NULL,
  content_sha256 TEXT NOT NULL, size_bytes INTEGER NOT NULL, modified_at REAL, tags TEXT NOT NULL,
  first_block INTEGER NOT NULL, num_blocks INTEGER NOT NULL, num_tokens INTEGER NOT NULL, state TEXT NOT NULL,
  UNIQUE (branch_id, key));
CREATE INDEX documents_by_block ON documents (branch_id, first_block);
CREATE INDEX documents_by_uri ON documents (uri);

-- The open document's tokens that have no gist yet.
CREATE TABLE tails (branch_id INTEGER PRIMARY KEY, document_id INTEGER NOT NULL, tokens BLOB NOT NULL);

-- Recent nodes, one row a run that never crosses a super-block (LOD0, LOD1) or a sibling group (LOD2 and up).
-- LOD0 rows count blocks and belong to encoding 0. crc is `journal.checksum`. row_id: the writer's epoch in the
-- upper bits, so that none comes twice. (AUTOINCREMENT would write a page of its own in every commit.)
CREATE TABLE journal (
  row_id INTEGER PRIMARY KEY, branch_id INTEGER NOT NULL, encoding_id INTEGER NOT NULL,
  lod INTEGER NOT NULL, first INTEGER NOT NULL, count INTEGER NOT NULL, crc INTEGER NOT NULL, payload BLOB NOT NULL);
CREATE UNIQUE INDEX journal_by_node ON journal (branch_id, encoding_id, lod, first);

CREATE TABLE segments (
  segment_id INTEGER PRIMARY KEY AUTOINCREMENT, folder TEXT NOT NULL UNIQUE, payload_bytes INTEGER NOT NULL,
  stored_bytes INTEGER NOT NULL, manifest TEXT NOT NULL, sealed_at REAL NOT NULL);
-- Which nodes a segment holds; LOD0 extents count blocks and belong to encoding 0.
CREATE TABLE extents (
  segment_id INTEGER NOT NULL, branch_id INTEGER NOT NULL, encoding_id INTEGER NOT NULL, lod INTEGER NOT NULL,
  first INTEGER NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (branch_id, encoding_id, lod, first)) WITHOUT ROWID;

-- Data derived behind the commits (counters) and how far each has come; the lexical index keeps its own mark.
CREATE TABLE derived (name TEXT PRIMARY KEY, branch_id INTEGER NOT NULL, next_block INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE tags (
  name TEXT PRIMARY KEY, seq INTEGER NOT NULL, created_at REAL NOT NULL, author TEXT NOT NULL DEFAULT '',
  message TEXT NOT NULL DEFAULT '') WITHOUT ROWID;
CREATE TABLE audit (
  audit_id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
  detail TEXT NOT NULL);
"""

_BLOCK_STATES = """
-- From version since_seq on, a span of blocks has a state (BlockState). keep_until: unix seconds, when tokens of a
-- pruned span may be collected.
CREATE TABLE block_states (
  branch_id INTEGER NOT NULL, since_seq INTEGER NOT NULL, first INTEGER NOT NULL, count INTEGER NOT NULL,
  state INTEGER NOT NULL, keep_until REAL NOT NULL, PRIMARY KEY (branch_id, since_seq, first)) WITHOUT ROWID;
-- When a branch had how many blocks, of versions that were collected: the age of blocks outlives them.
CREATE TABLE growth (
  branch_id INTEGER NOT NULL, num_blocks INTEGER NOT NULL, at REAL NOT NULL,
  PRIMARY KEY (branch_id, num_blocks)) WITHOUT ROWID;
"""

# The audit log only grows, whoever opens the file. A new line gets its checksum, once.
_AUDIT_GUARDS = """
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit WHEN OLD.crc IS NOT NULL
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_is_not_shortened BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
"""


def _run(db: sqlite3.Connection, script: str) -> None:
    """Each statement of a script, in the transaction that is open (`executescript` would commit it)."""
    for statement in script.split(";\n"):
        if statement.strip():
            db.execute(statement)


def _add_forks_and_authors(db: sqlite3.Connection) -> None:
    """Format 1 to 2: branches may have a parent, versions and tags an author."""
    for table, column in (
        ("branches", "fork_seq INTEGER"),
        ("branches", "fork_encoding_id INTEGER"),
        ("branches", "bases TEXT NOT NULL DEFAULT '[]'"),
        ("branches", "documents_from INTEGER NOT NULL DEFAULT 0"),
        ("branches", "state TEXT NOT NULL DEFAULT 'live'"),
        ("branches", "created_at REAL NOT NULL DEFAULT 0"),
        ("branches", "retired_at REAL"),
        ("commits", "author TEXT NOT NULL DEFAULT ''"),
        ("commits", "job TEXT NOT NULL DEFAULT ''"),
        ("commits", "message TEXT NOT NULL DEFAULT ''"),
        ("tags", "author TEXT NOT NULL DEFAULT ''"),
        ("tags", "message TEXT NOT NULL DEFAULT ''"),
    ):
        db.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
    db.execute(
        "UPDATE branches SET created_at = coalesce("
        "(SELECT min(created_at) FROM commits c WHERE c.branch_id = branches.branch_id), 0)"
    )


def _add_checksums(db: sqlite3.Connection) -> None:
    """Rows get checksums, and those of the journal cover whose nodes they are."""
    old = db.execute("SELECT row_id, crc, branch_id, encoding_id, lod, first, count, payload FROM journal")
    for row_id, crc, *row in old.fetchall():
        if google_crc32c.value(row[-1]) == crc:
            db.execute("UPDATE journal SET crc = ? WHERE row_id = ?", (journal.checksum(*row), row_id))
    _protect(db)


def _protect(db: sqlite3.Connection) -> None:
    """Checksums for the rows of every table; the last step of making or migrating a catalogue."""
    for trigger in ("audit_is_not_changed", "audit_is_not_shortened"):
        db.execute(f"DROP TRIGGER IF EXISTS {trigger}")
    row_checksums.protect(db, list(_columns()))
    _run(db, _AUDIT_GUARDS)


def _add_states_and_checksums(db: sqlite3.Connection) -> None:
    """Format 2 to 3: states of blocks belong to versions (before, nothing ever had another state than whole), and every
    row has a checksum."""
    if row_checksums.COLUMN in {row[1] for row in db.execute("PRAGMA table_info(meta)")}:
        # Not an older format but a damaged number of it: new checksums would hide whatever else is damaged.
        raise CorruptTreeError("the catalogue's format version is damaged. Restore the file from a backup.")
    db.execute("DROP TABLE node_states")
    _run(db, _BLOCK_STATES)
    _add_checksums(db)


@functools.cache
def _columns() -> dict[str, list[str]]:
    """Columns under the checksum, of every table whose rows have one."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        _run(db, _SCHEMA + _BLOCK_STATES)
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        own = {"journal", "sqlite_sequence"}
        return {table: row_checksums.columns_of(db, table) for table in tables if table not in own}


def sound(table: str, alias: str) -> str:
    """SQL for whether a row of a table is what was written."""
    return row_checksums.sound(_columns()[table], alias)


def require_sound(is_sound: object, what: str) -> None:
    """Refuse what a damaged row says.

    Args:
        is_sound: what the SQL of `sound` gave.
        what: is described by the row.

    Raises:
        CorruptTreeError: it is damaged.
    """
    if not is_sound:
        raise CorruptTreeError(
            f"the catalogue's row of {what} {row_checksums.DAMAGED}, and is not served. `tree verify` lists all "
            "damage; `tree repair` mends what it can."
        )


def damaged_rows(db: sqlite3.Connection) -> Iterator[str]:
    """Every row that is not what was written; those of the journal apart."""
    for table in _columns():
        yield from row_checksums.damaged_rows(db, table)


def _schema_crc(db: sqlite3.Connection) -> str:
    rows = db.execute("SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_master ORDER BY type, name")
    return str(row_checksums.row_crc(*(text for row in rows for text in row)))


def _leave_documents_alone(db: sqlite3.Connection) -> None:
    """Format 3 to 4: a commit leaves the open document's row alone, and brings its own checksum. What the rows of open
    documents say is right as long as nobody asks them."""
    row_checksums.guard(db, list(_columns()))


def _leave_segments_alone(db: sqlite3.Connection) -> None:
    """Format 4 to 5: shards of new segments have names that older programs do not know (`segment.CHUNK_KEY`)."""


MIGRATIONS: dict[int, Callable[[sqlite3.Connection], None]] = {
    1: _add_forks_and_authors,
    2: _add_states_and_checksums,
    3: _leave_documents_alone,
    4: _leave_segments_alone,
}
"""Step from format n to n + 1, run by the writer in one transaction before anything else."""


def create(folder: Path, meta: dict[str, str]) -> None:
    """Make a new, empty catalogue that holds `meta` and the format version.

    Raises:
        StorageError: the folder holds a catalogue already, or the disk refused.
    """
    path = folder / CATALOGUE_FILE
    if path.exists():
        raise StorageError(f"{path} exists already; open the context instead of creating it")
    with translated(path):
        connection = sqlite3.connect(path, isolation_level=None)
        row_checksums.register(connection)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            # One explicit transaction: a crash leaves an empty database, never half a schema.
            connection.execute("BEGIN IMMEDIATE")
            _run(connection, _SCHEMA + _BLOCK_STATES)
            _protect(connection)
            rows = {**meta, "format_version": str(FORMAT_VERSION), "created_at": str(time.time())}
            connection.executemany("INSERT INTO meta (key, value) VALUES (?, ?)", rows.items())
            connection.execute("INSERT INTO writer (only, epoch, owner) VALUES (1, 0, '')")
            _note_schema(connection)
            connection.execute("COMMIT")
        finally:
            connection.close()


def connect(folder: Path, *, read_only: bool) -> sqlite3.Connection:
    """Open a context's catalogue; autocommit, so that transactions are explicit.

    Raises:
        CorruptTreeError: the file is missing, not SQLite, or damaged.
        IncompatibleTreeError: the format is newer than this program.
        StorageError: the folder is read-only and the last writer's log was never folded into the file.
    """
    path = folder / CATALOGUE_FILE
    if not path.exists():
        raise CorruptTreeError(f"{path} is missing: the context lost its catalogue. Restore it from a backup.")
    options = "mode=rw"
    if read_only:
        options = "mode=ro" + ("&immutable=1" if _is_frozen(path) else "")
    with translated(path):
        connection = sqlite3.connect(
            f"file:{_quoted(path)}?{options}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=30.0,
        )
        row_checksums.register(connection)
        try:
            if not read_only:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
            _check_format(path, _format_version(path, connection), read_only, connection)
            _check_meta(path, connection)
        except BaseException:
            connection.close()
            raise
    return connection


def _is_frozen(path: Path) -> bool:
    """Whether the file can only be read as it is: SQLite reads a WAL database through a `-shm` file beside it, which
    a read-only folder cannot take. Without a log there is nothing to miss and no writer to watch for.

    Raises:
        StorageError: there is a log that cannot be read without its `-shm` file.
    """
    log, shared_memory = Path(f"{path}-wal"), Path(f"{path}-shm")
    if shared_memory.exists() or os.access(path.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        return False
    if log.exists() and log.stat().st_size > 0:
        raise StorageError(
            f"{path.parent} is read-only and holds commits that are not folded into {path.name} yet. Open the context "
            "once for writing where that is possible (any `compact` into it), then copy it again."
        )
    return True


def _format_version(path: Path, connection: sqlite3.Connection) -> int:
    # An empty file is a valid, empty SQLite database: truncation shows as missing tables.
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    row = None
    if "meta" in tables:
        row = connection.execute("SELECT value FROM meta WHERE key = 'format_version'").fetchone()
    if row is None or not row[0].isdigit():
        raise CorruptTreeError(f"{path} is no catalogue of a context, or was truncated. Restore it from a backup.")
    return int(row[0])


def _check_format(path: Path, found: int, read_only: bool, connection: sqlite3.Connection) -> None:
    if found > FORMAT_VERSION:
        raise IncompatibleTreeError(
            f"{path} has format {found}; this program knows up to {FORMAT_VERSION}. Update megacontext."
        )
    if found < FORMAT_VERSION and read_only:
        raise IncompatibleTreeError(
            f"{path} has format {found}, this program writes {FORMAT_VERSION}. Open it once for writing "
            "(`tree gc`, or any `compact` into the context) to migrate it."
        )
    for version in range(found, FORMAT_VERSION):
        with transaction(connection):
            MIGRATIONS[version](connection)
            connection.execute("UPDATE meta SET value = ? WHERE key = 'format_version'", (str(version + 1),))
            if version + 1 == FORMAT_VERSION:
                _note_schema(connection)


def _note_schema(connection: sqlite3.Connection) -> None:
    """Keep the schema's checksum: damage to a trigger would be damage to all that is written later."""
    connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (_SCHEMA_CRC, _schema_crc(connection)))


def _check_meta(path: Path, connection: sqlite3.Connection) -> None:
    with snapshot(connection):
        rows = connection.execute(f"SELECT key, value, {sound('meta', 'meta')} FROM meta").fetchall()
        schema = _schema_crc(connection)
    for key, _, is_sound in rows:
        require_sound(is_sound, f"{key!r} in `meta`")
    if (_SCHEMA_CRC, schema, 1) not in rows:
        raise CorruptTreeError(f"{path}: the schema is damaged. Nothing was changed. Restore the file from a backup.")


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """A write transaction that commits on success and leaves nothing behind otherwise."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        # After a failed COMMIT or a full disk SQLite may have rolled back by itself.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """A short read transaction: everything read inside belongs to one commit."""
    connection.execute("BEGIN")
    try:
        yield connection
    finally:
        if connection.in_transaction:
            connection.execute("COMMIT")


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours, with the file and what to do."""
    try:
        yield
    except ERRORS as error:
        raise translation(path, error) from error


ERRORS = (sqlite3.DatabaseError, json.JSONDecodeError, UnicodeDecodeError)
"""What `translation` takes."""


def translation(path: Path, error: Exception) -> StorageError:
    """Our error for one of SQLite's, or for text that is none."""
    text = str(error)
    if isinstance(error, sqlite3.OperationalError):
        if "decode" in text or "user-defined function" in text:
            # Text that is none, met by SQLite's module or on the way to `row_crc`.
            return CorruptTreeError(
                f"{path} holds damaged text ({text}). Nothing was changed. `tree verify` lists all damage."
            )
        if "full" in text:
            return DiskFullError(
                f"the disk (or quota) under {path.parent} is full; nothing of this write was stored, what was "
                "acknowledged before is safe. Free space and run the same command again."
            )
        if "locked" in text or "busy" in text:
            return StorageError(
                f"{path} stayed locked by another program for 30 s; stop it and run the same command again"
            )
        return StorageError(
            f"{path}: {text}. What was acknowledged before is safe. Check the disk and the file's permissions."
        )
    if isinstance(error, sqlite3.IntegrityError):
        if row_checksums.DAMAGED in text:
            return CorruptTreeError(f"{path}: {text}. Nothing was changed. `tree verify` lists all damage.")
        return StorageError(f"{path} refused a write: {text}. Nothing was changed.")
    if isinstance(error, sqlite3.ProgrammingError):
        return StorageError(f"{path}: {text}; open the context again")
    if isinstance(error, sqlite3.DatabaseError):
        return CorruptTreeError(
            f"{path} is damaged ({text}). Nothing was changed. Restore the file from a backup; sealed segments "
            "beside it are plain Zarr and stay readable."
        )
    # What SQLite takes for a sound row, or says of a schema that is none.
    return CorruptTreeError(f"{path} holds damaged text ({text}). Nothing was changed. Restore the file from a backup.")


def _quoted(path: Path) -> str:
    return str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
