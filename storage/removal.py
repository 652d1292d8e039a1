"""Documents that go: taken out of a branch, where going back is possible, or erased, where it is not.

A timeline only grows, so taking a document out makes another timeline: a branch forked before the first of them, to
which the documents behind are appended again, with the gists they have (those do not depend on a document's place). It
then takes the old branch's name, which can be rolled back to. Erasing refuses to leave a version that still shows the
document, expires what is retired, collects, and scrubs what SQLite keeps of deleted rows.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import BranchConflictError, StorageError
from storage.branching import Branching
from storage.contract import DocumentInfo, Version
from storage.history import History
from storage.lexical_index import LEXICAL_FILE, lexical_lock
from storage.lineage import RETIRED
from storage.reader import ContextReader
from storage.store import Store
from storage.writer import ContextWriter

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
    """Take documents out of the writer's branch. Older versions keep them; roll back to undo it.

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
    with writer.reader() as reader:
        documents = reader.documents()
        doomed = [document for document in documents if document.meta.key in set(keys)]
        if unknown := sorted(set(keys) - {document.meta.key for document in doomed}):
            raise StorageError(f"branch {name!r} of context {writer.name!r} has no document {unknown[0]!r}")
        growing = writer.open_document()
        if growing is not None:
            raise BranchConflictError(f"document {growing.key!r} is still open; end it, then remove documents")
        if not doomed:
            return Removed(writer.version(), 0, 0, 0)
        first = doomed[0].first_block
        kept = [d for d in documents if d.first_block > first and d.meta.key not in set(keys)]
        message = message or f"remove {len(doomed)} document(s)"
        with contextlib.suppress(StorageError):
            branching.discard(UNSEEN)
        branching.fork(UNSEEN, at_block=first, message=message)
        try:
            writer.switch(UNSEEN)
            branching.append_documents(reader, kept, "remove", message)
        finally:
            writer.switch(name)
        version = branching.take_over(UNSEEN, "remove", message)
    return Removed(version, len(doomed), sum(d.num_blocks for d in doomed), sum(d.num_blocks for d in kept))


def holders(store: Store, context: str, keys: Sequence[str], *, but: str = "") -> list[str]:
    """Who still shows any of these documents: branches (but one), tags and readers' leases, each named."""
    history = History(store.folder(context), context)
    found = [(f"branch {b.name!r}", b.head_seq) for b in history.branches() if b.name != but]
    found += [(f"tag {t.name!r}", t.seq) for t in history.tags()]
    found += [(f"a reader of version {seq}", seq) for seq in store.pins(context)]
    wanted = set(keys)
    return [what for what, seq in found if wanted & {d.meta.key for d in _documents(store, context, seq)}]


def _documents(store: Store, context: str, seq: int) -> list[DocumentInfo]:
    with ContextReader(store.folder(context), context, seq=seq) as reader:
        return reader.documents()


def erase_documents(store: Store, writer: ContextWriter, keys: Sequence[str], *, keep_s: float) -> Removed:
    """Remove documents for good: tokens, gists, keys, words and rows, from every copy that the context keeps.

    The audit log keeps how many there were and digests of their keys. What lies outside the context (backups, bundles,
    logs of runs, the sources) is not touched.

    Args:
        store: of the context.
        writer: on the branch that shows them.
        keys: `DocumentMeta.key` of each.
        keep_s: as in `Store.collect`, for what never held one of them.

    Raises:
        BranchConflictError: another branch, a tag or a reader still shows one, or one is open; nothing was changed.
        StorageError: no such document; or something still reads the catalogue, so that its log could not be emptied:
            the documents are out of every version, and the same call finishes the work.
    """
    if still := holders(store, writer.name, keys, but=writer.version().branch):
        raise BranchConflictError(
            f"context {writer.name!r}: {', '.join(still)} still show(s) what is to be erased. Discard the branches, "
            "delete the tags, close the readers (a lease ends by itself within the hour), then erase again."
        )
    with lexical_lock(writer.folder):
        removed = remove_documents(writer, keys, "erase documents")
        expired = _retired_holders(store, writer.name, keys)
        with writer.commit() as db:
            db.executemany("UPDATE branches SET retired_at = 0 WHERE name = ?", [(name,) for name in expired])
            digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
            writer.audit(db, "erase", {"documents": removed.documents, "blocks": removed.blocks, "keys": digests})
        store.collect(writer, keep_s=keep_s, clip_share=0.0)
        for suffix in ("", "-wal", "-shm"):
            (writer.folder / f"{LEXICAL_FILE}{suffix}").unlink(missing_ok=True)
        writer.scrub()
    return removed


def _retired_holders(store: Store, context: str, keys: Sequence[str]) -> list[str]:
    """Names of retired branches that show one of the documents."""
    wanted = set(keys)
    return [
        branch.name
        for branch in History(store.folder(context), context).branches(retired=True)
        if branch.state == RETIRED and wanted & {d.meta.key for d in _documents(store, context, branch.head_seq)}
    ]
