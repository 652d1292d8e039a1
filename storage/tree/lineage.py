"""Which branch holds a node: a branch keeps what was written on it, and shares what came before its fork.

A fork copies nothing but the sibling groups it cuts through, at most 31 nodes a level, so that on every branch the
nodes of its own begin at a multiple of 32 and no group has two owners. Everything before them is read where the
ancestors wrote it. Rows and segments never move from one branch to another: that is what lets a reader that is
pinned to a version forget about everything that happens later.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import CorruptTreeError
from storage.schema import Encoding
from storage.tree import catalogue, journal
from storage.tree.journal import Level

LIVE = "live"
RETIRED = "retired"
"""A branch that has lost its name to another, or was discarded: it keeps its versions until they are collected."""
COLLECTED = "collected"
"""A retired branch that has no version any more, only what its descendants share with it."""


@dataclass(frozen=True)
class Branch:
    """A row of the catalogue's table of branches."""

    branch_id: int
    name: str
    state: str
    encoding_id: int
    head_seq: int
    parent_id: int | None = None
    fork_seq: int | None = None
    """The version of the parent that it was forked from."""
    fork_block: int = 0
    fork_encoding_id: int = 0
    """Whose gists it shares with its parent; of another encoding it holds every level from the first node on."""
    bases: tuple[int, ...] = ()
    """Where its own nodes begin: blocks of LOD0, nodes of LOD1, LOD2, …; levels not named begin at 0."""
    documents_from: int = 0
    """Documents that begin at this block or later are its own, earlier ones its ancestors'."""

    def level(self, encoding_id: int, encoding: Encoding, lod: int) -> Level:
        """Level `lod >= 1` of an encoding on this branch."""
        base = self.bases[lod] if encoding_id == self.fork_encoding_id and lod < len(self.bases) else 0
        return journal.gist_level(self.branch_id, encoding_id, encoding, lod, base)

    def block_level(self) -> Level:
        """Level of the tokens on this branch."""
        return journal.block_level(self.branch_id, self.bases[0] if self.bases else 0)


@dataclass(frozen=True)
class Part:
    """Nodes `[first, stop)` of a level, read from one branch. `stop` is None where the branch still grows."""

    level: Level
    first: int
    stop: int | None


@dataclass(frozen=True)
class DocumentPart:
    """Documents that begin in blocks `[first, stop)`, listed by one branch."""

    branch_id: int
    first: int
    stop: int | None


class Lineage:
    """A branch and its ancestors."""

    def __init__(self, branches: Sequence[Branch]) -> None:
        """From the branch itself to the one without a parent."""
        self.branches = tuple(branches)

    @property
    def branch(self) -> Branch:
        """The branch itself."""
        return self.branches[0]

    def block_parts(self) -> list[Part]:
        """Who holds which blocks, in timeline order."""
        return _parts([branch.block_level() for branch in self.branches])

    def parts(self, encoding_id: int, encoding: Encoding, lod: int) -> list[Part]:
        """Who holds which nodes of level `lod >= 1`, in timeline order."""
        return _parts([branch.level(encoding_id, encoding, lod) for branch in self.branches])

    def document_parts(self) -> list[DocumentPart]:
        """Who lists which documents, in timeline order."""
        parts: list[DocumentPart] = []
        stop: int | None = None
        for branch in self.branches:
            if stop is None or branch.documents_from < stop:
                parts.append(DocumentPart(branch.branch_id, branch.documents_from, stop))
                stop = branch.documents_from
        return parts[::-1]

    def shared_blocks(self, other: Lineage) -> int:
        """How many blocks from the first one on two branches have from the same writes.

        The deepest branch that both descend from gave each what came before its fork; two tips of one branch share
        what the shorter one has, which the caller knows.
        """
        mine = {branch.branch_id: position for position, branch in enumerate(self.branches)}
        for position, branch in enumerate(other.branches):
            if branch.branch_id in mine:
                forks = [b.fork_block for b in (*self.branches[: mine[branch.branch_id]], *other.branches[:position])]
                return min(forks, default=2**63 - 1)
        return 0


def _parts(levels: Sequence[Level]) -> list[Part]:
    parts: list[Part] = []
    stop: int | None = None
    for level in levels:
        # A fork of what its parent had itself from a fork leaves the parent nothing of its own.
        if stop is None or level.base < stop:
            parts.append(Part(level, level.base, stop))
            stop = level.base
        if stop == 0:
            break
    return parts[::-1]


_COLUMNS = (
    "branch_id, name, state, encoding_id, head_seq, parent_branch_id, fork_seq, coalesce(fork_block, 0), "
    "coalesce(fork_encoding_id, 0), bases, documents_from"
)


def _select(where: str) -> str:
    return f"SELECT {_COLUMNS}, {catalogue.sound('branches', 'branches')} FROM branches {where}"


def branches(db: sqlite3.Connection) -> list[Branch]:
    """All branches, retired ones too, in the order they were made."""
    return [_branch(row) for row in db.execute(_select("ORDER BY branch_id"))]


def find_branch(db: sqlite3.Connection, name: str) -> Branch | None:
    """The branch of that name."""
    row = db.execute(_select("WHERE name = ?"), (name,)).fetchone()
    return None if row is None else _branch(row)


def load_lineage(db: sqlite3.Connection, branch_id: int) -> Lineage:
    """A branch and its ancestors.

    Raises:
        CorruptTreeError: one of them is not in the catalogue.
    """
    found: list[Branch] = []
    wanted: int | None = branch_id
    while wanted is not None:
        row = db.execute(_select("WHERE branch_id = ?"), (wanted,)).fetchone()
        if row is None:
            raise CorruptTreeError(f"the catalogue has no branch {wanted}, which it names; restore it from a backup")
        branch = _branch(row)
        found.append(branch)
        wanted = branch.parent_id
    return Lineage(found)


def check_head(db: sqlite3.Connection, branch_id: int, head_seq: int) -> None:
    """Refuse a tip that is not the branch's newest version.

    Raises:
        CorruptTreeError: its number is damaged.
    """
    newest = db.execute("SELECT max(seq) FROM commits WHERE branch_id = ? AND seq >= ?", (branch_id, head_seq))
    catalogue.require_sound(newest.fetchone()[0] == head_seq, f"the tip of branch {branch_id}")


def _branch(row: tuple) -> Branch:
    *fields, bases, documents_from, is_sound = row
    catalogue.require_sound(is_sound, f"branch {row[1]!r}")
    return Branch(*fields, bases=tuple(json.loads(bases)), documents_from=documents_from)


def inherited_nodes(counts: Sequence[int], block: int) -> tuple[int, ...]:
    """Nodes of LOD1, LOD2, … that a fork at a block shares with a version of those counts."""
    inherited = []
    for count in counts:
        shared = min(count, block)
        if shared == 0:
            break
        inherited.append(shared)
        block //= K
    return tuple(inherited)
