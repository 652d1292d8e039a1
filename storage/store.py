"""A store: a folder of contexts, and who is reading and writing them.

`store.sqlite` lists the contexts, their writers' epochs and the readers' leases. The epoch that fences a stale
writer is in the context's own catalogue, because it must be checked in the transaction that writes.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import (
    ContextNotFoundError,
    CorruptTreeError,
    DiskFullError,
    IncompatibleTreeError,
    WriterConflictError,
)
from storage import row_checksums
from storage.durable import disk_errors, fsync_folder, make_folder_durably
from storage.schema import Encoding, TreeIdentity, check_same
from storage.tree import catalogue
from storage.tree.commits import Writing, insert_commit
from storage.tree.log_check import lost_commits
from storage.tree.reader import ContextReader
from storage.tree.sealing import SEGMENT_FOLDER
from storage.tree.writer import MAIN_BRANCH, ContextWriter
from storage.versions.collect import CLIP_SHARE, Garbage, collect
from storage.versions.history import History, find_version

STORE_FILE = "store.sqlite"
LEASE_S = 3600.0
"""How long a reader's pin is honoured by garbage collection unless it is renewed, in seconds."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS contexts (
  name TEXT PRIMARY KEY, folder TEXT NOT NULL, created_at REAL NOT NULL, owner TEXT NOT NULL, epoch INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS pins (
  pin_id TEXT PRIMARY KEY, context TEXT NOT NULL, branch TEXT NOT NULL, seq INTEGER NOT NULL, expires_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


_TABLES = ("contexts", "pins")
_CONTEXT_COLUMNS = ("created_at", "epoch", "folder", "name", "owner")


def _unprotected(db: sqlite3.Connection) -> list[str]:
    """Tables that were made before their rows had checksums."""
    return [
        table
        for table in _TABLES
        if row_checksums.COLUMN not in {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
    ]


@dataclass(frozen=True)
class ContextInfo:
    """A context as the store lists it."""

    name: str
    folder: Path
    created_at: float
    owner: str
    epoch: int


class PinnedReader(ContextReader):
    """A reader whose version is kept by a lease until it is closed."""

    def __init__(self, store: Store, folder: Path, name: str, branch: str, seq: int | None) -> None:
        super().__init__(folder, name, branch, seq)
        self._store = store
        self._pin_id = uuid.uuid4().hex
        try:
            self.renew()
        except BaseException:
            super().close()
            raise

    def renew(self) -> None:
        """Keep the version for another lease; long readers call it every few minutes.

        Raises:
            StorageError: it was collected before this lease began.
        """
        self._store.set_pin(self._pin_id, self.version.context, self.version.branch, self.version.seq)
        try:
            self.check_kept()
        except BaseException:
            self._store.drop_pin(self._pin_id)
            raise

    def close(self) -> None:
        """Give the lease back."""
        try:
            self._store.drop_pin(self._pin_id)
        finally:
            super().close()


class Store:
    """Creates, opens and lists contexts."""

    def __init__(self, root: Path, *, create: bool = False) -> None:
        """Open a store.

        Args:
            root: its folder.
            create: make it when there is none.

        Raises:
            ContextNotFoundError: there is no store and `create` is False.
        """
        self.root = root.expanduser()
        if not (self.root / STORE_FILE).exists():
            if not create:
                raise ContextNotFoundError(
                    f"there is no store at {self.root}; set --store.root, or run `compact` to make one"
                )
            with disk_errors(f"cannot make a store at {self.root}"):
                make_folder_durably(self.root)
        with self._connect() as db:
            db.execute("PRAGMA journal_mode=WAL")
            for statement in _SCHEMA.split(";\n"):
                if statement.strip():
                    db.execute(statement)
            if _unprotected(db):
                with catalogue.transaction(db):
                    row_checksums.protect(db, _unprotected(db))

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        path = self.root / STORE_FILE
        with (
            catalogue.translated(path),
            contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=30.0)) as connection,
        ):
            row_checksums.register(connection)
            yield connection

    def check(self) -> list[str]:
        """One line for each thing that is wrong with `store.sqlite`."""
        path = self.root / STORE_FILE
        with self._connect() as db:
            problems = [row[0] for row in db.execute("PRAGMA integrity_check(20)") if row[0] != "ok"]
            if not problems:
                problems = [damaged for table in _TABLES for damaged in row_checksums.damaged_rows(db, table)]
        if lost := lost_commits(path):
            problems.append(lost)
        return [f"{path}: {problem}" for problem in problems]

    def forget_damaged_leases(self) -> int:
        """Drop leases whose rows are damaged, which end within the hour anyway; returns how many."""
        with self._connect() as db, catalogue.transaction(db):
            columns = row_checksums.columns_of(db, "pins")
            return db.execute(f"DELETE FROM pins WHERE NOT {row_checksums.sound(columns, 'pins')}").rowcount

    def store_id(self) -> str:
        """What tells this store from every other, also from a later one in the same folder; given when first asked."""
        with self._connect() as db, catalogue.transaction(db):
            db.execute("INSERT OR IGNORE INTO meta (key, value) VALUES ('store_id', ?)", (uuid.uuid4().hex,))
            return str(db.execute("SELECT value FROM meta WHERE key = 'store_id'").fetchone()[0])

    # -- contexts ------------------------------------------------------------------------------------------------

    def contexts(self) -> list[ContextInfo]:
        """All contexts, by name."""
        with self._connect() as db:
            rows = db.execute(
                "SELECT name, folder, created_at, owner, epoch, "
                f"{row_checksums.sound(_CONTEXT_COLUMNS, 'contexts')} FROM contexts ORDER BY name"
            ).fetchall()
        for row in rows:
            if not row[5]:
                raise CorruptTreeError(
                    f"{self.root / STORE_FILE}: the row of context {row[0]!r} {row_checksums.DAMAGED}. Move the file "
                    "away and list the contexts anew (docs/operations.md)"
                )
        return [ContextInfo(row[0], self.root / str(row[1]), row[2], row[3], row[4]) for row in rows]

    def has_context(self, name: str) -> bool:
        """Whether the store lists a context."""
        return any(info.name == name for info in self.contexts())

    def folder(self, name: str) -> Path:
        """A context's folder.

        Raises:
            ContextNotFoundError: with the names there are.
        """
        infos = self.contexts()
        for info in infos:
            if info.name == name:
                return info.folder
        known = ", ".join(info.name for info in infos) or "none"
        raise ContextNotFoundError(f"store {self.root} has no context {name!r}; it has: {known}")

    def create_context(self, name: str, identity: TreeIdentity, encoding: Encoding) -> None:
        """Make an empty context with branch `main`; one that is there already is left as it is.

        The catalogue is built in a temporary folder, so a crash leaves no half-made context.

        Raises:
            StorageError: the disk refused.
        """
        folder = self.root / name
        with disk_errors(f"cannot make context {name!r} in {self.root}"):
            if not folder.exists():
                self._make_folder(folder, name, identity, encoding)
            # Also where it was there: who made it may have been killed before this.
            fsync_folder(self.root)
        self.register(name)

    def register(self, name: str) -> None:
        """List a context whose folder is there."""
        with self._connect() as db:
            db.execute(
                "INSERT OR IGNORE INTO contexts (name, folder, created_at, owner, epoch) VALUES (?, ?, ?, '', 0)",
                (name, name, time.time()),
            )

    def _make_folder(self, folder: Path, name: str, identity: TreeIdentity, encoding: Encoding) -> None:
        temporary = self.root / f".{name}.tmp-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        try:
            (temporary / SEGMENT_FOLDER).mkdir()
            catalogue.create(temporary, {"name": name, "identity": json.dumps(asdict(identity), sort_keys=True)})
            with (
                catalogue.translated(temporary / catalogue.CATALOGUE_FILE),
                contextlib.closing(catalogue.connect(temporary, read_only=False)) as db,
                catalogue.transaction(db),
            ):
                _create_main_branch(db, encoding)
            # SQLite makes its files durable, not the folders they are in.
            fsync_folder(temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def identity(self, name: str, version: str = MAIN_BRANCH) -> tuple[TreeIdentity, Encoding]:
        """What made a context's tokens and the gists of a version: a branch, a tag or a number."""
        folder = self.folder(name)
        with (
            contextlib.closing(catalogue.connect(folder, read_only=True)) as db,
            catalogue.translated(folder / catalogue.CATALOGUE_FILE),
        ):
            identity = TreeIdentity(
                **json.loads(db.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()[0])
            )
            body = db.execute(
                "SELECT e.body FROM commits c JOIN encodings e USING (encoding_id) WHERE c.seq = ?",
                (find_version(db, name, version),),
            ).fetchone()[0]
        return identity, Encoding.from_json(body)

    def open_writer(
        self,
        name: str,
        identity: TreeIdentity,
        encoding: Encoding | None = None,
        *,
        create: bool = False,
        branch: str = MAIN_BRANCH,
        segment_super_blocks: int = 32,
        owner: str = "",
    ) -> ContextWriter:
        """Become a context's writer.

        Args:
            name: the context.
            identity: what the tokens to be written are; must match the context's.
            encoding: what the gists to be written are; None skips the check (rebuilding brings its own).
            create: make the context when there is none (needs `encoding`).
            branch: which tip to move.
            segment_super_blocks: see `ContextWriter`.
            owner: see `ContextWriter`.

        Raises:
            IncompatibleTreeError: the context was made by something else; nothing was touched.
            WriterConflictError: another live writer holds it.
        """
        if create and encoding is not None and not self.has_context(name):
            self.create_context(name, identity, encoding)
        found_identity, found_encoding = self.identity(name, branch)
        check_same(
            f"context {name!r}",
            found_identity,
            identity,
            "Use the model it was made for, or write to another context with --store.context",
        )
        if encoding is not None:
            check_same(
                f"context {name!r}",
                found_encoding,
                encoding,
                "Use the GistNet it was made with, write to another context with --store.context, or re-derive its "
                "gists with `tree rebuild-gists`",
            )
        writer = ContextWriter(
            self.folder(name), name, segment_super_blocks=segment_super_blocks, branch=branch, owner=owner
        )
        try:
            if encoding is not None and writer.encoding != found_encoding:
                raise WriterConflictError(f"context {name!r} was given another encoding meanwhile; run the job again")
            with self._connect() as db:
                db.execute("UPDATE contexts SET owner = ?, epoch = ? WHERE name = ?", (owner, writer.epoch, name))
        except BaseException:
            # Nobody else could, and its lock would outlive the refusal.
            writer.close()
            raise
        return writer

    def open_maintenance(self, name: str, branch: str = MAIN_BRANCH, owner: str = "") -> ContextWriter:
        """Become a context's writer in order to care for it: whoever made it, and without sealing behind its back.

        Raises:
            ContextNotFoundError, StorageError: no such context or branch.
            WriterConflictError: another live writer holds it.
        """
        return ContextWriter(self.folder(name), name, branch=branch, owner=owner, seal_in_background=False)

    def open_reader(self, name: str, version: str = MAIN_BRANCH, seq: int | None = None) -> PinnedReader:
        """A reader pinned to a version; the pin is a lease of `LEASE_S` seconds.

        Args:
            name: the context.
            version: a branch, whose newest version is read, a tag or a number.
            seq: the number, where it is known.

        Raises:
            ContextNotFoundError, StorageError: no such context, branch or version.
        """
        folder = self.folder(name)
        if seq is None and version != MAIN_BRANCH:
            seq = History(folder, name).resolve(version)
        return PinnedReader(self, folder, name, MAIN_BRANCH, seq)

    def collect(
        self,
        writer: ContextWriter,
        *,
        keep_s: float,
        clip_share: float = CLIP_SHARE,
        dry_run: bool = False,
        now: float | None = None,
    ) -> Garbage:
        """Remove what no branch, tag, lease or `keep_s` needs of a writer's context (`collect.collect`).

        No lease can be taken meanwhile: who asks for one waits, and is then told when the version is gone.
        """
        with self._connect() as db, catalogue.transaction(db):
            if damaged := next(row_checksums.damaged_rows(db, "pins"), ""):
                raise CorruptTreeError(
                    f"{self.root / STORE_FILE}: {damaged}, so it is not known what readers hold. `tree repair` "
                    "forgets damaged leases; nothing was removed"
                )
            pins = db.execute(
                "SELECT seq FROM pins WHERE context = ? AND expires_at >= ?", (writer.name, time.time())
            ).fetchall()
            held = [row[0] for row in pins]
            return collect(writer, held, keep_s=keep_s, clip_share=clip_share, dry_run=dry_run, now=now)

    # -- pins ----------------------------------------------------------------------------------------------------

    def set_pin(self, pin_id: str, context: str, branch: str, seq: int) -> None:
        """Add or renew a lease, and forget those that have run out."""
        with self._connect() as db:
            db.execute("DELETE FROM pins WHERE expires_at < ?", (time.time(),))
            db.execute(
                "INSERT INTO pins (pin_id, context, branch, seq, expires_at) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (pin_id) DO UPDATE SET "
                "expires_at = excluded.expires_at",
                (pin_id, context, branch, seq, time.time() + LEASE_S),
            )

    def drop_pin(self, pin_id: str) -> None:
        """Give a lease back."""
        with self._connect() as db:
            db.execute("DELETE FROM pins WHERE pin_id = ?", (pin_id,))

    def pins(self, name: str) -> list[int]:
        """Versions of a context that live leases hold."""
        with self._connect() as db:
            rows = db.execute(
                "SELECT seq FROM pins WHERE context = ? AND expires_at >= ? ORDER BY seq", (name, time.time())
            ).fetchall()
        return [row[0] for row in rows]


def _create_main_branch(db: sqlite3.Connection, encoding: Encoding) -> None:
    encoding_id = db.execute("INSERT INTO encodings (body) VALUES (?)", (encoding.to_json(),)).lastrowid
    branch_id = db.execute(
        "INSERT INTO branches (name, encoding_id, head_seq, created_at) VALUES (?, ?, 0, ?)",
        (MAIN_BRANCH, encoding_id, time.time()),
    ).lastrowid
    assert branch_id is not None
    assert encoding_id is not None
    insert_commit(db, Writing.of_this_process(), branch_id, encoding_id, 0, (), "create")


def estimate_bytes(encoding: Encoding, num_tokens: int) -> int:
    """Disk need of a tree of `num_tokens` tokens, in bytes, the journal's and temporary copies included.

    A block costs its 32 tokens, count and prefix sum, and its LOD1 node; each level above adds a 32nd. Documents end
    in short blocks, for which a tenth is added, and up to one segment stands on disk twice while it is sealed.
    """
    num_blocks = -(-num_tokens // 32)
    payload = num_blocks * (32 * 4 + 8 + 1) + num_blocks * encoding.node_bytes * 32 // 31
    return int(payload * 1.1) + 64 * 2**20


def check_disk_space(root: Path, encoding: Encoding, num_tokens: int) -> int:
    """Refuse an ingest the disk cannot hold; returns the estimate in bytes.

    Raises:
        DiskFullError: with the need, what is free, and what to do.
    """
    need = estimate_bytes(encoding, num_tokens)
    check_room(
        root,
        need,
        f"about {num_tokens:,} tokens",
        "Free space, set --store.root to a larger disk, or store gists as int8 (--store.gist_dtype int8)",
    )
    return need


def check_room(folder: Path, num_bytes: int, what: str, advice: str) -> None:
    """Refuse what the disk cannot hold.

    Args:
        folder: where it is to be; it need not exist.
        num_bytes: what it takes.
        what: is to be stored, for the message.
        advice: the message's last sentence.

    Raises:
        DiskFullError: with the need, what is free, and the advice.
    """
    probe = folder.expanduser().absolute()
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if num_bytes > free:
        raise DiskFullError(
            f"{what} need {num_bytes / 2**30:.1f} GiB under {folder}; {free / 2**30:.1f} GiB are free. {advice}."
        )


__all__ = [
    "ContextInfo",
    "IncompatibleTreeError",
    "PinnedReader",
    "Store",
    "check_disk_space",
    "check_room",
    "estimate_bytes",
]
