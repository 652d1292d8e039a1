"""Documents that go: taken out of a branch, where going back is possible, or erased, where it is not.

A timeline only grows, so taking a document out makes another timeline: a branch forked before the first of them, to
which the documents behind are appended again, with the gists they have (those do not depend on a document's place). It
then takes the old branch's name, which can be rolled back to. Erasing refuses to leave a version that still shows the
document, expires what is retired, collects, and scrubs what SQLite keeps of deleted rows.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import BranchConflictError, StorageError
from storage.contract import DocumentInfo, Version
from storage.lexical.index import LEXICAL_FILE, lexical_lock
from storage.store import Store
from storage.tree.documents import key_digest, plain_key
from storage.tree.lineage import LIVE, RETIRED, Lineage, branches, find_branch, load_lineage
from storage.tree.reader import ContextReader
from storage.tree.writer import ContextWriter
from storage.versions.archive import Archives
from storage.versions.branching import Branching
from storage.versions.history import History
from storage.versions.merging import REMOVE, append_documents

_WANTS_SCRUB = "wants_scrub"

UNSEEN = "being-rewritten"
"""Name of the branch that is made behind the scenes; one that an interrupted removal left is discarded."""


@dataclass(frozen=True)
class Removed:
    """What a removal did."""

    version: Version
    documents: int
    blocks: int
    moved_blocks: int
    """Blocks behind the first of them, which were stored again."""


def remove_documents(writer: ContextWriter, keys: Sequence[str], message: str = "") -> Removed:
    """Take documents out of the writer's branch. Older versions keep them; roll back to undo it. Merging a branch that
    still shows them does not bring them back.

    Costs reading and writing every block behind the first of the documents. Levels above the blocks are the
    follower's work from there on, as after any append.

    Args:
        writer: on the branch.
        keys: `DocumentMeta.key` of each.
        message: kept with the versions this makes.

    Raises:
        StorageError: no such document; the branch is as it was.
        BranchConflictError: a document is still open.
    """
    branching = Branching(writer)
    name = writer.version().branch
    wanted = set(keys)
    with writer.reader() as reader:
        with writer.reading() as db:
            places = {key: place for key, place in shown_keys(db, reader.lineage).items() if key in wanted}
        if unknown := sorted(wanted - places.keys()):
            raise StorageError(f"branch {name!r} of context {writer.name!r} has no document {unknown[0]!r}")
        growing = writer.open_document()
        if growing is not None:
            raise BranchConflictError(f"document {growing.key!r} is still open; end it, then remove documents")
        if not places:
            return Removed(writer.version(), 0, 0, 0)
        first = min(places.values())
        behind = [document for document in reader.documents() if document.first_block >= first]
        kept = [document for document in behind if document.meta.key not in wanted]
        message = message or f"remove {len(places)} document(s)"
        discard_unseen(writer)
        branching.fork(UNSEEN, at_block=first, message=message)
        try:
            writer.switch(UNSEEN)
            append_documents(writer, reader, kept, REMOVE, message)
        finally:
            writer.switch(name)
        version = branching.take_over(UNSEEN, REMOVE, {"keys": sorted(map(key_digest, places))})
    moved = sum(document.num_blocks for document in kept)
    return Removed(version, len(places), sum(document.num_blocks for document in behind) - moved, moved)


def discard_unseen(writer: ContextWriter) -> None:
    """Discard what an interrupted removal left."""
    with writer.reading() as db:
        unseen = find_branch(db, UNSEEN)
    if unseen is not None:
        Branching(writer).discard(UNSEEN)


def shown_keys(db: sqlite3.Connection, lineage: Lineage, num_blocks: int | None = None) -> dict[str, int]:
    """Keys of a branch's documents and the blocks they begin at; of documents without a block, too.

    Args:
        db: the catalogue.
        lineage: of the branch.
        num_blocks: only of documents that begin before this block: those of an older version.
    """
    found: dict[str, int] = {}
    for part in lineage.document_parts():
        stop = min(x for x in (part.stop, num_blocks, 2**62) if x is not None)
        rows = db.execute(
            "SELECT document_id, key, state, first_block FROM documents WHERE branch_id = ? AND first_block < ?",
            (part.branch_id, stop),
        )
        for document_id, key, state, first_block in rows:
            found[plain_key(document_id, key, state)] = first_block
    return found


def holders(store: Store, context: str, keys: Sequence[str], *, but: str = "") -> list[str]:
    """Who still shows any of these documents: branches (but one), tags and readers' leases, each named."""
    wanted = set(keys)
    with History(store.folder(context), context).snapshot() as db:
        found = [
            f"branch {branch.name!r}"
            for branch in branches(db)
            if branch.state == LIVE and branch.name != but and _shows(db, branch.branch_id, None, wanted)
        ]
        versions = [(f"tag {name!r}", seq) for name, seq in db.execute("SELECT name, seq FROM tags ORDER BY name")]
        versions += [(f"a reader of version {seq}", seq) for seq in store.pins(context)]
        for what, seq in versions:
            row = db.execute("SELECT branch_id, level_counts FROM commits WHERE seq = ?", (seq,)).fetchone()
            # Of a lease whose version is gone nothing can be read.
            if row is not None and _shows(db, row[0], next(iter(json.loads(row[1])), 0), wanted):
                found.append(what)
    return found


