"""The journal: recent nodes as rows of the catalogue, until sealing moves them to segments.

A row holds a run of nodes of one level as one checksummed blob: its arrays one after the other. Runs never cross a
multiple of 32 nodes, so a row lies in one super-block (blocks) or one sibling group (levels above), and in one
segment once sealed.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import google_crc32c
import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import CorruptTreeError
from storage.geometry import split_aligned
from storage.schema import Encoding, StoredArray

BLOCKS = 0
"""Encoding id of what belongs to no GistNet: tokens, their counts and the prefix sum. Level 0, counted in blocks."""

BLOCK_LAYOUT = (
    StoredArray("tokens", "<u4", K, 1, "uint32"),
    StoredArray("tokens_before", "<i8", 1, 1, "int64"),
    StoredArray("num_tokens", "|u1", 1, 1, "uint8"),
)

Layout = tuple[StoredArray, ...]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Level:
    """One level of one encoding on one branch: what a run of nodes belongs to."""

    branch_id: int
    encoding_id: int
    lod: int
    layout: Layout
    base: int = 0
    """The first node that the branch holds itself: a multiple of 32. Its ancestors hold those before."""

    @property
    def node_bytes(self) -> int:
        """Payload bytes of a node."""
        return sum(stored.node_bytes for stored in self.layout)

    @property
    def key(self) -> tuple[int, int, int]:
        """Its columns in the catalogue."""
        return self.branch_id, self.encoding_id, self.lod


def block_level(branch_id: int, base: int = 0) -> Level:
    """Level of the tokens."""
    return Level(branch_id, BLOCKS, 0, BLOCK_LAYOUT, base)


def gist_level(branch_id: int, encoding_id: int, encoding: Encoding, lod: int, base: int = 0) -> Level:
    """Level `lod >= 1` of an encoding."""
    return Level(branch_id, encoding_id, lod, encoding.stored(), base)


@dataclass(frozen=True)
class Run:
    """Consecutive nodes read from the journal; `arrays` are read-only views, `(count * rows, width)`."""

    first: int
    count: int
    arrays: Arrays


_PLACE = struct.Struct("<5q")


def checksum(branch_id: int, encoding_id: int, lod: int, first: int, count: int, payload: bytes) -> int:
    """crc32c of a row: of its place, five little-endian int64, and its payload."""
    place = google_crc32c.value(_PLACE.pack(branch_id, encoding_id, lod, first, count))
    return google_crc32c.extend(place, payload)


def insert(
    connection: sqlite3.Connection,
    level: Level,
    first: int,
    count: int,
    arrays: Mapping[str, np.ndarray],
    row_ids: Iterator[int],
) -> None:
    """Write nodes `[first, first + count)` under the next row ids. Call inside a transaction."""
    insert_all(connection, [(level, first, count, dict(arrays))], row_ids)


NewRun = tuple[Level, int, int, Arrays]
"""Nodes to write: their level, the first, how many, and their arrays."""


def insert_all(connection: sqlite3.Connection, runs: Iterable[NewRun], row_ids: Iterator[int]) -> None:
    """As `insert`, for several runs in one statement."""
    rows = []
    for level, first, count, arrays in runs:
        key = level.key
        for start, size in split_aligned(first, count, K):
            offset = start - first
            parts = [
                arrays[stored.name][offset * stored.rows_per_node : (offset + size) * stored.rows_per_node].tobytes()
                for stored in level.layout
            ]
            payload = b"".join(parts) if len(parts) > 1 else parts[0]
            rows.append((next(row_ids), *key, start, size, checksum(*key, start, size, payload), payload))
    connection.executemany(
        "INSERT INTO journal (row_id, branch_id, encoding_id, lod, first, count, crc, payload) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        rows,
    )


def find(connection: sqlite3.Connection, level: Level, index: int) -> tuple[int, int, int] | None:
    """`(row_id, first, count)` of the run that holds a node, if the journal still does."""
    row = connection.execute(
        "SELECT row_id, first, count FROM journal WHERE branch_id = ? AND encoding_id = ? AND lod = ? AND first <= ? "
        "ORDER BY first DESC LIMIT 1",
        (*level.key, index),
    ).fetchone()
    return row if row is not None and index < row[1] + row[2] else None


def load(connection: sqlite3.Connection, level: Level, row_id: int) -> Run | None:
    """A run by its row; None when it was sealed meanwhile.

    Raises:
        CorruptTreeError: the checksum does not match.
    """
    row = connection.execute("SELECT first, count, crc, payload FROM journal WHERE row_id = ?", (row_id,)).fetchone()
    return None if row is None else unpack(level, *row)


def unpack(level: Level, first: int, count: int, crc: int, payload: bytes) -> Run:
    """Check and split a row's payload.

    Raises:
        CorruptTreeError: naming the level and nodes.
    """
    if len(payload) != count * level.node_bytes or checksum(*level.key, first, count, payload) != crc:
        raise CorruptTreeError(
            f"journal row of LOD{level.lod} nodes {first}-{first + count - 1} is damaged and is not served. "
            "`tree verify` lists all damage; `tree repair` makes gists anew from the tokens."
        )
    return split(level, first, count, payload)


def split(level: Level, first: int, count: int, payload: bytes) -> Run:
    """The arrays of a sound payload."""
    arrays, offset = {}, 0
    for stored in level.layout:
        rows = count * stored.rows_per_node
        values = np.frombuffer(payload, stored.dtype, rows * stored.width, offset)
        arrays[stored.name] = values.reshape(rows, stored.width)
        offset += count * stored.node_bytes
    return Run(first, count, arrays)


def read_range(connection: sqlite3.Connection, level: Level, first: int, count: int) -> Arrays:
    """All arrays of nodes `[first, first + count)`, which the journal must hold entirely.

    Raises:
        CorruptTreeError: a gap or a damaged row.
    """
    rows = connection.execute(
        "SELECT first, count, crc, payload FROM journal WHERE branch_id = ? AND encoding_id = ? AND lod = ? "
        "AND first >= ? AND first < ? ORDER BY first",
        (*level.key, first, first + count),
    )
    runs, expected = [], first
    for row in rows:
        run = unpack(level, *row)
        if run.first != expected:
            break
        runs.append(run)
        expected += run.count
    if expected != first + count:
        raise CorruptTreeError(
            f"the journal has no LOD{level.lod} node {expected}; run `tree verify` and restore the catalogue"
        )
    return {s.name: np.concatenate([run.arrays[s.name] for run in runs]) for s in level.layout}


def delete_range(connection: sqlite3.Connection, level: Level, first: int, count: int) -> None:
    """Drop the rows of nodes `[first, first + count)`; call inside the transaction that records their segment."""
    connection.execute(
        "DELETE FROM journal WHERE branch_id = ? AND encoding_id = ? AND lod = ? AND first >= ? AND first < ?",
        (*level.key, first, first + count),
    )
