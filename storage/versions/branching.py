"""What a writer does with branches and versions: fork, tag, roll back, fast-forward, merge, discard.

None of it edits what a version holds. A branch is a name for a tip: rolling back and fast-forwarding fork a new
branch from the version to go to and give it the name; the branch that had it is retired, keeps its versions until
they are collected, and can be gone back to. Every operation is one commit, except a merge of many documents.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BranchConflictError, StorageError
from storage.contract import Version
from storage.tree import journal
from storage.tree.commits import insert_commit
from storage.tree.documents import OpenDocument, insert_document, open_document
from storage.tree.lineage import LIVE, RETIRED, Lineage, find_branch, inherited_nodes, load_lineage
from storage.tree.reader import ContextReader
from storage.tree.writer import MAIN_BRANCH, ContextWriter
from storage.versions.merging import MergeResult, append_branch, documents_behind

NAME_RULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Branching:
    """Operations on the branches of a writer's context."""

    def __init__(self, writer: ContextWriter) -> None:
        self._writer = writer

    # -- forks -----------------------------------------------------------------------------------------------------

    def fork(self, name: str, *, seq: int | None = None, at_block: int | None = None, message: str = "") -> Version:
        """Make a branch that shares everything before a block with a version.

        It copies at most 31 nodes a level, whatever the length of the history. The document that the block lies in,
        or that is open there, is open on the new branch and may go on in another way.

        Args:
            name: of the new branch: letters, digits, `_`, `.` and `-`.
            seq: the version; None is the newest of the writer's branch.
            at_block: blocks to share; None shares all of the version.
            message: kept with the new branch's first version.

        Returns:
            The new branch's first version. The writer stays on its branch; see `ContextWriter.switch`.

        Raises:
            StorageError: the name is taken or not allowed; no such version; a block beyond it.
        """
        writer = self._writer
        with writer.lock:
            self._check_free(name)
            version = writer.version() if seq is None else self._version(seq)
            with self._forked(version.seq, at_block) as plan, writer.commit() as db:
                forked = plan.insert(db, writer, name, f"fork {version.branch}", message)
                writer.audit(db, "fork", {"branch": name, "from": version.seq, "at_block": plan.block})
            return forked

    def roll_back(self, seq: int, message: str = "") -> Version:
        """Let the writer's branch stand at an earlier version again, or at any other version of the context.

        The versions behind it stay readable until they are collected, so this can be undone by rolling back to one
        of them. The unfilled tail of a document that was open then is not part of a version and does not come back.

        Raises:
            StorageError: no such version.
        """
        return self._move("roll_back", seq, message)

    def fast_forward(self, source: str, message: str = "") -> Version:
        """Bring the writer's branch to the tip of a branch that was forked from its own tip.

        Raises:
            BranchConflictError: the writer's branch has gone on since.
            StorageError: no such branch.
        """
        with self._writer.lock:
            self._check_fast_forward(source)
            return self._move("fast_forward", self._tip(source).branch.head_seq, message or f"fast-forward to {source}")

    def take_over(self, source: str, action: str, detail: Mapping[str, object]) -> Version:
        """Give the name of the writer's branch to another branch; the one that had it is retired.

        Args:
            source: the other branch.
            action: in the audit log.
            detail: goes there, too.

        Raises:
            StorageError: no such branch.
        """
        writer = self._writer
        with writer.lock:
            old, new = writer.version(), self._tip(source).branch
            with writer.commit() as db:
                _retire(db, writer.branch.branch_id, old.branch)
                db.execute("UPDATE branches SET name = ? WHERE branch_id = ?", (old.branch, new.branch_id))
                ends = {"branch": old.branch, "from": old.seq, "to": new.head_seq, "branch_id": new.branch_id}
                writer.audit(db, action, {**ends, **detail})
            return writer.switch(old.branch)

    def discard(self, name: str) -> None:
        """Take a branch's name away; its versions stay until they are collected.

        Raises:
            StorageError: no such branch, the writer is on it, or it is `main`, which every job reads unless told
                otherwise.
        """
        writer = self._writer
        with writer.lock:
            if name == MAIN_BRANCH:
                raise StorageError(f"branch {name!r} is what jobs read by default; roll it back instead")
            branch = self._tip(name).branch
            if branch.branch_id == writer.branch.branch_id:
                raise StorageError(f"branch {name!r} is being written; switch to another one before it is discarded")
            with writer.commit() as db:
                _retire(db, branch.branch_id, name)
                writer.audit(db, "discard", {"branch": name, "head": branch.head_seq})

    # -- tags ------------------------------------------------------------------------------------------------------

    def tag(self, name: str, seq: int | None = None, message: str = "") -> int:
        """Name a version, which is then kept for as long as the tag is. Returns its seq.

        Raises:
            StorageError: the name is taken or not allowed; no such version.
        """
        writer = self._writer
        with writer.lock:
            _check_name("tag", name)
            wanted = writer.version().seq if seq is None else self._version(seq).seq
            with writer.commit() as db:
                found = db.execute("SELECT seq FROM tags WHERE name = ?", (name,)).fetchone()
                if find_branch(db, name) is not None:
                    raise StorageError(f"context {writer.name!r} has a branch {name!r}; take another name")
                if found is not None:
                    raise StorageError(f"tag {name!r} is there already, of version {found[0]}; delete it first")
                db.execute(
                    "INSERT INTO tags (name, seq, created_at, author, message) VALUES (?, ?, ?, ?, ?)",
                    (name, wanted, time.time(), writer.writing.author, message),
                )
                writer.audit(db, "tag", {"tag": name, "seq": wanted})
            return wanted

    def delete_tag(self, name: str) -> None:
        """Forget a tag; its version may be collected then.

        Raises:
            StorageError: no such tag.
        """
        writer = self._writer
        with writer.commit() as db:
            found = db.execute("SELECT seq FROM tags WHERE name = ?", (name,)).fetchone()
            if found is None:
                raise StorageError(f"context {writer.name!r} has no tag {name!r}")
            db.execute("DELETE FROM tags WHERE name = ?", (name,))
            writer.audit(db, "delete_tag", {"tag": name, "seq": found[0]})

    # -- merges ----------------------------------------------------------------------------------------------------

    def merge(self, source: str, message: str = "") -> MergeResult:
        """Bring what another branch has behind its fork to the writer's branch.

        Where the writer's branch has not gone on, it is fast-forwarded. Otherwise the documents that began behind the
        fork are appended, with the gists they have: those do not depend on a document's place. Documents come whole,
        in commits of at most `MERGE_BLOCKS` blocks or one document; a merge that was interrupted goes on when it is
        called again. Levels above the blocks are the follower's work, as after any append. A document that was taken
        out of the writer's branch before does not come back.

        Raises:
            BranchConflictError: a document goes on across the fork, is still open on either branch, or is another one
                on each; the branches have gists of different nets.
            StorageError: no such branch.
        """
        writer = self._writer
        before = writer.version().num_blocks
        if self._tip(source).branch.branch_id == writer.branch.branch_id:
            raise StorageError(f"branch {source!r} cannot be merged into itself")
        try:
            version = self.fast_forward(source, message)
        except BranchConflictError:
            with self._reader(self._tip(source).branch.head_seq) as reader:
                return append_branch(writer, source, reader, message)
        with writer.reader() as reader:
            new = documents_behind(reader, before)
        return MergeResult(version, True, len(new), version.num_blocks - before)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _move(self, action: str, seq: int, message: str) -> Version:
        """Fork from a version under the name of the writer's branch, whose branch is retired."""
        writer = self._writer
        with writer.lock:
            old = writer.version()
            target = self._version(seq)
            with self._forked(target.seq, None) as plan, writer.commit() as db:
                _retire(db, writer.branch.branch_id, old.branch)
                plan.insert(db, writer, old.branch, action, message or f"{action.replace('_', ' ')} to {seq}")
                writer.audit(db, action, {"branch": old.branch, "from": old.seq, "to": seq})
            writer.switch(old.branch)
            return writer.version()

    @contextlib.contextmanager
    def _forked(self, seq: int, at_block: int | None) -> Iterator[_Fork]:
        with self._reader(seq) as reader:
            yield _plan_fork(reader, self._writer, at_block)

    def _reader(self, seq: int) -> ContextReader:
        return ContextReader(self._writer.folder, self._writer.name, self._writer.version().branch, seq)

    def _version(self, seq: int) -> Version:
        with self._reader(seq) as reader:
            return reader.version

    def _check_free(self, name: str) -> None:
        _check_name("branch", name)
        with self._writer.reading() as db:
            if find_branch(db, name) is not None:
                raise StorageError(f"context {self._writer.name!r} has a branch {name!r} already")
            if db.execute("SELECT 1 FROM tags WHERE name = ?", (name,)).fetchone() is not None:
                raise StorageError(f"context {self._writer.name!r} has a tag {name!r}; take another name")

    def _check_fast_forward(self, source: str) -> None:
        writer = self._writer
        branch = writer.branch
        lineage = self._tip(source)
        with writer.reading() as db:
            child = next((b for b in lineage.branches if b.parent_id == branch.branch_id), None)
            if child is None:
                raise BranchConflictError(
                    f"branch {source!r} was not forked from {branch.name!r} as it is now; merge it instead"
                )
            then = db.execute("SELECT num_tokens FROM commits WHERE seq = ?", (child.fork_seq,)).fetchone()
            if then is None:
                raise BranchConflictError(
                    f"the version that {source!r} was forked from was collected with tokens that were pruned since; "
                    "merge it instead"
                )
            since = db.execute(
                "SELECT count(*) FROM commits WHERE branch_id = ? AND seq > ? "
                "AND (num_tokens != ? OR request_id IN ('tail', 'close', 'activate', 'prune', 'restore'))",
                (branch.branch_id, child.fork_seq, then[0]),
            ).fetchone()[0]
        if since or child.fork_block != writer.version().num_blocks:
            raise BranchConflictError(
                f"branch {branch.name!r} has gone on since {source!r} was forked from its block {child.fork_block}; "
                "merge it instead"
            )

    def _tip(self, name: str) -> Lineage:
        writer = self._writer
        with writer.reading() as db:
            branch = find_branch(db, name)
            if branch is None or branch.state != LIVE:
                raise StorageError(f"context {writer.name!r} has no branch {name!r}; `tree branch` lists them")
            return load_lineage(db, branch.branch_id)


