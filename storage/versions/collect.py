"""Garbage collection: removes what no version needs that is named, tagged, pinned or young enough.

Nodes of a branch are a run from its base on, so what its kept versions and its kept descendants need of a level is a
prefix of it, and all behind that prefix can go. A segment goes when none of its nodes is needed, and is replaced by a
shorter one when few are. First the shorter ones are written, then the catalogue forgets, in one transaction, then the
files are removed; a crash between leaves folders that no row names, which the next writer removes. Files are written
and removed without the writer's lock, so that commits go on meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.config import TOKENS_PER_BLOCK as K
from storage.durable import fsync_folder
from storage.schema import Encoding
from storage.tree import catalogue, journal, sealing
from storage.tree.journal import Level
from storage.tree.lineage import COLLECTED, LIVE, RETIRED, Branch, branches, load_lineage
from storage.tree.sealing import SEGMENT_FOLDER
from storage.tree.writer import ContextWriter

KEEP_DAYS = 14.0
"""How long a version can be gone back to by default, once its branch was retired or its gists were replaced."""

CLIP_SHARE = 0.5
"""A segment is replaced by a shorter one when so much of it is not needed."""

_ALL = 2**62

LevelKey = tuple[int, int, int]
"""Branch, encoding and LOD: `Level.key`."""

_Rest = tuple[Level, int, int, journal.Arrays]
"""Nodes of a level by number and count, that go from a segment back to the journal."""


@dataclass
class Garbage:
    """What a collection removes, or would."""

    segments: list[str] = field(default_factory=list)
    """Folders."""
    segment_bytes: int = 0
    shortened: list[str] = field(default_factory=list)
    """Folders that are replaced by shorter ones."""
    shortened_bytes: int = 0
    """What that saves of payload."""
    journal_rows: int = 0
    journal_bytes: int = 0
    """Their pages are used again; the catalogue's file does not shrink."""
    versions: int = 0
    documents: int = 0
    """Rows of retired branches."""
    branches: list[str] = field(default_factory=list)
    kept_versions: int = 0
    """Versions that had to be looked at because something needs them: a branch, a tag, a pin or their age."""

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(
            self.segments or self.shortened or self.journal_bytes or self.versions or self.documents or self.branches
        )


@dataclass(frozen=True)
class _Group:
    """The versions of one branch that read one encoding: they share their nodes, and the newest has all of them."""

    branch_id: int
    encoding_id: int
    newest: int
    ended_at: float | None
    """When another encoding or branch took its place; None for what a live branch shows."""


def collect(
    writer: ContextWriter,
    pins: Iterable[int],
    *,
    keep_s: float,
    clip_share: float = CLIP_SHARE,
    dry_run: bool = False,
    now: float | None = None,
) -> Garbage:
    """Collect a context's garbage. `Store.collect` calls it with the leases there are, and lets none be taken.

    Args:
        writer: of the context.
        pins: versions that readers hold.
        keep_s: how long a version can be gone back to once its branch was retired or its gists replaced, in seconds.
        clip_share: which share of a segment must be unneeded for it to be replaced by a shorter one; 0 leaves no
            byte behind that nothing needs.
        dry_run: only look.
        now: unix seconds; None asks the clock.

    Raises:
        StaleWriterError, DiskFullError: nothing was removed.
    """
    now = time.time() if now is None else now
    pinned = list(pins)

    def collection_of(db: sqlite3.Connection) -> _Collection:
        return _Collection(db, pinned, now - keep_s, clip_share)

    # What is being sealed would be recorded for nodes that are gone by then.
    with writer.sealer.paused(), contextlib.ExitStack() as files:
        with _reading_beside(writer) as db:
            planned = collection_of(db)
            garbage = planned.look()
        if dry_run or not garbage:
            return garbage
        shorter = _shortened(writer, planned, files)
        files.enter_context(writer.lock)
        with writer.commit() as db:
            collection = collection_of(db)
            garbage = collection.look()
            if not collection.shortens_as(planned):
                # A branch or a tag came or went while the files were written: what they replace is another part now.
                for sealed in shorter:
                    shutil.rmtree(writer.folder / SEGMENT_FOLDER / sealed.folder_name, ignore_errors=True)
                planned = collection
                shorter = _shortened(writer, planned, files)
            # First: the newest row of the versions may be among what goes, and no number may come twice.
            writer.mark(db, "collect")
            collection.forget(writer.row_ids, planned.rests)
            for sealed in shorter:
                sealed.record(db)
            writer.audit(
                db,
                "collect",
                {
                    "keep_s": keep_s,
                    "segments": len(garbage.segments),
                    "bytes": garbage.segment_bytes + garbage.journal_bytes,
                    "versions": garbage.versions,
                },
            )
        writer.reload()
    folder = writer.folder / SEGMENT_FOLDER
    for name in (*garbage.segments, *garbage.shortened):
        # The name goes first: who looks for the segment finds all of it or nothing.
        gone = folder / f".{name}.tmp-gone"
        with contextlib.suppress(FileNotFoundError):
            (folder / name).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    fsync_folder(folder)
    return garbage


