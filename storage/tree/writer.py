"""The one writer of a context on disk.

A commit is one SQLite transaction that checks the fencing epoch, stores new blocks in the journal, moves the
document's high-water mark and the branch's tip, and adds a version. Sealing runs on a thread of its own behind the
commits. A live second writer is refused by a file lock; a writer that lost its place without knowing (another
machine took over) is refused by the epoch inside its own transaction.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cluster.config import BLOCKS_PER_SUPER_BLOCK
from cluster.errors import (
    CorruptTreeError,
    InvalidWriteError,
    OutOfOrderError,
    StaleWriterError,
    StorageError,
)
from storage.codec import Values
from storage.contract import Ack, DocumentMark, DocumentMeta, PrunedSpan, SpanWrite, Version
from storage.durable import disk_errors
from storage.schema import Encoding
from storage.tree import catalogue, journal, sealing
from storage.tree.accept import Accepted, accept_spans, accept_tail, ended_document
from storage.tree.commits import Writing, insert_audit, insert_commit
from storage.tree.documents import (
    OpenDocument,
    find_document,
    insert_document,
    key_digest,
    open_document,
    update_document,
)
from storage.tree.levels import fresh_nodes, sealed_nodes
from storage.tree.lineage import LIVE, Branch, check_head, find_branch, load_lineage
from storage.tree.log_check import lost_commits
from storage.tree.reader import ContextReader
from storage.tree.sealer import Sealer
from storage.tree.segment import WriteFile
from storage.tree.states import insert_states
from storage.tree.writer_lock import take_writer_lock

logger = logging.getLogger("megacontext.storage")

MAIN_BRANCH = "main"

ROW_ID_BITS = 40
"""Of a journal row's id that count the rows of one writer; the epoch is above them."""


