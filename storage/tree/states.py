"""What there is of each block: states that curation gives to spans, versioned like everything else.

A row says that from a version on a span of blocks has a state. Rows are only added; a version's states are all rows of
its branch up to it, and of its ancestors up to the forks, one over the other. Blocks that no row names are whole.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from storage.contract import BlockState, PrunedSpan
from storage.tree.lineage import Lineage

Span = tuple[int, int]
"""`(first block, number of blocks)`."""

PRUNED = (BlockState.GIST_ONLY, BlockState.TOMBSTONED)
"""States whose tokens are not read, and are collected once they need not be kept any more."""


class StateRow(NamedTuple):
    """A state that a span was given."""

    since_seq: int
    first: int
    num_blocks: int
    state: int
    keep_until: float
    """Unix seconds: when tokens of a pruned span may be collected."""


def insert_states(db: sqlite3.Connection, branch_id: int, seq: int, spans: Sequence[PrunedSpan]) -> None:
    """Give spans their states from a version on; call inside the transaction that adds the version."""
    db.executemany(
        "INSERT INTO block_states (branch_id, since_seq, first, count, state, keep_until) VALUES (?, ?, ?, ?, ?, ?)",
        [(branch_id, seq, span.first, span.num_blocks, int(span.state), span.keep_until) for span in spans],
    )


def state_rows(db: sqlite3.Connection, lineage: Lineage, seq: int, num_blocks: int) -> Iterator[StateRow]:
    """The rows that make up a version's states, each over those before it, clipped to the version's blocks."""
    limits: list[tuple[int, int, int]] = []
    stop = num_blocks
    for branch in lineage.branches:
        limits.append((branch.branch_id, seq, stop))
        seq = min(seq, branch.fork_seq or 0)
        stop = min(stop, branch.fork_block)
    for branch_id, newest, stop in reversed(limits):
        for row in db.execute(
            "SELECT since_seq, first, count, state, keep_until FROM block_states "
            "WHERE branch_id = ? AND since_seq <= ? AND first < ? ORDER BY since_seq",
            (branch_id, newest, stop),
        ):
            found = StateRow(*row)
            yield found._replace(num_blocks=min(found.num_blocks, stop - found.first))


def pruned_spans(
    db: sqlite3.Connection, lineage: Lineage, seq: int, num_blocks: int, first: int, count: int
) -> tuple[PrunedSpan, ...]:
    """What is not whole of a version's blocks `[first, first + count)`, counted from `first`."""
    states = np.zeros(count, np.int8)
    keep_until = np.zeros(count)
    for row in state_rows(db, lineage, seq, num_blocks):
        low, high = max(row.first - first, 0), min(row.first + row.num_blocks - first, count)
        if low < high:
            states[low:high], keep_until[low:high] = row.state, row.keep_until
    changes = np.flatnonzero((np.diff(states) != 0) | (np.diff(keep_until) != 0)) + 1
    edges = [0, *changes.tolist(), count]
    return tuple(
        PrunedSpan(low, high - low, BlockState(int(states[low])), float(keep_until[low]))
        for low, high in itertools.pairwise(edges)
        if low < high and states[low] != BlockState.WHOLE
    )


def block_states(db: sqlite3.Connection, lineage: Lineage, seq: int, num_blocks: int) -> np.ndarray | None:
    """`BlockState` of every block of a version: `(num_blocks,)` int8; None when all are whole."""
    states: np.ndarray | None = None
    for row in state_rows(db, lineage, seq, num_blocks):
        if states is None:
            states = np.zeros(num_blocks, np.int8)
        states[row.first : row.first + row.num_blocks] = row.state
    return states


def collectable_tokens(
    db: sqlite3.Connection, lineage: Lineage, seq: int, num_blocks: int, now: float
) -> tuple[np.ndarray | None, int]:
    """`(mask, since)`: which blocks' tokens a version has no use for any more, `(num_blocks,)` bool or None where it
    is no block's, and the newest version that took one of them away."""
    since: np.ndarray | None = None
    for row in state_rows(db, lineage, seq, num_blocks):
        if since is None:
            since = np.zeros(num_blocks, np.int64)
        pruned = row.state in PRUNED and row.keep_until <= now
        since[row.first : row.first + row.num_blocks] = row.since_seq if pruned else 0
    if since is None or not since.any():
        return None, 0
    return since > 0, int(since.max())


def as_spans(mask: np.ndarray, first_block: int = 0) -> list[Span]:
    """Runs of True as spans."""
    edges = np.flatnonzero(np.diff(np.pad(mask.astype(np.int8), 1)))
    starts, stops = edges[::2], edges[1::2]
    return [(first_block + int(a), int(b - a)) for a, b in zip(starts, stops, strict=True)]
