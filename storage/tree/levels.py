"""How far each level is stored, and which part of a write to a level is new."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import InvalidWriteError, OutOfOrderError
from storage.codec import Values, check_names, encode_arrays
from storage.schema import Encoding
from storage.tree.journal import Level
from storage.tree.lineage import Branch


def sealed_nodes(connection: sqlite3.Connection, level: Level) -> int:
    """How far a level is in segments, counted from its first node, whoever holds that: a prefix of the level."""
    row = connection.execute(
        "SELECT first + count FROM extents WHERE branch_id = ? AND encoding_id = ? AND lod = ? "
        "ORDER BY first DESC LIMIT 1",
        level.key,
    ).fetchone()
    return level.base if row is None else int(row[0])


def level_counts(
    connection: sqlite3.Connection, branch: Branch, encoding_id: int, encoding: Encoding
) -> tuple[int, ...]:
    """Nodes stored of LOD1, LOD2, … of an encoding, those that a branch shares with its ancestors included."""
    counts: list[int] = []
    while True:
        level = branch.level(encoding_id, encoding, len(counts) + 1)
        found = [
            connection.execute(
                f"SELECT first + count FROM {table} WHERE branch_id = ? AND encoding_id = ? AND lod = ? "
                "ORDER BY first DESC LIMIT 1",
                level.key,
            ).fetchone()
            for table in ("extents", "journal")
        ]
        stored = max((int(row[0]) for row in found if row is not None), default=level.base)
        if stored == 0:
            return tuple(counts)
        counts.append(stored)


@dataclass(frozen=True)
class FreshNodes:
    """The part of a write that a level does not hold yet."""

    first: int
    count: int
    arrays: dict[str, np.ndarray]


def stored_prefix(
    encoding: Encoding,
    num_blocks: int,
    counts: Sequence[int],
    lod: int,
    first: int,
    arrays: Mapping[str, Values],
) -> tuple[int, int]:
    """`(num_nodes, stored)`: how many nodes a write holds, and how many of those the level has already.

    Args:
        encoding: of the level.
        num_blocks: blocks of the timeline (LOD1's own children are their tokens).
        counts: nodes of LOD1, LOD2, … so far.
        lod: the level written to.
        first: node the write starts at.
        arrays: by name, `(nodes * rows_per_node, width)`.

    Raises:
        InvalidWriteError: an array is missing or has another width, a negative node.
        OutOfOrderError: a gap, or children that are not complete.
    """
    check_names(encoding.arrays, arrays)
    if first < 0:
        raise InvalidWriteError(f"LOD{lod} has no node {first}")
    leading = encoding.arrays[0]
    size = math.prod(arrays[leading.name].shape)
    num_nodes, left_over = divmod(size, leading.rows_per_node * leading.width)
    if left_over:
        raise InvalidWriteError(
            f"array {leading.name!r} has shape {tuple(arrays[leading.name].shape)}; a node is "
            f"({leading.rows_per_node}, {leading.width})"
        )
    have = counts[lod - 1] if lod <= len(counts) else 0
    if first > have:
        raise OutOfOrderError(f"LOD{lod} has {have} nodes; the write starts at {first}. Send those between first.")
    children = num_blocks * K if lod == 1 else (counts[lod - 2] if lod - 1 <= len(counts) else 0)
    if (first + num_nodes) * K > children:
        raise OutOfOrderError(
            f"LOD{lod} node {first + num_nodes - 1} needs {(first + num_nodes) * K} nodes of LOD{lod - 1}; "
            f"there are {children}"
        )
    return num_nodes, min(have - first, num_nodes)


def fresh_nodes(
    encoding: Encoding,
    num_blocks: int,
    counts: Sequence[int],
    lod: int,
    first: int,
    arrays: Mapping[str, Values],
) -> FreshNodes | None:
    """Encode a write of whole nodes without what is stored; None when all of it is. Arguments as `stored_prefix`."""
    num_nodes, stored = stored_prefix(encoding, num_blocks, counts, lod, first, arrays)
    if stored == num_nodes:
        return None
    encoded = encode_arrays(encoding.arrays, arrays, num_nodes)
    kept = {s.name: encoded[s.name][stored * s.rows_per_node :] for s in encoding.stored()}
    return FreshNodes(first + stored, num_nodes - stored, kept)
