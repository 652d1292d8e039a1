"""Reads what happened to a context: its branches, tags, versions and audit log, and how two versions differ."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import StorageError
from storage.contract import DocumentInfo
from storage.tree import catalogue, journal
from storage.tree.lineage import COLLECTED, LIVE, Branch, Lineage, branches, find_branch, load_lineage
from storage.tree.reader import ContextReader


@dataclass(frozen=True)
class BranchInfo:
    """A branch as a person asks for it."""

    name: str
    state: str
    head_seq: int
    num_blocks: int
    num_tokens: int
    parent: str
    fork_block: int
    own_bytes: int
    """Payload bytes that it does not share with its parent, in journal and segments."""
    created_at: float


@dataclass(frozen=True)
class CommitInfo:
    """A version, and what its commit added."""

    seq: int
    branch: str
    created_at: float
    author: str
    job: str
    request_id: str
    message: str
    num_blocks: int
    num_tokens: int
    tags: tuple[str, ...]


@dataclass(frozen=True)
class TagInfo:
    """A named version."""

    name: str
    seq: int
    branch: str
    created_at: float
    author: str
    message: str


@dataclass(frozen=True)
class AuditEntry:
    """A change that is more than an append."""

    at: float
    actor: str
    action: str
    detail: dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """What two versions do not share. Documents that the fork cut in two count on the side that has more of them."""

    left: int
    right: int
    shared_blocks: int
    only_left: list[DocumentInfo]
    only_right: list[DocumentInfo]
    left_blocks: int
    right_blocks: int
    left_tokens: int
    right_tokens: int
    left_bytes: int
    """Payload of the blocks and gists behind the shared ones."""
    right_bytes: int


class History:
    """Read-only; opens the catalogue for each question, so it never sees half a commit."""

    def __init__(self, folder: Path, name: str) -> None:
        """Of the context in that folder."""
        self._folder = folder
        self._name = name

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """The catalogue, as of one commit."""
        with (
            contextlib.closing(catalogue.connect(self._folder, read_only=True)) as db,
            catalogue.translated(self._folder / catalogue.CATALOGUE_FILE),
            catalogue.snapshot(db),
        ):
            yield db

    def branches(self, *, retired: bool = False) -> list[BranchInfo]:
        """Branches in the order they were made."""
        with self.snapshot() as db:
            found = branches(db)
            names = {branch.branch_id: branch.name for branch in found}
            return [
                _branch_info(db, branch, names.get(branch.parent_id or 0, ""))
                for branch in found
                if branch.state == LIVE or (retired and branch.state != COLLECTED)
            ]

    def tags(self) -> list[TagInfo]:
        """Tags by name."""
        with self.snapshot() as db:
            rows = db.execute(
                "SELECT t.name, t.seq, b.name, t.created_at, t.author, t.message FROM tags t "
                "JOIN commits c USING (seq) JOIN branches b USING (branch_id) ORDER BY t.name"
            )
            return [TagInfo(*row) for row in rows]

    def log(self, branch: str, limit: int = 20) -> list[CommitInfo]:
        """Versions of a branch and, before its fork, of its ancestors, newest first.

        Raises:
            StorageError: no such branch.
        """
        with self.snapshot() as db:
            tags: dict[int, tuple[str, ...]] = {}
            for name, seq in db.execute("SELECT name, seq FROM tags ORDER BY name"):
                tags[seq] = (*tags.get(seq, ()), name)
            commits: list[CommitInfo] = []
            newest: int | None = None
            for line in load_lineage(db, self._branch(db, branch).branch_id).branches:
                rows = db.execute(
                    "SELECT seq, created_at, author, job, request_id, message, level_counts, num_tokens FROM commits "
                    "WHERE branch_id = ? AND seq <= ? ORDER BY seq DESC LIMIT ?",
                    (line.branch_id, 2**63 - 1 if newest is None else newest, limit - len(commits)),
                )
                for seq, at, author, job, request_id, message, counts, num_tokens in rows:
                    blocks = next(iter(json.loads(counts)), 0)
                    commits.append(
                        CommitInfo(
                            seq,
                            line.name,
                            at,
                            author,
                            job,
                            request_id,
                            message,
                            blocks,
                            num_tokens,
                            tags.get(seq, ()),
                        )
                    )
                newest = line.fork_seq
            return commits

    def growth(self, lineage: Lineage, seq: int) -> tuple[np.ndarray, np.ndarray]:
        """When a version's blocks were stored: `(num_blocks, at)`, ascending, `(n,)` int64 and float64 unix seconds. At
        time `at[i]` there were `num_blocks[i]` of them."""
        found: dict[int, float] = {}
        newest, stop = seq, 2**62
        with self.snapshot() as db:
            for line in lineage.branches:
                rows = db.execute(
                    "SELECT json_extract(level_counts, '$[0]') n, min(created_at) FROM commits "
                    "WHERE branch_id = ? AND seq <= ? AND level_counts != '[]' GROUP BY n "
                    "UNION ALL SELECT num_blocks, at FROM growth WHERE branch_id = ?",
                    (line.branch_id, newest, line.branch_id),
                )
                for num_blocks, at in rows:
                    blocks = min(num_blocks, stop)
                    found[blocks] = min(at, found.get(blocks, at))
                newest, stop = min(newest, line.fork_seq or 0), min(stop, line.fork_block)
        blocks = sorted(found)
        # What was there earlier with more blocks had these, too.
        times = np.minimum.accumulate([found[n] for n in blocks][::-1])[::-1] if blocks else []
        return np.array(blocks, np.int64), np.array(times, np.float64)

    def audit(self, limit: int = 50) -> list[AuditEntry]:
        """The audit log's newest entries, newest first."""
        with self.snapshot() as db:
            rows = db.execute("SELECT at, actor, action, detail FROM audit ORDER BY audit_id DESC LIMIT ?", (limit,))
            return [AuditEntry(at, actor, action, json.loads(detail)) for at, actor, action, detail in rows]

    def resolve(self, version: str) -> int:
        """The seq of a version given as a branch's name, a tag, or its number.

        Raises:
            StorageError: it is none of them.
        """
        with self.snapshot() as db:
            return find_version(db, self._name, version)

    def diff(self, left: str, right: str) -> Difference:
        """How two versions differ, each given as `resolve` takes it.

        Raises:
            StorageError: no such version.
        """
        with self._reader(left) as one, self._reader(right) as other:
            shared = min(one.lineage.shared_blocks(other.lineage), one.version.num_blocks, other.version.num_blocks)
            sides = [_behind(reader, shared) for reader in (one, other)]
        (only_left, *left_sizes), (only_right, *right_sizes) = sides
        both = (size for pair in zip(left_sizes, right_sizes, strict=True) for size in pair)
        return Difference(one.version.seq, other.version.seq, shared, only_left, only_right, *both)

    def _reader(self, version: str) -> ContextReader:
        return ContextReader(self._folder, self._name, seq=self.resolve(version))

    def _branch(self, db: sqlite3.Connection, name: str) -> Branch:
        branch = find_branch(db, name)
        if branch is None:
            known = ", ".join(b.name for b in branches(db) if b.state == LIVE)
            raise StorageError(f"context {self._name!r} has no branch {name!r}; it has: {known}")
        return branch


