"""Mends what is damaged and can be had again: from a backup, from what is sound, or from the tokens.

A damaged segment is never edited. A new one is written, one transaction of the catalogue puts it in the place of the
old one, with a line in the audit log, then the old one is removed. Tokens are never invented: they come from a backup
that holds the same segment, or from the damaged bytes themselves, where one bit turned back gives the checksum of the
file as it was sealed. What cannot be had is named by document and span.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import CorruptTreeError, StorageError
from storage.durable import fsync_folder
from storage.geometry import NO_TOKEN
from storage.schema import Encoding, StoredArray
from storage.tree import catalogue, journal, sealing
from storage.tree.journal import Level
from storage.tree.lineage import COLLECTED, Branch, branches, load_lineage
from storage.tree.reader import ContextReader
from storage.tree.sealing import SEGMENT_FOLDER
from storage.tree.segment import CRC_BYTES, Manifest, SegmentArraySpec, check_manifest, shard_bytes, shard_path
from storage.tree.verify import VerifyReport
from storage.tree.writer import ContextWriter

logger = logging.getLogger("megacontext.storage")


class MakeNodes(Protocol):
    """Makes gists of one encoding again."""

    def nodes(self, reader: ContextReader, lod: int, first: int, count: int) -> dict[str, np.ndarray]:
        """Nodes `[first, first + count)` of level `lod` >= 1 as stored bytes.

        Raises:
            CorruptTreeError: what they are made of is damaged.
        """
        ...


class Makers(Protocol):
    """Finds who makes the gists of an encoding."""

    def __call__(self, encoding: Encoding) -> MakeNodes:
        """The maker.

        Raises:
            MegaContextError: the net is not there, or is another one.
        """
        ...


@dataclass(frozen=True)
class Repair:
    """One thing that was damaged."""

    what: str
    """A segment's folder, or the journal's row by its nodes."""
    how: str
    """What mends it, or would; empty when nothing does."""
    lost: str = ""
    """What cannot be had again, and why."""


@dataclass
class _Unit:
    """Nodes of one level in a damaged segment."""

    level: Level
    first: int
    count: int
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """`(count * rows, width)` each, damaged groups included."""
    bad: dict[str, set[int]] = field(default_factory=dict)
    """By array, groups of 32 nodes (counted from `first`) that are not what was sealed."""


class TreeRepair:
    """Mends one context."""

    def __init__(
        self, folder: Path, name: str, report: VerifyReport, makers: Makers, backup: Path | None = None
    ) -> None:
        """Mend what a report names.

        Args:
            folder: the context's.
            name: the context's.
            report: of `verify_context`, with the catalogue sound.
            makers: asked when gists have to be made.
            backup: folder of the same context in another store.
        """
        self._folder = folder
        self._name = name
        self._report = report
        self._makers = makers
        self._backup = backup
        self._made_by: dict[int, MakeNodes] = {}

    def plan(self) -> list[Repair]:
        """What would be done. Reads, and loads no model."""
        with (
            catalogue.translated(self._folder / catalogue.CATALOGUE_FILE),
            contextlib.closing(catalogue.connect(self._folder, read_only=True)) as db,
        ):
            found = [self._look_at_segment(db, segment)[0] for segment in self._segments()]
            return found + [self._look_at_row(db, *row)[0] for row in self._rows()]

    def apply(self, writer: ContextWriter) -> list[Repair]:
        """Do it; lowest levels first, as upper ones are made of them.

        Raises:
            StaleWriterError, DiskFullError: what was mended before stays so.
            MegaContextError: of `makers`.
        """
        done: list[Repair] = []
        segments = sorted(self._segments(), key=self._lowest)
        rows = sorted(self._rows(), key=lambda row: row[2])
        with writer.sealer.paused(), writer.lock:
            for lod in range(max([*map(self._lowest, segments), *(row[2] for row in rows)], default=0) + 1):
                done += [self._mend_segment(writer, segment) for segment in segments if self._lowest(segment) == lod]
                done += [self._mend_row(writer, row) for row in rows if row[2] == lod]
        return done

    def _segments(self) -> list[str]:
        named = {nodes.segment for nodes in self._report.damaged_nodes if nodes.segment}
        return sorted(named | set(self._report.damaged_segments))

    def _rows(self) -> list[tuple[int, int, int, int]]:
        """Branch, encoding, LOD and first node of damaged rows of the journal."""
        return [(n.branch_id, n.encoding_id, n.lod, n.first) for n in self._report.damaged_nodes if not n.segment]

    def _lowest(self, segment: str) -> int:
        # Names begin with `lod0-1_` or `lod3_`.
        return int(segment.removeprefix("lod").partition("_")[0].partition("-")[0])

    # -- segments ----------------------------------------------------------------------------------------------------

    def _look_at_segment(self, db: sqlite3.Connection, segment: str) -> tuple[Repair, list[_Unit], bool]:
        """What can be done for a segment, its nodes, and whether a backup has it."""
        segment_id, manifest = db.execute(
            "SELECT segment_id, manifest FROM segments WHERE folder = ?", (segment,)
        ).fetchone()
        manifest = json.loads(manifest)
        units = [_Unit(*extent) for extent in self._extents(db, segment_id)]
        if self._backup is not None and not check_manifest(self._backup / SEGMENT_FOLDER / segment, manifest):
            return Repair(segment, "copied from the backup"), units, True
        turned = 0
        for unit in units:
            for stored in unit.level.layout:
                turned += self._read(segment, unit, stored, manifest)
        how = [f"{turned} bit(s) of the file turned back"] if turned else []
        lost: list[str] = []
        for unit in units:
            if unit.level.encoding_id == journal.BLOCKS:
                lost += self._lost(unit.level, [unit.first + group * K for group in sorted(unit.bad["tokens"])])
                how += ["counts and prefix sums made from the tokens"] * any(
                    unit.bad[name] for name in ("tokens_before", "num_tokens")
                )
            elif groups := set().union(*unit.bad.values()):
                how.append(f"{len(groups) * K} nodes of LOD{unit.level.lod} made anew")
        if lost:
            return Repair(segment, "", "; ".join(lost)), units, False
        return Repair(segment, "; ".join(how) or "written anew from what is sound in it"), units, False

    def _extents(self, db: sqlite3.Connection, segment_id: int) -> Iterator[tuple[Level, int, int]]:
        held = db.execute(
            "SELECT branch_id, encoding_id, lod, first, count FROM extents WHERE segment_id = ? ORDER BY lod, first",
            (segment_id,),
        ).fetchall()
        for branch_id, encoding_id, lod, first, count in held:
            yield self._level(db, branch_id, encoding_id, lod), first, count

    def _level(self, db: sqlite3.Connection, branch_id: int, encoding_id: int, lod: int) -> Level:
        branch = next(branch for branch in branches(db) if branch.branch_id == branch_id)
        return branch.level(encoding_id, _encoding(db, encoding_id), lod) if encoding_id else branch.block_level()

    def _read(self, segment: str, unit: _Unit, stored: StoredArray, manifest: Manifest) -> int:
        """Read an array past its damage; returns how many bits were turned back."""
        spec = sealing.array_spec(unit.level, stored, unit.count)
        groups = unit.count // K
        folder = self._folder / SEGMENT_FOLDER / segment
        shard = shard_path(folder, spec)
        try:
            data = shard.read_bytes()
        except OSError:
            data = b""
        digest = manifest.get(shard.relative_to(folder).as_posix(), {}).get("sha256", "")
        chunks, bad, turned = _payload(data, spec, digest)
        unit.arrays[stored.name] = np.frombuffer(chunks, stored.dtype).reshape(-1, stored.width).copy()
        unit.bad[stored.name] = {chunk * groups // spec.num_chunks for chunk in bad}
        return turned

    def _mend_segment(self, writer: ContextWriter, segment: str) -> Repair:
        with writer.reading() as db:
            repair, units, in_backup = self._look_at_segment(db, segment)
        if not repair.how:
            return repair
        try:
            if in_backup:
                assert self._backup is not None
                for unit in units:
                    unit.arrays = sealing.read_part(self._backup, segment, unit.level, unit.count, unit.count)
            else:
                self._derive(writer, units)
        except CorruptTreeError as error:
            return Repair(segment, "", str(error))
        parts = [sealing.Part(unit.level, unit.first, unit.count, unit.arrays) for unit in units]
        with writer.sealer.written(parts) as sealed, writer.commit() as db:
            (segment_id,) = db.execute("SELECT segment_id FROM segments WHERE folder = ?", (segment,)).fetchone()
            db.execute("DELETE FROM extents WHERE segment_id = ?", (segment_id,))
            db.execute("DELETE FROM segments WHERE segment_id = ?", (segment_id,))
            sealed.record(db)
            writer.audit(db, "repair", {"segment": segment, "how": repair.how, "now": sealed.folder_name})
        folder = self._folder / SEGMENT_FOLDER
        gone = folder / f".{segment}.tmp-gone"
        with contextlib.suppress(FileNotFoundError):
            (folder / segment).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        fsync_folder(folder)
        return repair

    def _derive(self, writer: ContextWriter, units: Sequence[_Unit]) -> None:
        """Make anew what is bad in a segment whose tokens are sound."""
        blocks = next((unit for unit in units if unit.level.encoding_id == journal.BLOCKS), None)
        if blocks is not None:
            self._count(writer, blocks)
        for unit in units:
            groups = set().union(*unit.bad.values()) if unit is not blocks else set()
            for group in sorted(groups):
                made = self._make(writer, unit.level, unit.first + group * K, K, blocks)
                for name, values in made.items():
                    rows = len(values)
                    unit.arrays[name][group * rows : (group + 1) * rows] = values

    def _count(self, writer: ContextWriter, blocks: _Unit) -> None:
        """Counts and prefix sums of a segment's blocks from its tokens."""
        if not (blocks.bad["tokens_before"] or blocks.bad["num_tokens"]):
            return
        counts = (blocks.arrays["tokens"].reshape(-1, K) != NO_TOKEN).sum(axis=1)
        before = 0
        if blocks.first:
            with self._reader(writer, blocks.level, blocks.first, 1) as reader:
                # From the block before: this segment's own prefix sum is what is damaged.
                held = reader.tokens(blocks.first - 1, 1)[1]
                before = int(reader.tokens_before(np.array([blocks.first - 1]))[0]) + int(held[0])
        blocks.arrays["num_tokens"] = counts.astype("u1")[:, None]
        blocks.arrays["tokens_before"] = (np.cumsum(counts) - counts + before).astype("<i8")[:, None]

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _make(
        self, writer: ContextWriter, level: Level, first: int, count: int, blocks: _Unit | None = None
    ) -> dict[str, np.ndarray]:
        """Gists of a level made again; `blocks` are tokens that the tree would refuse to serve."""
        with self._reader(writer, level, first, count) as reader:
            if level.encoding_id not in self._made_by:
                self._made_by[level.encoding_id] = self._makers(reader.version.encoding)
            seen: Any = reader if blocks is None else _WithBlocks(reader, blocks)
            return self._made_by[level.encoding_id].nodes(seen, level.lod, first, count)

    @contextlib.contextmanager
    def _reader(self, writer: ContextWriter, level: Level, first: int, count: int) -> Iterator[ContextReader]:
        """A reader in which the nodes of a branch can be seen: of the branch, or of one that descends from it."""
        encoding_id = level.encoding_id or None
        with writer.reading() as db:
            own = [branch for branch in branches(db) if branch.state != COLLECTED]
            seen = [branch for branch in own if _descends(db, branch, level.branch_id)]
        for branch in sorted(seen, key=lambda branch: branch.branch_id != level.branch_id):
            reader = ContextReader(self._folder, self._name, branch.name, branch.head_seq, encoding_id=encoding_id)
            with reader:
                if reader.version.num_nodes(max(level.lod, 1)) >= first + count:
                    yield reader
                    return
        raise CorruptTreeError(f"no version shows LOD{level.lod} nodes {first}-{first + count - 1}; `tree gc` them")

    # -- journal -----------------------------------------------------------------------------------------------------

    def _look_at_row(
        self, db: sqlite3.Connection, branch_id: int, encoding_id: int, lod: int, first: int
    ) -> tuple[Repair, Level, int, bytes | None]:
        """What can be done for a row, its level and number of nodes, and its payload where a backup has it."""
        level = self._level(db, branch_id, encoding_id, lod)
        count, crc = db.execute(
            "SELECT count, crc FROM journal WHERE branch_id = ? AND encoding_id = ? AND lod = ? AND first = ?",
            (*level.key, first),
        ).fetchone()
        what = f"journal row of LOD{lod} nodes {first}-{first + count - 1}"
        payload = self._row_in_backup(level, first, count, crc)
        if payload is not None:
            return Repair(what, "copied from the backup"), level, count, payload
        if encoding_id == journal.BLOCKS:
            return Repair(what, "", "; ".join(self._lost(level, [first], count))), level, count, None
        return Repair(what, f"{count} nodes of LOD{lod} made anew"), level, count, None

    def _row_in_backup(self, level: Level, first: int, count: int, crc: int) -> bytes | None:
        """The row's payload in the backup's catalogue: in the same place under the same checksum."""
        if self._backup is None or not (self._backup / catalogue.CATALOGUE_FILE).exists():
            return None
        with (
            contextlib.suppress(StorageError),
            contextlib.closing(catalogue.connect(self._backup, read_only=True)) as db,
            catalogue.translated(self._backup / catalogue.CATALOGUE_FILE),
        ):
            found = db.execute(
                "SELECT payload FROM journal WHERE branch_id = ? AND encoding_id = ? AND lod = ? AND first = ? "
                "AND count = ?",
                (*level.key, first, count),
            ).fetchone()
            if found is not None and journal.checksum(*level.key, first, count, found[0]) == crc:
                return found[0]
        return None

    def _mend_row(self, writer: ContextWriter, place: tuple[int, int, int, int]) -> Repair:
        first = place[3]
        with writer.reading() as db:
            repair, level, count, payload = self._look_at_row(db, *place)
        if not repair.how:
            return repair
        try:
            if payload is None:
                arrays = self._make(writer, level, first, count)
            else:
                arrays = journal.split(level, first, count, payload).arrays
        except CorruptTreeError as error:
            return Repair(repair.what, "", str(error))
        with writer.commit() as db:
            # Under a new id: readers may keep what they read of the old one.
            journal.delete_range(db, level, first, count)
            journal.insert(db, level, first, count, arrays, writer.row_ids)
            writer.audit(db, "repair", {"journal": level.key, "first": first, "count": count, "how": repair.how})
        return repair

    # -- what is lost ------------------------------------------------------------------------------------------------

    def _lost(self, level: Level, firsts: Sequence[int], count: int = K) -> list[str]:
        """Damaged tokens by document and span."""
        lines = []
        with contextlib.closing(catalogue.connect(self._folder, read_only=True)) as db:
            for first in firsts:
                stop = first + count
                rows = db.execute(
                    "SELECT key, first_block, iif(state = 'open', 1 << 40, num_blocks) AS num_blocks FROM documents "
                    "WHERE branch_id = ? AND first_block < ? AND first_block + num_blocks > ? ORDER BY first_block",
                    (level.branch_id, stop, first),
                ).fetchall()
                spans = [
                    f"document {key!r}, tokens {max(first - begin, 0) * K}-{min(stop - begin, size) * K - 1}"
                    for key, begin, size in rows
                ]
                lines.append(f"tokens of blocks {first}-{stop - 1} are damaged: {'; '.join(spans) or 'shared'}")
        return lines