@dataclass(frozen=True)
class _Fork:
    """All that a new branch holds itself."""

    version: Version
    """What it is forked from."""
    parent_id: int
    encoding_id: int
    block: int
    num_tokens: int
    counts: tuple[int, ...]
    """Nodes of LOD1, LOD2, … of its first version."""
    bases: tuple[int, ...]
    copies: list[tuple[int, int, dict[str, np.ndarray]]]
    """`(lod, nodes, arrays)` of the groups that the fork cuts through, from their bases on."""
    document: OpenDocument | None

    def insert(
        self, db: sqlite3.Connection, writer: ContextWriter, name: str, request_id: str, message: str
    ) -> Version:
        """Add the branch and its first version, in the transaction that is open."""
        documents_from = self.block if self.document is None else self.document.first_block
        db.execute(
            "INSERT INTO branches (name, encoding_id, parent_branch_id, fork_block, head_seq, fork_seq, "
            "fork_encoding_id, bases, documents_from, created_at) VALUES (?, ?, ?, ?, 0, ?, ?, ?, ?, ?)",
            (
                name,
                self.encoding_id,
                self.parent_id,
                self.block,
                self.version.seq,
                self.encoding_id,
                json.dumps(self.bases),
                documents_from,
                time.time(),
            ),
        )
        branch = find_branch(db, name)
        assert branch is not None
        for lod, count, arrays in self.copies:
            level = branch.level(self.encoding_id, self.version.encoding, lod) if lod else branch.block_level()
            journal.insert(db, level, level.base, count, arrays, writer.row_ids)
        if self.document is not None:
            insert_document(db, branch.branch_id, self.document)
        seq = insert_commit(
            db,
            writer.writing,
            branch.branch_id,
            self.encoding_id,
            self.num_tokens,
            self.counts,
            request_id,
            message,
        )
        return replace(
            self.version,
            branch=name,
            seq=seq,
            num_tokens=self.num_tokens,
            level_counts=self.counts,
            branch_id=branch.branch_id,
        )


