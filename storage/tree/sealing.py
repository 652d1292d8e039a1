"""Sealing: how a range of nodes becomes a Zarr segment and a few rows of the catalogue."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import SLOTS_PER_SUPER_BLOCK
from cluster.config import TOKENS_PER_BLOCK as K
from storage.durable import disk_errors, fsync_folder
from storage.geometry import NO_TOKEN
from storage.schema import StoredArray
from storage.tree import journal
from storage.tree.journal import Arrays, Level
from storage.tree.segment import Manifest, SegmentArray, SegmentArraySpec, WriteFile, write_segment

SEGMENT_FOLDER = "segments"


def is_ours(folder_name: str) -> bool:
    """Whether a folder in `segments` was made by sealing: a segment, or its temporary name. Others are left alone."""
    name = folder_name.removeprefix(".")
    return name.startswith("lod") and (name.endswith(".zarr") or ".zarr.tmp-" in name)


@dataclass(frozen=True)
class Part:
    """Nodes of one level that go into a segment; counts are multiples of 32."""

    level: Level
    first: int
    count: int
    arrays: Arrays


def array_spec(level: Level, stored: StoredArray, count: int) -> SegmentArraySpec:
    """How a level's array lies in a segment: one chunk a sibling group, tokens flat in chunks of 1,024 slots."""
    path = f"lod{level.lod}/{stored.name}"
    if level.encoding_id == journal.BLOCKS:
        num_rows = count * stored.width
        chunk = SLOTS_PER_SUPER_BLOCK if stored.name == "tokens" else K
        # What holds no token was pruned. It is none of the numbers that tell how many tokens there were.
        fill = NO_TOKEN if stored.name == "tokens" else None
        return SegmentArraySpec(path, stored.dtype, num_rows, 0, chunk, fill=fill)
    rows = stored.rows_per_node
    logical = stored.logical_dtype if stored.logical_dtype == "bfloat16" else ""
    return SegmentArraySpec(path, stored.dtype, count * rows, stored.width, K * rows, logical)


def open_tokens(context_folder: Path, segment: str, level: Level, count: int) -> SegmentArray:
    """A segment's tokens of `count` blocks.

    Raises:
        CorruptTreeError: the file is not what was written.
    """
    stored = next(stored for stored in level.layout if stored.name == "tokens")
    return SegmentArray(context_folder / SEGMENT_FOLDER / segment, array_spec(level, stored, count))


def read_part(context_folder: Path, segment: str, level: Level, count: int, wanted: int) -> Arrays:
    """The first `wanted` of the `count` nodes that a segment holds of a level, as `Part.arrays`.

    Raises:
        CorruptTreeError: a checksum does not match.
    """
    arrays: Arrays = {}
    for stored in level.layout:
        array = SegmentArray(context_folder / SEGMENT_FOLDER / segment, array_spec(level, stored, count))
        rows = array.rows(0, wanted * array.spec.num_rows // count)
        arrays[stored.name] = rows.reshape(-1, stored.width)
    return arrays


@dataclass(frozen=True)
class SealedSegment:
    """A segment on disk that the catalogue does not know yet."""

    folder_name: str
    payload_bytes: int
    manifest: Manifest
    parts: list[Part]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(entry["bytes"] for entry in self.manifest.values())

    def record(self, connection: sqlite3.Connection) -> None:
        """Make it known; call inside a transaction."""
        cursor = connection.execute(
            "INSERT INTO segments (folder, payload_bytes, stored_bytes, manifest, sealed_at) VALUES (?, ?, ?, ?, ?)",
            (self.folder_name, self.payload_bytes, self.stored_bytes, json.dumps(self.manifest), time.time()),
        )
        for part in self.parts:
            connection.execute(
                "INSERT INTO extents (segment_id, branch_id, encoding_id, lod, first, count) VALUES (?, ?, ?, ?, ?, ?)",
                (cursor.lastrowid, *part.level.key, part.first, part.count),
            )


def remove_folders(context_folder: Path, names: Iterable[str]) -> None:
    """Remove segments that no row names any more.

    Raises:
        StorageError: the disk refused; the context's next writer removes them.
    """
    folder = context_folder / SEGMENT_FOLDER
    with disk_errors(f"cannot remove segments from {folder}, though the catalogue needs them no more"):
        for name in names:
            # The name goes first: who looks for the segment finds all of it or nothing.
            gone = folder / f".{name}.tmp-gone"
            with contextlib.suppress(FileNotFoundError):
                (folder / name).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        fsync_folder(folder)


def write(
    context_folder: Path,
    tag: str,
    parts: list[Part],
    attributes: Mapping[str, Any],
    write: WriteFile | None = None,
    pool: ThreadPoolExecutor | None = None,
) -> SealedSegment:
    """Write parts as one durable segment (`write_segment` has `write` and `pool`). `tag` makes its name unique: the
    writer's epoch keeps a fenced writer's files apart, a count the writer's own attempts.

    Raises:
        OSError: the disk refused; nothing is left behind.
    """
    head = parts[0]
    lods = "-".join(str(part.level.lod) for part in parts)
    encoding_id = parts[-1].level.encoding_id
    name = f"lod{lods}_branch{head.level.branch_id}_enc{encoding_id}_{head.first:010d}_{head.count}_{tag}.zarr"
    specs, arrays = [], {}
    for part in parts:
        for stored in part.level.layout:
            spec = array_spec(part.level, stored, part.count)
            specs.append(spec)
            arrays[spec.path] = part.arrays[stored.name]
    described = {
        **attributes,
        "levels": [{"lod": p.level.lod, "first_node": p.first, "num_nodes": p.count} for p in parts],
        "lod0_node_is": "block of 32 slots",
    }
    manifest = write_segment(context_folder / SEGMENT_FOLDER / name, arrays, specs, described, write, pool)
    payload = sum(part.count * part.level.node_bytes for part in parts)
    return SealedSegment(name, payload, manifest, parts)
