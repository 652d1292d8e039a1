"""Checks every byte and relation of a context, and says what is wrong in plain lines that name the place."""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import CorruptTreeError, StorageError
from storage.geometry import NO_TOKEN
from storage.schema import Encoding
from storage.tree import catalogue, journal
from storage.tree.journal import Level
from storage.tree.lineage import COLLECTED, LIVE, Branch, branches, load_lineage
from storage.tree.log_check import lost_commits
from storage.tree.reader import ContextReader
from storage.tree.sealing import SEGMENT_FOLDER, array_spec
from storage.tree.segment import SegmentArray, check_manifest
from storage.tree.states import PRUNED

BLOCKS_AT_A_TIME = 4096


@dataclass(frozen=True)
class DamagedNodes:
    """Nodes of one level whose bytes are not what was written."""

    branch_id: int
    encoding_id: int
    """0 for tokens, of which `lod` is 0 and nodes are blocks."""
    lod: int
    first: int
    count: int
    array: str
    """Name of the stored array; empty for all of them."""
    segment: str
    """Folder of the segment that holds them; empty for the journal."""


@dataclass
class VerifyReport:
    """What was looked at and what is wrong."""

    num_segments: int = 0
    num_bytes: int = 0
    num_journal_rows: int = 0
    num_blocks: int = 0
    num_documents: int = 0
    problems: list[str] = field(default_factory=list)
    damaged_segments: list[str] = field(default_factory=list)
    """Folders of segments of which a file is not what was written."""
    damaged_nodes: list[DamagedNodes] = field(default_factory=list)
    """Where the nodes in those segments, and in damaged rows of the journal, belong."""
    branch_blocks: dict[int, int] = field(default_factory=dict)
    """Blocks that are stored of each branch, by its number."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


def verify_context(folder: Path, name: str) -> VerifyReport:
    """Read everything a context holds, in every encoding.

    Checked: the SQLite file's own structure, every row's checksum, and that the log lost nothing; every file of every
    segment against its recorded size and checksum; every chunk's checksum and every shard's index; that each level is
    covered once and without a gap and has the nodes that its children make; that tokens, counts, prefix sums and
    documents agree. What lies beside the tree is checked by `storage.check`.

    Raises:
        CorruptTreeError: the catalogue cannot be opened at all, so there is nothing to compare with.
    """
    report = VerifyReport()
    path = folder / catalogue.CATALOGUE_FILE
    if lost := lost_commits(path):
        report.problems.append(lost)
    with contextlib.closing(catalogue.connect(folder, read_only=True)) as db:
        try:
            with catalogue.translated(path):
                found = [row[0] for row in db.execute("PRAGMA integrity_check(20)")]
            wrong = [f"{path}: {line}" for line in found if line != "ok"]
        except CorruptTreeError as error:
            wrong = [str(error)]
        report.problems += wrong
        if not wrong:
            _check_content(db, folder, name, report)
    return report


def _check_content(db: sqlite3.Connection, folder: Path, name: str, report: VerifyReport) -> None:
    path = folder / catalogue.CATALOGUE_FILE
    readable: list[Branch] = []
    try:
        # One snapshot: a writer that commits and seals meanwhile is no damage.
        with catalogue.translated(path), catalogue.snapshot(db):
            report.problems += [f"{path}: {row}" for row in catalogue.damaged_rows(db)]
            _check_segments(db, folder, report)
            found_branches = branches(db)
            _check_owners(db, report)
            _check_counts(db, report)
            stored: dict[tuple[int, int, int], int] = {}
            for branch in found_branches:
                stored |= _check_levels(db, folder, branch, report)
            readable = [branch for branch in found_branches if branch.state != COLLECTED]
            for branch in readable:
                _check_version(db, branch, stored, report)
            for branch in found_branches:
                level = branch.block_level()
                report.branch_blocks[branch.branch_id] = stored.get(level.key, level.base)
    except CorruptTreeError as error:
        # What was found may be of use still; most likely a row that is named already.
        report.problems.append(str(error))
    for branch in readable if report.ok else ():
        _check_timeline(folder, name, branch, report)


def _check_segments(db: sqlite3.Connection, folder: Path, report: VerifyReport) -> None:
    for segment_folder, stored_bytes, manifest in db.execute("SELECT folder, stored_bytes, manifest FROM segments"):
        report.num_segments += 1
        report.num_bytes += stored_bytes
        wrong = check_manifest(folder / SEGMENT_FOLDER / segment_folder, json.loads(manifest))
        report.problems += wrong
        if wrong:
            report.damaged_segments.append(segment_folder)


def _check_owners(db: sqlite3.Connection, report: VerifyReport) -> None:
    """That what names a row of another table finds it."""
    for table, column, of in (
        ("journal", "branch_id", "branches"),
        ("extents", "branch_id", "branches"),
        ("documents", "branch_id", "branches"),
        ("tails", "document_id", "documents"),
        ("commits", "encoding_id", "encodings"),
        ("tags", "seq", "commits"),
    ):
        missing = f"SELECT DISTINCT {column} FROM {table} WHERE {column} NOT IN (SELECT {column} FROM {of})"
        report.problems += [
            f"a row of {table} names {column} {row[0]!r}, which is not in {of}" for row in db.execute(missing)
        ]


def _check_counts(db: sqlite3.Connection, report: VerifyReport) -> None:
    """That no version has a parent without all of its children, and that a branch's versions only grow."""
    tokens: dict[int, int] = {}
    for seq, branch_id, num_tokens, text in db.execute(
        "SELECT seq, branch_id, num_tokens, level_counts FROM commits ORDER BY seq"
    ):
        counts = json.loads(text)
        wrong = [lod for lod, (below, above) in enumerate(itertools.pairwise(counts), 2) if above > below // K]
        report.problems += [
            f"version {seq}: {counts[lod - 1]} nodes of LOD{lod}, with {counts[lod - 2]} of LOD{lod - 1} below"
            for lod in wrong
        ]
        before, tokens[branch_id] = tokens.get(branch_id, 0), num_tokens
        if not before <= num_tokens <= (counts[0] if counts else 0) * K:
            report.problems.append(
                f"version {seq}: {num_tokens} tokens in {counts[0] if counts else 0} blocks, after {before} in the "
                "version before it"
            )


def _check_levels(
    db: sqlite3.Connection, folder: Path, branch: Branch, report: VerifyReport
) -> dict[tuple[int, int, int], int]:
    """Checksums of what a branch holds itself, and that each level of it goes on from its base without a gap.

    Returns:
        Where each level ends, by `Level.key`.
    """
    encodings = {row[0]: Encoding.from_json(row[1]) for row in db.execute("SELECT encoding_id, body FROM encodings")}
    held = db.execute(
        "SELECT encoding_id, lod FROM extents WHERE branch_id = ? UNION SELECT encoding_id, lod FROM journal "
        "WHERE branch_id = ? ORDER BY encoding_id, lod",
        (branch.branch_id, branch.branch_id),
    ).fetchall()
    ends: dict[tuple[int, int, int], int] = {}
    for encoding_id, lod in held:
        if encoding_id == journal.BLOCKS:
            level = branch.block_level()
        elif encoding_id in encodings:
            level = branch.level(encoding_id, encodings[encoding_id], lod)
        else:
            report.problems.append(f"LOD{lod}: nodes of encoding {encoding_id}, which the catalogue does not describe")
            continue
        ranges = _check_extents(db, folder, level, report) + _check_rows(db, level, report)
        expected = level.base
        for first, count, where in sorted(ranges):
            if first != expected:
                fault = "missing" if first > expected else "stored twice"
                report.problems.append(
                    f"branch {branch.name!r}: LOD{lod} (encoding {encoding_id}): nodes {min(first, expected)}-"
                    f"{max(first, expected) - 1} are {fault}, before {where}"
                )
            expected = max(expected, first + count)
        ends[level.key] = expected
    return ends


def _check_version(
    db: sqlite3.Connection, branch: Branch, stored: dict[tuple[int, int, int], int], report: VerifyReport
) -> None:
    """That the newest version of a branch has on every level what it promises, from its ancestors and itself."""
    (newest,) = db.execute("SELECT max(seq) FROM commits WHERE branch_id = ?", (branch.branch_id,)).fetchone()
    if newest != branch.head_seq:
        report.problems.append(
            f"row of branches (branch_id {branch.branch_id}) says version {branch.head_seq}, the newest is {newest}"
        )
    commit = db.execute(
        "SELECT c.level_counts, c.encoding_id, e.body FROM commits c JOIN encodings e USING (encoding_id) "
        "WHERE c.seq = ?",
        (branch.head_seq,),
    ).fetchone()
    if commit is None:
        report.problems.append(f"branch {branch.name!r} points at version {branch.head_seq}, which is not there")
        return
    counts, encoding_id, encoding = json.loads(commit[0]), commit[1], Encoding.from_json(commit[2])
    lineage = load_lineage(db, branch.branch_id)
    own_levels = [lod for number, made_by, lod in stored if (number, made_by) == (branch.branch_id, encoding_id)]
    for lod in range(max([len(counts), *own_levels]) + 1):
        parts = lineage.parts(encoding_id, encoding, lod) if lod else lineage.block_parts()
        promised = counts[max(lod - 1, 0)] if max(lod, 1) <= len(counts) else 0
        for part in parts:
            # Ancestors may have gone on since, and a retired branch may keep more for its descendants.
            stop = promised if part.stop is None else part.stop
            end = stored.get(part.level.key, part.level.base)
            if end < stop or (branch.state == LIVE and part.stop is None and end > stop):
                report.problems.append(
                    f"branch {branch.name!r}: LOD{lod}: the newest version has {stop} nodes, {end} are stored"
                )


def _check_extents(
    db: sqlite3.Connection, folder: Path, level: Level, report: VerifyReport
) -> list[tuple[int, int, str]]:
    ranges = []
    for first, count, segment in db.execute(
        "SELECT e.first, e.count, s.folder FROM extents e LEFT JOIN segments s USING (segment_id) "
        "WHERE branch_id = ? AND encoding_id = ? AND lod = ?",
        level.key,
    ):
        ranges.append((first, count, f"segment {segment}"))
        if segment is None:
            report.problems.append(
                f"LOD{level.lod} nodes {first}-{first + count - 1}: the catalogue has no row of their segment"
            )
            continue
        for stored in level.layout:
            try:
                array = SegmentArray(folder / SEGMENT_FOLDER / segment, array_spec(level, stored, count))
            except StorageError as error:
                report.problems.append(f"LOD{level.lod} nodes {first}-{first + count - 1}: {error}")
                report.damaged_nodes.append(DamagedNodes(*level.key, first, count, stored.name, segment))
                continue
            for chunk in range(array.spec.num_chunks):
                try:
                    array.verify_chunk(chunk)
                except CorruptTreeError as error:
                    size = count // array.spec.num_chunks
                    node = first + chunk * size
                    report.problems.append(f"LOD{level.lod} nodes {node}-{node + size - 1}: {error}")
                    report.damaged_nodes.append(DamagedNodes(*level.key, node, size, stored.name, segment))
    return ranges


def _check_rows(db: sqlite3.Connection, level: Level, report: VerifyReport) -> list[tuple[int, int, str]]:
    ranges = []
    for row_id, first, count, crc, payload in db.execute(
        "SELECT row_id, first, count, crc, payload FROM journal WHERE branch_id = ? AND encoding_id = ? AND lod = ?",
        level.key,
    ):
        report.num_journal_rows += 1
        report.num_bytes += len(payload)
        ranges.append((first, count, f"journal row {row_id}"))
        try:
            journal.unpack(level, first, count, crc, payload)
        except CorruptTreeError as error:
            report.problems.append(str(error))
            report.damaged_nodes.append(DamagedNodes(*level.key, first, count, "", ""))
    return ranges


def _check_timeline(folder: Path, name: str, branch: Branch, report: VerifyReport) -> None:
    """Tokens, counts, prefix sums and documents against each other; of `report` those counts that grow with a tree are
    the longest branch's."""
    try:
        with ContextReader(folder, name, branch.name, branch.head_seq) as reader:
            version = reader.version
            report.num_blocks = max(report.num_blocks, version.num_blocks)
            total = 0
            for first in range(0, version.num_blocks, BLOCKS_AT_A_TIME):
                size = min(BLOCKS_AT_A_TIME, version.num_blocks - first)
                stored = reader.stored_arrays(0, first, size)
                tokens, counts = stored["tokens"].reshape(size, K), stored["num_tokens"].reshape(size)
                pruned = np.isin(reader.block_states(first, size), PRUNED)
                before = reader.tokens_before(np.arange(first, first + size))
                expected = total + np.cumsum(counts, dtype=np.int64) - counts
                for block in np.flatnonzero(before != expected)[:5]:
                    report.problems.append(
                        f"block {first + block}: prefix sum {before[block]}, counted {expected[block]}"
                    )
                wrong = ((tokens == NO_TOKEN) != (np.arange(K) >= counts[:, None])).any(axis=1)
                # Of a pruned block either all tokens are there still, or none is.
                wrong &= ~(pruned & (tokens == NO_TOKEN).all(axis=1))
                report.problems += [f"block {first + b}: tokens and count disagree" for b in np.flatnonzero(wrong)[:5]]
                total += int(counts.sum(dtype=np.int64))
            if total != version.num_tokens:
                report.problems.append(f"the version says {version.num_tokens} tokens, {total} are stored")
            documents = reader.documents()
            starts = np.array([document.first_block for document in documents], np.int64)
            sizes = np.array([document.num_blocks for document in documents], np.int64)
            counted = reader.tokens_before(starts + sizes) - reader.tokens_before(starts)
            expected_block = 0
            report.num_documents = max(report.num_documents, len(documents))
            for document, num_tokens in zip(documents, counted, strict=True):
                if document.num_tokens != num_tokens:
                    report.problems.append(
                        f"document {document.meta.key!r} says {document.num_tokens} tokens, its blocks hold "
                        f"{num_tokens}"
                    )
                if document.first_block != expected_block:
                    report.problems.append(
                        f"document {document.meta.key!r} begins at block {document.first_block}, "
                        f"expected {expected_block}"
                    )
                expected_block = document.first_block + document.num_blocks
            if expected_block != version.num_blocks:
                report.problems.append(f"documents cover {expected_block} of {version.num_blocks} blocks")
    except StorageError as error:
        report.problems.append(str(error))