def _plan_fork(reader: ContextReader, writer: ContextWriter, at_block: int | None) -> _Fork:
    version = reader.version
    block = version.num_blocks if at_block is None else at_block
    if not 0 <= block <= version.num_blocks:
        raise StorageError(
            f"version {version.seq} of context {version.context!r} has {version.num_blocks} blocks; it cannot be "
            f"forked at block {block}"
        )
    counts = inherited_nodes(version.level_counts, block)
    # Blocks have one level more than their gists: the tokens.
    bases = tuple(count // K * K for count in (block, *counts))
    copies = [
        (lod, count - base, reader.stored_arrays(lod, base, count - base))
        for lod, (count, base) in enumerate(zip((block, *counts), bases, strict=True))
        if count > base
    ]
    return _Fork(
        version=version,
        parent_id=reader.lineage.branch.branch_id,
        encoding_id=reader.encoding_id,
        block=block,
        num_tokens=int(reader.tokens_before(np.array([block]))[0]),
        counts=counts,
        bases=bases,
        copies=copies,
        document=_document_at(reader, writer, block),
    )


def _document_at(reader: ContextReader, writer: ContextWriter, block: int) -> OpenDocument | None:
    """The document that goes on behind a fork: the one that the block lies in, or the one that is open at the tip."""
    branch = reader.lineage.branch
    if block == reader.version.num_blocks and branch.head_seq == reader.version.seq:
        with writer.reading() as db:
            growing = open_document(db, branch.branch_id, block)
        return None if growing is None else replace(growing, document_id=None)
    if block == 0:
        return None
    info = reader.document_at(block - 1)
    if info.first_block + info.num_blocks == block and info.state != "open":
        return None
    num_blocks = block - info.first_block
    return OpenDocument(None, info.meta, info.first_block, num_blocks, num_blocks * K)


def _retire(db: sqlite3.Connection, branch_id: int, name: str) -> None:
    db.execute(
        "UPDATE branches SET name = ?, state = ?, retired_at = ? WHERE branch_id = ?",
        (f"{name}~{branch_id}", RETIRED, time.time(), branch_id),
    )


def _check_name(what: str, name: str) -> None:
    if not NAME_RULE.fullmatch(name) or name.isdecimal():
        raise StorageError(
            f"{what} {name!r}: names hold letters, digits, '_', '.' and '-', begin with a letter, digit or '_', and "
            "are not numbers, which versions have"
        )