@contextlib.contextmanager
def _reading_beside(writer: ContextWriter) -> Iterator[sqlite3.Connection]:
    """The newest commit of a writer's context, without its lock."""
    with (
        contextlib.closing(catalogue.connect(writer.folder, read_only=True)) as connection,
        catalogue.translated(writer.folder / catalogue.CATALOGUE_FILE),
        catalogue.snapshot(connection) as db,
    ):
        yield db


def _shortened(
    writer: ContextWriter, collection: _Collection, files: contextlib.ExitStack
) -> list[sealing.SealedSegment]:
    return [files.enter_context(writer.sealer.written(parts)) for parts in collection.shorter(writer.folder)]


class _Collection:
    """One look at a catalogue; call inside a transaction."""

    def __init__(self, db: sqlite3.Connection, pins: Iterable[int], oldest: float, clip_share: float) -> None:
        self._db = db
        self._clip_share = clip_share
        self._branches = {branch.branch_id: branch for branch in branches(db)}
        self._encodings = {
            row[0]: Encoding.from_json(row[1]) for row in db.execute("SELECT encoding_id, body FROM encodings")
        }
        groups = self._groups()
        young = [g for g in groups if g.ended_at is None or g.ended_at > oldest]
        named = {row[0] for row in db.execute("SELECT seq FROM tags")} | set(pins)
        self._kept = {group.newest for group in young} | named
        self._kept_groups = {(group.branch_id, group.encoding_id) for group in young}
        self._needed: dict[LevelKey, int] = {}
        self._read: set[tuple[int, int]] = set()
        self._needed_documents: dict[int, int] = {}
        for seq in self._kept:
            self._need_version(seq)
        self._need_unfinished_encodings(groups)
        self._extents: list[tuple[LevelKey, int]] = []
        self._rows: list[int] = []
        self._segments: list[int] = []
        self._shorter: list[tuple[int, str, list[tuple[Level, int, int, int]]]] = []
        self.rests: list[_Rest] = []
        """What is needed of groups that are not needed as a whole, from `shorter` on."""
        self._trimmed: list[tuple[Level, int, int]] = []

    def _groups(self) -> list[_Group]:
        found = self._db.execute(
            "SELECT branch_id, encoding_id, max(seq) FROM commits GROUP BY branch_id, encoding_id"
        ).fetchall()
        groups = []
        for branch_id, encoding_id, newest in found:
            branch = self._branches[branch_id]
            if branch.state == LIVE and encoding_id == branch.encoding_id:
                groups.append(_Group(branch_id, encoding_id, newest, None))
                continue
            next_at = self._db.execute(
                "SELECT created_at FROM commits WHERE branch_id = ? AND seq > ? ORDER BY seq LIMIT 1",
                (branch_id, newest),
            ).fetchone()
            retired_at = self._db.execute(
                "SELECT retired_at FROM branches WHERE branch_id = ?", (branch_id,)
            ).fetchone()
            ends = [row[0] for row in (next_at, retired_at) if row is not None and row[0] is not None]
            groups.append(_Group(branch_id, encoding_id, newest, min(ends, default=0.0)))
        return groups

    def _need(self, key: LevelKey, stop: int) -> None:
        self._needed[key] = max(self._needed.get(key, 0), stop)

    def _need_version(self, seq: int) -> None:
        row = self._db.execute(
            "SELECT branch_id, encoding_id, level_counts FROM commits WHERE seq = ?", (seq,)
        ).fetchone()
        if row is None:
            # A lease on what an earlier collection took; its reader was told.
            return
        branch_id, encoding_id, counts = row[0], row[1], json.loads(row[2])
        lineage = load_lineage(self._db, branch_id)
        self._read |= {(branch.branch_id, encoding_id) for branch in lineage.branches}
        for lod, count in enumerate((*counts[:1], *counts)):
            parts = lineage.parts(encoding_id, self._encodings[encoding_id], lod) if lod else lineage.block_parts()
            for part in parts:
                self._need(part.level.key, count if part.stop is None else part.stop)
        # Documents are shared up to another block than nodes: a fork copies the group it cuts, not the rows of those
        # documents that end in it.
        num_blocks = counts[0] if counts else 0
        for part in lineage.document_parts():
            stop = num_blocks if part.stop is None else part.stop
            self._needed_documents[part.branch_id] = max(self._needed_documents.get(part.branch_id, 0), stop)

    def _need_unfinished_encodings(self, groups: list[_Group]) -> None:
        """Gists that are being made on a live branch, and that no version shows yet."""
        shown = {(group.branch_id, group.encoding_id) for group in groups}
        for table in ("journal", "extents"):
            for key in self._db.execute(f"SELECT DISTINCT branch_id, encoding_id, lod FROM {table}").fetchall():
                unfinished = key[1] != journal.BLOCKS and key[:2] not in shown
                if unfinished and self._branches[key[0]].state == LIVE:
                    self._need_unfinished(*key)

    def _need_unfinished(self, branch_id: int, encoding_id: int, lod: int) -> None:
        lineage = load_lineage(self._db, branch_id)
        self._read |= {(branch.branch_id, encoding_id) for branch in lineage.branches}
        for part in lineage.parts(encoding_id, self._encodings[encoding_id], lod):
            self._need(part.level.key, _ALL if part.stop is None else part.stop)

    # -- what goes ---------------------------------------------------------------------------------------------------

    def look(self) -> Garbage:
        """Find what nothing needs."""
        garbage = Garbage(kept_versions=len(self._kept))
        extents = self._db.execute(
            "SELECT branch_id, encoding_id, lod, first, count, segment_id FROM extents"
        ).fetchall()
        held: dict[int, list[tuple[LevelKey, int, int]]] = {}
        for *key, first, count, segment_id in extents:
            held.setdefault(segment_id, []).append((tuple(key), first, count))
        for segment_id, folder, size in self._db.execute("SELECT segment_id, folder, stored_bytes FROM segments"):
            kept = [
                (self._level(key), first, count, min(count, self._needed.get(key, 0) - first))
                for key, first, count in held.get(segment_id, [])
            ]
            kept = [part for part in kept if part[3] > 0]
            unneeded = size - sum(level.node_bytes * needed for level, _, _, needed in kept)
            whole = len(kept) == len(held.get(segment_id, [])) and all(n == needed for _, _, n, needed in kept)
            if not kept:
                self._segments.append(segment_id)
                garbage.segments.append(folder)
                garbage.segment_bytes += size
            elif not whole and unneeded >= self._clip_share * size:
                self._shorter.append((segment_id, folder, kept))
                garbage.shortened.append(folder)
                garbage.shortened_bytes += unneeded
            else:
                # It stays for the sake of some levels; of the others it holds nothing from now on.
                held[segment_id] = [(key, n, c) for key, n, c in held[segment_id] if n >= self._needed.get(key, 0)]
            self._extents += [(key, first) for key, first, _ in held.get(segment_id, [])]
        rows = self._db.execute(
            "SELECT row_id, branch_id, encoding_id, lod, first, count, length(payload) FROM journal"
        )
        for row_id, *key, first, count, size in rows:
            needed = self._needed.get(tuple(key), 0) - first
            if needed <= 0:
                self._rows.append(row_id)
                garbage.journal_rows += 1
                garbage.journal_bytes += size
            elif needed < count:
                self._trimmed.append((self._level(tuple(key)), row_id, needed))
                garbage.journal_bytes += size * (count - needed) // count
        self._gone_versions = self._unneeded_versions()
        garbage.versions = len(self._gone_versions)
        self._gone_branches, self._collected = self._unneeded_branches()
        garbage.branches = [branch.name for branch in (*self._gone_branches, *self._collected)]
        garbage.documents = sum(self._count_documents(branch) for branch in self._branches.values())
        return garbage

    def _unneeded_versions(self) -> list[int]:
        return [
            seq
            for seq, *group in self._db.execute("SELECT seq, branch_id, encoding_id FROM commits")
            if tuple(group) not in self._kept_groups and seq not in self._kept
        ]

    def _unneeded_branches(self) -> tuple[list[Branch], list[Branch]]:
        """Retired branches without a version, those that others descend from apart."""
        left = {
            row[0] for row in self._db.execute("SELECT DISTINCT branch_id FROM commits").fetchall()
        } - self._branches_without_versions()
        empty = [branch for branch in self._branches.values() if branch.branch_id not in left and branch.state != LIVE]
        num_children = Counter(branch.parent_id for branch in self._branches.values())
        gone: list[Branch] = []
        collected: list[Branch] = []
        # Children have higher ids than their parents, so from the newest on each finds its own gone already.
        for branch in sorted(empty, key=lambda b: -b.branch_id):
            if num_children[branch.branch_id] == 0:
                gone.append(branch)
                num_children[branch.parent_id] -= 1
            elif branch.state != COLLECTED:
                collected.append(branch)
        return gone, collected

    def _branches_without_versions(self) -> set[int]:
        gone = set(self._gone_versions)
        counts: dict[int, int] = {}
        for seq, branch_id in self._db.execute("SELECT seq, branch_id FROM commits"):
            counts[branch_id] = counts.get(branch_id, 0) + (seq not in gone)
        return {branch_id for branch_id, count in counts.items() if count == 0}

    def _document_stop(self, branch: Branch) -> int:
        """Documents of a retired branch that begin here or later are of no version."""
        return _ALL if branch.state == LIVE else self._needed_documents.get(branch.branch_id, 0)

    def _count_documents(self, branch: Branch) -> int:
        return self._db.execute(
            "SELECT count(*) FROM documents WHERE branch_id = ? AND first_block >= ?",
            (branch.branch_id, self._document_stop(branch)),
        ).fetchone()[0]

    def _level(self, key: LevelKey) -> Level:
        branch_id, encoding_id, lod = key
        if encoding_id == journal.BLOCKS:
            return journal.block_level(branch_id)
        return journal.gist_level(branch_id, encoding_id, self._encodings[encoding_id], lod)

    def shorter(self, folder: Path) -> Iterator[list[sealing.Part]]:
        """What is needed of the segments that are to be shortened, one after the other: whole groups. What is needed
        of a group that is not needed as a whole goes to the journal (`forget`)."""
        for _, name, kept in self._shorter:
            parts = []
            for level, first, count, needed in kept:
                arrays = sealing.read_part(folder, name, level, count, needed)
                whole = needed // K * K
                if whole < needed:
                    rest = {s.name: arrays[s.name][whole * s.rows_per_node :] for s in level.layout}
                    self.rests.append((level, first + whole, needed - whole, rest))
                if whole:
                    head = {s.name: arrays[s.name][: whole * s.rows_per_node] for s in level.layout}
                    parts.append(sealing.Part(level, first, whole, head))
            if parts:
                yield parts

    def shortens_as(self, other: _Collection) -> bool:
        """Whether the same segments are shortened to the same nodes."""
        return self._shorter == other._shorter

    def forget(self, row_ids: Iterator[int], rests: Iterable[_Rest]) -> None:
        """Delete the rows of what `look` found; what is left of groups gets rows of these ids."""
        db = self._db
        rests = list(rests)
        db.executemany(
            "DELETE FROM extents WHERE branch_id = ? AND encoding_id = ? AND lod = ? AND first = ?",
            [(*key, first) for key, first in self._extents],
        )
        segments = [*self._segments, *(segment_id for segment_id, _, _ in self._shorter)]
        db.executemany("DELETE FROM segments WHERE segment_id = ?", [(number,) for number in segments])
        for level, row_id, needed in self._trimmed:
            run = journal.load(db, level, row_id)
            assert run is not None
            arrays = {s.name: run.arrays[s.name][: needed * s.rows_per_node] for s in level.layout}
            rests.append((level, run.first, needed, arrays))
            self._rows.append(row_id)
        db.executemany("DELETE FROM journal WHERE row_id = ?", [(number,) for number in self._rows])
        for level, first, count, arrays in rests:
            journal.insert(db, level, first, count, arrays, row_ids)
        # Gists that a branch shared with its parent and that no version shows any more are not shared now.
        for branch in self._branches.values():
            if (branch.branch_id, branch.fork_encoding_id) not in self._read:
                db.execute("UPDATE branches SET fork_encoding_id = NULL WHERE branch_id = ?", (branch.branch_id,))
        for branch in self._branches.values():
            db.execute(
                "DELETE FROM documents WHERE branch_id = ? AND first_block >= ?",
                (branch.branch_id, self._document_stop(branch)),
            )
        db.execute("DELETE FROM tails WHERE document_id NOT IN (SELECT document_id FROM documents)")
        db.executemany("DELETE FROM commits WHERE seq = ?", [(seq,) for seq in self._gone_versions])
        # A retired branch whose newest version went stands at the newest that is kept.
        db.execute(
            "UPDATE branches SET head_seq = coalesce((SELECT max(seq) FROM commits c WHERE c.branch_id = "
            "branches.branch_id), head_seq) WHERE state = ?",
            (RETIRED,),
        )
        db.executemany("DELETE FROM branches WHERE branch_id = ?", [(b.branch_id,) for b in self._gone_branches])
        db.executemany(
            "UPDATE branches SET state = ? WHERE branch_id = ?", [(COLLECTED, b.branch_id) for b in self._collected]
        )