def find_version(db: sqlite3.Connection, context: str, version: str) -> int:
    """The seq of a version given as a branch's name, a tag, or its number.

    Raises:
        StorageError: it is none of them.
    """
    branch = find_branch(db, version)
    if branch is not None:
        return branch.head_seq
    row = db.execute("SELECT seq FROM tags WHERE name = ?", (version,)).fetchone()
    if row is None and version.isascii() and version.isdecimal():
        row = db.execute("SELECT seq FROM commits WHERE seq = ?", (int(version),)).fetchone()
    if row is None:
        live = ", ".join(b.name for b in branches(db) if b.state == LIVE)
        tags = ", ".join(name for (name,) in db.execute("SELECT name FROM tags ORDER BY name")) or "none"
        raise StorageError(
            f"context {context!r} has no version {version!r}: give a branch ({live}), a tag ({tags}) or a number that "
            "`tree log` shows"
        )
    return int(row[0])


def _branch_info(db: sqlite3.Connection, branch: Branch, parent: str) -> BranchInfo:
    counts, num_tokens, created_at = db.execute(
        "SELECT c.level_counts, c.num_tokens, b.created_at FROM branches b JOIN commits c ON c.seq = b.head_seq "
        "WHERE b.branch_id = ?",
        (branch.branch_id,),
    ).fetchone()
    own_bytes = db.execute(
        "SELECT coalesce(sum(length(payload)), 0) FROM journal WHERE branch_id = ?", (branch.branch_id,)
    ).fetchone()[0]
    own_bytes += db.execute(
        "SELECT coalesce(sum(payload_bytes), 0) FROM segments WHERE segment_id IN "
        "(SELECT segment_id FROM extents WHERE branch_id = ?)",
        (branch.branch_id,),
    ).fetchone()[0]
    return BranchInfo(
        branch.name,
        branch.state,
        branch.head_seq,
        next(iter(json.loads(counts)), 0),
        num_tokens,
        parent,
        branch.fork_block,
        own_bytes,
        created_at,
    )


def _behind(reader: ContextReader, shared: int) -> tuple[list[DocumentInfo], int, int, int]:
    """Documents, blocks, tokens and payload bytes of a version behind a block."""
    version = reader.version
    blocks = version.num_blocks - shared
    tokens = version.num_tokens - int(reader.tokens_before(np.array([shared]))[0])
    documents = [d for d in reader.documents() if d.first_block + d.num_blocks > shared]
    nodes, first = 0, shared
    for lod in range(1, version.max_lod + 1):
        nodes += max(0, version.num_nodes(lod) - first)
        first //= K
    size = blocks * journal.block_level(0).node_bytes + nodes * version.encoding.node_bytes
    return documents, blocks, tokens, size