class ContextWriter:
    """Appends to one branch of one context. Implements `TreeWriter`; thread-safe."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        segment_super_blocks: int = 32,
        branch: str = MAIN_BRANCH,
        owner: str = "",
        seal_in_background: bool = True,
        write_file: WriteFile | None = None,
    ) -> None:
        """Take the writer's place and recover.

        Args:
            folder: the context's folder.
            name: the context's name, for messages.
            segment_super_blocks: super-blocks (1,024 slots) of a sealed segment.
            branch: which tip to move.
            owner: who writes, shown to those who are refused.
            seal_in_background: False seals only in `seal` and `flush`.
            write_file: how a segment's files are written, before they are synced; fault drills replace it.

        Raises:
            WriterConflictError: another live writer holds the context.
            CorruptTreeError, IncompatibleTreeError: see `catalogue.connect`.
        """
        self.folder = folder
        self.name = name
        self.writing = Writing.of_this_process(owner)
        self.lock = threading.RLock()
        self._catalogue_path = folder / catalogue.CATALOGUE_FILE
        self._lock_file = take_writer_lock(folder, name)
        try:
            # SQLite's own recovery would write over what is left of them.
            if lost := lost_commits(self._catalogue_path):
                raise CorruptTreeError(f"{lost} with `tree repair`.")
            self._connection = catalogue.connect(folder, read_only=False)
            try:
                self._epoch = self._take_epoch()
                # A reader may hold the id of a row that was sealed since, so no id ever comes twice: epochs do not.
                self.row_ids = itertools.count(self._epoch << ROW_ID_BITS)
                self._load_branch(branch)
                self._recover()
            except BaseException:
                self._connection.close()
                raise
        except BaseException:
            self._lock_file.close()
            raise
        self._closed = False
        self.sealer = Sealer(self, segment_super_blocks * BLOCKS_PER_SUPER_BLOCK, write_file)
        if seal_in_background:
            self.sealer.start()

    # -- state ---------------------------------------------------------------------------------------------------

    def _take_epoch(self) -> int:
        with catalogue.translated(self._catalogue_path), catalogue.transaction(self._connection) as db:
            db.execute("UPDATE writer SET epoch = epoch + 1, owner = ?", (self.writing.job,))
            return int(db.execute("SELECT epoch FROM writer").fetchone()[0])

    def _load_branch(self, branch: str) -> None:
        with self.reading() as db:
            found = find_branch(db, branch)
            if found is None:
                raise StorageError(f"context {self.name!r} has no branch {branch!r}")
            if found.state != LIVE:
                raise StorageError(
                    f"branch {branch!r} of context {self.name!r} is {found.state}, so what is written to it would be "
                    "collected. Fork a branch from it, or roll back to it"
                )
            lineage = load_lineage(db, found.branch_id)
            check_head(db, found.branch_id, found.head_seq)
            body, num_tokens, level_counts, *are_sound = db.execute(
                f"SELECT e.body, c.num_tokens, c.level_counts, {catalogue.sound('commits', 'c')}, "
                f"{catalogue.sound('encodings', 'e')} FROM commits c, encodings e "
                "WHERE c.seq = ? AND e.encoding_id = ?",
                (found.head_seq, found.encoding_id),
            ).fetchone() or ("", 0, "", False, False)
            catalogue.require_sound(are_sound[0], f"version {found.head_seq}")
            catalogue.require_sound(are_sound[1], f"encoding {found.encoding_id}")
            self.lineage = lineage
            self.encoding_id = found.encoding_id
            self.encoding = Encoding.from_json(body)
            counts = tuple(json.loads(level_counts))
            self._version = Version(
                self.name, branch, found.head_seq, self.encoding, num_tokens, counts, found.branch_id
            )
            self._open = open_document(db, found.branch_id, self._version.num_blocks)
            # Where blocks and their gists go.
            self._levels = self.branch.block_level(), self.branch.level(self.encoding_id, self.encoding, 1)

    def reload(self) -> None:
        """Take the branch's state from disk again."""
        self._load_branch(self._version.branch)

    def switch(self, branch: str) -> Version:
        """Write to another branch from now on; its newest version.

        Raises:
            StorageError: no such branch; the writer stays where it is.
        """
        with self.lock:
            self._load_branch(branch)
            return self._version

    def _recover(self) -> None:
        """Remove what a dead writer left half-made: temporary folders and segments no catalogue row names."""
        segments = self.folder / sealing.SEGMENT_FOLDER
        with disk_errors(f"cannot make {segments}"):
            segments.mkdir(exist_ok=True)
        with self.reading() as db:
            known = {row[0] for row in db.execute("SELECT folder FROM segments")}
        orphans = [path for path in segments.iterdir() if path.name not in known and sealing.is_ours(path.name)]
        for path in orphans:
            shutil.rmtree(path, ignore_errors=True)
        if orphans:
            logger.warning(
                "context %s: removed %d segment folder(s) of an interrupted sealing; their data is in the journal",
                self.name,
                len(orphans),
            )

    @property
    def branch(self) -> Branch:
        """The branch that is written."""
        return self.lineage.branch

    @property
    def epoch(self) -> int:
        """The fencing number of this writer."""
        return self._epoch

    def version(self) -> Version:
        """The newest committed version."""
        return self._version

    def open_document(self) -> DocumentMeta | None:
        """The document that is still growing."""
        return self._open.meta if self._open else None

    def document(self, key: str) -> OpenDocument | None:
        """A copy of what is stored of a document, with its tail."""
        with self.reading() as db:
            return find_document(db, self.lineage, key, self._version.num_blocks)

    def marks(self, keys: Sequence[str]) -> dict[str, DocumentMark]:
        """High-water marks of those documents that are known."""
        with self.lock:
            found = ((key, self.document(key)) for key in keys)
            return {key: document.mark() for key, document in found if document is not None}

    def reader(self) -> ContextReader:
        """A reader pinned to the newest version."""
        return ContextReader(self.folder, self.name, self._version.branch)

    # -- writing -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def commit(self) -> Iterator[sqlite3.Connection]:
        """A transaction under the lock and the epoch; on failure the writer's memory goes back to what is on disk."""
        if self._closed:
            raise StorageError(f"the writer of context {self.name!r} is closed")
        with self.lock:
            # As `catalogue.transaction` and `catalogue.translated`, without a context manager for each: a commit is
            # mostly Python.
            db = self._connection
            try:
                db.execute("BEGIN IMMEDIATE")
                epoch, owner = db.execute("SELECT epoch, owner FROM writer").fetchone()
                if epoch != self._epoch:
                    raise StaleWriterError(
                        f"context {self.name!r} was taken over by {owner} (epoch {epoch}, this writer has "
                        f"{self._epoch}); nothing was written. Stop this job."
                    )
                yield db
                db.execute("COMMIT")
            except BaseException as error:
                with contextlib.suppress(StorageError, sqlite3.Error):
                    # After a failed COMMIT or a full disk SQLite may have rolled back by itself.
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    self.reload()
                if isinstance(error, catalogue.ERRORS):
                    raise catalogue.translation(self._catalogue_path, error) from error
                raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The catalogue as this writer sees it, for reads that belong together.

        The connection is only used under the writer's lock: SQLite keeps one error a connection, so that two threads
        can take each other's, and a failed write would look like one that succeeded.
        """
        with self.lock, catalogue.translated(self._catalogue_path):
            yield self._connection

    def _advance(
        self,
        db: sqlite3.Connection,
        request_id: str,
        num_tokens: int,
        counts: tuple[int, ...],
        encoding_id: int | None = None,
        message: str = "",
    ) -> Version:
        """Add a version and move the branch's tip; returned, not yet believed until the transaction commits."""
        branch_id = self.branch.branch_id
        seq = insert_commit(
            db, self.writing, branch_id, encoding_id or self.encoding_id, num_tokens, counts, request_id, message
        )
        return replace(self._version, seq=seq, num_tokens=num_tokens, level_counts=counts)

    def append(self, spans: Sequence[SpanWrite], request_id: str = "", message: str = "") -> Ack:
        """Store spans in one commit (`TreeWriter.append`).

        Args:
            spans: in timeline order.
            request_id: kept with the version.
            message: kept with the version.
        """
        with self.lock:
            accepted = self._accepted(spans)
            if not accepted.spans:
                return Ack(self._version, skipped_blocks=accepted.skipped_blocks)
            runs = self._runs(accepted, accepted.encoded(self.encoding))
            return self._store(accepted, runs, None, request_id, message)

    def append_segment(self, spans: Sequence[SpanWrite], request_id: str = "", message: str = "") -> Ack:
        """As `append`, of blocks that become a segment at once instead of going through the journal.

        They must have been accepted and encoded already and fill one segment or several exactly, from a boundary on, as
        `BulkWriter` arranges. The writer's lock is free while files are written: nodes of higher levels may be put
        meanwhile, but nothing else that moves the end of the timeline.

        Raises:
            InvalidWriteError: the blocks do not fill segments behind the sealed ones.
            OutOfOrderError: something else was written behind the timeline meanwhile; nothing was stored.
        """
        # Segments hold a prefix of a level, so what waits in the journal goes first.
        self.sealer.seal()
        with self.sealer.paused():
            with self.lock:
                accepted = self._accepted(spans, checked=True)
                if not accepted.spans:
                    return Ack(self._version, skipped_blocks=accepted.skipped_blocks)
                runs = self._runs(accepted, accepted.encoded_before())
                self._check_segments(self._version.num_blocks, accepted.num_blocks)
                before = self._end()
            with self.sealer.written([sealing.Part(*run) for run in runs]) as sealed, self.lock:
                if self._end() != before:
                    raise OutOfOrderError(
                        f"context {self.name!r} changed while a segment was written; nothing of it was stored"
                    )
                return self._store(accepted, runs, sealed, request_id, message)

    def _accepted(self, spans: Sequence[SpanWrite], *, checked: bool = False) -> Accepted:
        return accept_spans(spans, self.name, self._version.num_blocks, self._open, self.document, checked=checked)

    def _runs(self, accepted: Accepted, gists: dict[str, np.ndarray]) -> list[journal.NewRun]:
        """Blocks and their gists, as they lie in the journal or in a segment."""
        first, count = self._version.num_blocks, accepted.num_blocks
        block_level, gist_level = self._levels
        tokens = accepted.blocks(self._version.num_tokens)
        return [(block_level, first, count, tokens), (gist_level, first, count, gists)]

    def _end(self) -> tuple[object, ...]:
        """Where the timeline ends, and which document grows there."""
        version, growing = self._version, self._open
        document = None if growing is None else (growing.meta.key, growing.num_blocks, len(growing.tail))
        return version.branch_id, self.encoding_id, version.num_blocks, version.num_tokens, document

    def _store(
        self,
        accepted: Accepted,
        runs: Sequence[journal.NewRun],
        sealed: sealing.SealedSegment | None,
        request_id: str,
        message: str,
    ) -> Ack:
        """Commit blocks and their gists: through the journal, or as the segment that holds them already."""
        branch_id = self.branch.branch_id
        first = self._version.num_blocks
        num_tokens = self._version.num_tokens + accepted.num_tokens
        counts = (first + accepted.num_blocks, *self._version.level_counts[1:])
        with self.commit() as db:
            for document in accepted.documents:
                if document.document_id is None:
                    document.document_id = insert_document(db, branch_id, document)
                else:
                    update_document(db, branch_id, document)
            if sealed is None:
                journal.insert_all(db, runs, self.row_ids)
            else:
                sealed.record(db)
            version = self._advance(db, request_id, num_tokens, counts, message=message)
            if pruned := accepted.pruned(first):
                insert_states(db, branch_id, version.seq, pruned)
        self._version, self._open = version, accepted.open_document
        if sealed is None:
            self.sealer.notify(first, accepted.num_blocks)
        return Ack(version, new_blocks=accepted.num_blocks, skipped_blocks=accepted.skipped_blocks)

    def _check_segments(self, first: int, count: int) -> None:
        size = self.sealer.segment_nodes
        with self.reading() as db:
            num_sealed = [sealed_nodes(db, level) for level in self._levels]
        if first % size or count % size or any(sealed != first for sealed in num_sealed):
            raise InvalidWriteError(
                f"a segment's write must fill segments of {size} blocks behind the sealed ones; got {count} at {first}"
            )

    def append_tail(self, document: DocumentMeta, token_offset: int, tokens: np.ndarray) -> Ack:
        """Make raw tokens of the open document durable before their blocks are full (`TreeWriter.append_tail`)."""
        with self.lock:
            known = self.document(document.key)
            target = accept_tail(document, token_offset, tokens, self.name, self._version.num_blocks, self._open, known)
            if target is None:
                return Ack(self._version)
            with self.commit() as db:
                if target.document_id is None:
                    target.document_id = insert_document(db, self.branch.branch_id, target)
                else:
                    update_document(db, self.branch.branch_id, target)
                version = self._advance(db, "tail", self._version.num_tokens, self._version.level_counts)
            self._version, self._open = version, target
            return Ack(version)

    def close_document(self, key: str, *, complete: bool = False) -> Ack:
        """End the open document, so that another may begin (`TreeWriter.close_document`)."""
        with self.lock:
            document = ended_document(key, self.name, self._open, complete=complete)
            with self.commit() as db:
                update_document(db, self.branch.branch_id, document)
                detail = {"key_sha256": key_digest(key), "num_blocks": document.num_blocks}
                self.audit(db, f"close_document: {document.state}", detail)
                version = self._advance(db, "close", self._version.num_tokens, self._version.level_counts)
            self._version, self._open = version, None
            return Ack(version)

    def put_nodes(self, lod: int, first: int, arrays: Mapping[str, Values]) -> Ack:
        """Store nodes of a level above the blocks (`TreeWriter.put_nodes`)."""
        if lod < 2:
            raise InvalidWriteError(f"put_nodes takes LOD2 and above, got LOD{lod}; blocks go through append")
        with self.lock:
            counts = self._version.level_counts
            nodes = fresh_nodes(self.encoding, self._version.num_blocks, counts, lod, first, arrays)
            if nodes is None:
                return Ack(self._version)
            grown = list(counts) + [0] * (lod - len(counts))
            grown[lod - 1] = nodes.first + nodes.count
            with self.commit() as db:
                level = self.branch.level(self.encoding_id, self.encoding, lod)
                journal.insert(db, level, nodes.first, nodes.count, nodes.arrays, self.row_ids)
                version = self._advance(db, f"lod{lod}", self._version.num_tokens, tuple(grown))
            self._version = version
            self.sealer.notify(nodes.first, nodes.count)
            return Ack(version, new_nodes=nodes.count)

    def set_states(self, db: sqlite3.Connection, spans: Sequence[PrunedSpan], action: str, message: str = "") -> None:
        """Give spans of blocks their states in a new version; inside `commit`, followed by `reload`.

        Raises:
            InvalidWriteError: a span outside the version, or two that overlap.
        """
        spans = sorted(spans)
        stops = [0, *(span.first + span.num_blocks for span in spans)]
        if any(s.num_blocks < 1 or s.first < stop for s, stop in zip(spans, stops, strict=False)):
            raise InvalidWriteError("spans must have blocks, and not overlap")
        if stops[-1] > self._version.num_blocks:
            raise InvalidWriteError(
                f"a span ends at block {stops[-1]}; context {self.name!r} has {self._version.num_blocks}"
            )
        version = self._advance(db, action, self._version.num_tokens, self._version.level_counts, message=message)
        insert_states(db, self.branch.branch_id, version.seq, spans)
        blocks = Counter()
        for span in spans:
            blocks[span.state.name.lower()] += span.num_blocks
        self.audit(db, action, {"spans": len(spans), "blocks": blocks, "message": message})

    def mark(self, db: sqlite3.Connection, request_id: str) -> None:
        """Add a version that holds what the newest one does; inside `commit`, followed by `reload`."""
        self._advance(db, request_id, self._version.num_tokens, self._version.level_counts)

    def switch_encoding(self, db: sqlite3.Connection, encoding_id: int, counts: tuple[int, ...]) -> None:
        """Give the branch another encoding in a new version; inside `commit`, followed by `reload`."""
        db.execute("UPDATE branches SET encoding_id = ? WHERE branch_id = ?", (encoding_id, self.branch.branch_id))
        self._advance(db, "activate", self._version.num_tokens, counts, encoding_id)

    def audit(self, db: sqlite3.Connection, action: str, detail: dict[str, object]) -> None:
        """Tell the audit log what this transaction does."""
        insert_audit(db, self.writing, action, {**detail, "epoch": self._epoch})

    # -- end -----------------------------------------------------------------------------------------------------

    def flush(self) -> Ack:
        """Every `append` here is durable when it returns; this seals what is full and reports what sealing met."""
        self.sealer.seal()
        return Ack(self._version)

    def close(self) -> None:
        """Stop sealing, fold the WAL into the database, give up the writer's place. Idempotent."""
        if self._closed:
            return
        self.sealer.stop()
        with self.lock:
            self._closed = True
            self._connection.close()
        self._lock_file.close()

    def __enter__(self) -> ContextWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