class _WithBlocks:
    """A reader whose tokens of one segment come from memory: the file may be damaged still."""

    def __init__(self, reader: ContextReader, blocks: _Unit) -> None:
        self._reader = reader
        self._blocks = blocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def tokens(self, first_block: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """As `ContextReader.tokens`."""
        held = self._blocks
        tokens, counts = [], []
        for block in range(first_block, first_block + num_blocks):
            inside = block - held.first
            if 0 <= inside < held.count:
                row = held.arrays["tokens"].reshape(-1, K)[inside : inside + 1]
                tokens.append(row)
                counts.append((row != NO_TOKEN).sum(axis=1).astype(np.uint8))
            else:
                one = self._reader.tokens(block, 1)
                tokens.append(one[0])
                counts.append(one[1])
        return np.concatenate(tokens), np.concatenate(counts)

    def document_at(self, block: int) -> Any:
        """As `ContextReader.document_at`."""
        return self._reader.document_at(block)


def _descends(db: sqlite3.Connection, branch: Branch, branch_id: int) -> bool:
    return any(ancestor.branch_id == branch_id for ancestor in load_lineage(db, branch.branch_id).branches)


def _encoding(db: sqlite3.Connection, encoding_id: int) -> Encoding:
    return Encoding.from_json(
        db.execute("SELECT body FROM encodings WHERE encoding_id = ?", (encoding_id,)).fetchone()[0]
    )


def _payload(data: bytes, spec: SegmentArraySpec, sha256: str) -> tuple[bytes, list[int], int]:
    """A shard's chunks without their checksums, which of them are not what was sealed, and how many bits were turned
    back to have the file's sha256 again."""
    if len(data) != spec.file_bytes:
        return bytes(spec.num_chunks * spec.chunk_bytes), list(range(spec.num_chunks)), 0
    chunks, bad = [], []
    for number in range(spec.num_chunks):
        start = number * spec.stride
        chunk = data[start : start + spec.chunk_bytes]
        crc = int.from_bytes(data[start + spec.chunk_bytes : start + spec.stride], "little")
        chunks.append(chunk)
        if google_crc32c.value(chunk) != crc:
            bad.append(number)
    if not bad or _is_sealed(chunks, spec, sha256):
        # At most the checksums or the index are damaged.
        return b"".join(chunks), [], 0
    turned = list(chunks)
    for number in bad:
        start = number * spec.stride + spec.chunk_bytes
        turned[number] = _one_bit_turned(chunks[number], int.from_bytes(data[start : start + CRC_BYTES], "little"))
    if _is_sealed(turned, spec, sha256):
        return b"".join(turned), [], len(bad)
    return b"".join(chunks), bad, 0


def _is_sealed(chunks: Sequence[bytes], spec: SegmentArraySpec, sha256: str) -> bool:
    values = np.frombuffer(b"".join(chunks), spec.dtype)
    return hashlib.sha256(shard_bytes(spec, values)).hexdigest() == sha256


def _one_bit_turned(chunk: bytes, crc: int) -> bytes:
    """The chunk with the one bit turned that gives it its checksum; as it is when there is none."""
    data = bytearray(chunk)
    for place in range(len(data)):
        for bit in range(8):
            data[place] ^= 1 << bit
            if google_crc32c.value(bytes(data)) == crc:
                return bytes(data)
            data[place] ^= 1 << bit
    return chunk