def _retired_holders(store: Store, context: str, keys: Sequence[str]) -> list[int]:
    """Retired branches that show one of the documents."""
    with History(store.folder(context), context).snapshot() as db:
        retired = [branch.branch_id for branch in branches(db) if branch.state == RETIRED]
        return [branch_id for branch_id in retired if _shows(db, branch_id, None, set(keys))]


def _shows(db: sqlite3.Connection, branch_id: int, num_blocks: int | None, keys: set[str]) -> bool:
    return not keys.isdisjoint(shown_keys(db, load_lineage(db, branch_id), num_blocks))


def erasable_documents(store: Store, context: str) -> list[DocumentInfo]:
    """Documents of every branch that is readable, retired ones too; each key once."""
    found: dict[str, DocumentInfo] = {}
    for branch in History(store.folder(context), context).branches(retired=True):
        with ContextReader(store.folder(context), context, seq=branch.head_seq) as reader:
            found |= {document.meta.key: document for document in reader.documents()}
    return list(found.values())


def erase_documents(store: Store, writer: ContextWriter, keys: Sequence[str], *, keep_s: float) -> Removed:
    """Remove documents for good: tokens, gists, keys, words and rows, from every copy that the context keeps.

    The audit log keeps how many there were and digests of their keys. What lies outside the context (backups, bundles,
    logs of runs, the sources) is not touched. Interrupted, the same call goes on.

    Args:
        store: of the context.
        writer: on the branch that shows them, or did.
        keys: `DocumentMeta.key` of each.
        keep_s: as in `Store.collect`, for what never held one of them.

    Raises:
        BranchConflictError: another branch, a tag or a reader still shows one, or one is open. A reader that was opened
            meanwhile keeps the version it reads; the documents are out of all newer ones.
        StorageError: no such document; or something reads the catalogue, so that its log could not be emptied:
            `scrub` does the rest.
    """
    discard_unseen(writer)
    _refuse_while_shown(store, writer, keys)
    with lexical_lock(writer.folder):
        for suffix in ("", "-wal", "-shm"):
            (writer.folder / f"{LEXICAL_FILE}{suffix}").unlink(missing_ok=True)
        with writer.reading() as db:
            here = shown_keys(db, writer.lineage)
        removed = Removed(writer.version(), 0, 0, 0)
        if shown := [key for key in keys if key in here]:
            removed = remove_documents(writer, shown, "erase documents")
        expired = _retired_holders(store, writer.name, keys)
        if not expired:
            raise StorageError(
                f"context {writer.name!r} has no document {keys[0]!r}" if keys else "no document is named"
            )
        Archives(writer.folder).forget(set(keys))
        with writer.commit() as db:
            db.executemany("UPDATE branches SET retired_at = 0 WHERE branch_id = ?", [(number,) for number in expired])
            digests = [key_digest(key) for key in keys]
            writer.audit(db, "erase", {"documents": removed.documents, "blocks": removed.blocks, "keys": digests})
            _want_scrub(db)
        store.collect(writer, keep_s=keep_s, clip_share=0.0)
        _refuse_while_shown(store, writer, keys)
        scrub(writer)
    return removed


def scrub(writer: ContextWriter) -> None:
    """Leave nothing of deleted rows in the catalogue's file and log.

    Raises:
        StorageError: a reader is in the middle of a transaction, so that the log could not be emptied.
    """
    with writer.reading() as db:
        db.execute("VACUUM")
        busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    if busy:
        raise StorageError(
            f"the catalogue of context {writer.name!r} is being read, so its log still holds deleted rows; `tree gc "
            "--apply true` empties it once nothing reads"
        )
    with writer.commit() as db:
        db.execute("DELETE FROM meta WHERE key = ?", (_WANTS_SCRUB,))


def wants_scrub(writer: ContextWriter) -> bool:
    """Whether an erase did not come to its end."""
    with writer.reading() as db:
        return db.execute("SELECT 1 FROM meta WHERE key = ?", (_WANTS_SCRUB,)).fetchone() is not None


def _want_scrub(db: sqlite3.Connection) -> None:
    """Remember that deleted rows must not stay in the files, until `scrub` has seen to it; inside `commit`."""
    db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, '1')", (_WANTS_SCRUB,))


def _refuse_while_shown(store: Store, writer: ContextWriter, keys: Sequence[str]) -> None:
    if still := holders(store, writer.name, keys, but=writer.version().branch):
        raise BranchConflictError(
            f"context {writer.name!r}: {', '.join(still)} still show(s) what is to be erased. Discard the branches, "
            "delete the tags, close the readers (a lease ends by itself within the hour), then erase again."
        )
