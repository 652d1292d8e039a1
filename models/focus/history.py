"""What a Working Context represents: consecutive blocks of one pinned tree, and the tree it is read from.

Blocks, nodes and levels are those of the tree: node `(lod, index)` covers blocks `[index·32^(lod-1), …)`. Here and in
a Working Context an entry at LOD0 is a whole block of raw tokens, `(0, block)`, because blocks are what is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int8, Int64
from torch import Tensor

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import FocusError


class EntryState(IntEnum):
    """What there is of a block, and of a node over blocks."""

    WHOLE = 0
    GIST_ONLY = 1
    """Its tokens were pruned, or are not written yet."""
    TOMBSTONED = 2
    """Taken out of the tree: it stays represented, by the coarsest node that is tombstoned as a whole."""
    SPECULATIVE = 3
    """Has its tokens, and may be discarded or replaced at its place."""

    @property
    def label(self) -> str:
        """As messages say it."""
        return self.name.lower().replace("_", "-")


MOST_DETAIL_FIRST = (EntryState.WHOLE, EntryState.SPECULATIVE, EntryState.GIST_ONLY, EntryState.TOMBSTONED)
"""A node over blocks of several states has the first of these that one of its blocks has."""

SHOWN_RAW = np.isin(np.arange(len(EntryState)), [EntryState.WHOLE, EntryState.SPECULATIVE])
"""By state: whether a block's tokens are there and may be shown."""


class TreeVersion(Protocol):
    """Which version a reader is pinned to."""

    @property
    def context(self) -> str: ...
    @property
    def seq(self) -> int: ...
    @property
    def level_counts(self) -> tuple[int, ...]: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def encoding(self) -> object: ...


class TailTokens(Protocol):
    """Tokens behind the last block."""

    @property
    def tokens(self) -> np.ndarray: ...


class TreeReader(Protocol):
    """What focus needs of a tree. Storage's readers satisfy it; `models` does not know them."""

    @property
    def version(self) -> TreeVersion:
        """The pinned version."""
        ...

    def tokens(self, first_block: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """`(num_blocks, 32)` uint32 token ids and `(num_blocks,)` uint8 real tokens."""
        ...

    def tokens_before(self, blocks: np.ndarray) -> np.ndarray:
        """Real tokens of the timeline before each block, int64."""
        ...

    def read(self, name: str, lod: int, indices: np.ndarray | Sequence[int]) -> Tensor:
        """Nodes of a level in the order asked for: `(len(indices), m, D)`."""
        ...

    def tail(self) -> TailTokens | None:
        """Tokens behind the last block, where the version is the newest."""
        ...


@runtime_checkable
class HasBlockStates(Protocol):
    """What a reader has besides when blocks of its tree may be other than whole; a wrapper must hand it on."""

    def block_states(self, first_block: int, num_blocks: int) -> np.ndarray:
        """`EntryState` of consecutive blocks: `(num_blocks,)`."""
        ...


def blocks_per_node(lod: int) -> int:
    """Blocks a node covers; an entry at LOD0 is one block."""
    return K ** max(lod - 1, 0)


@dataclass(frozen=True, eq=False)
class History:
    """Blocks `[first_block, stop_block)` of one version, and its tail when it reaches the tip.

    Raises:
        FocusError: a range outside the version, or states that are not one a block.
    """

    context: str
    seq: int
    level_counts: tuple[int, ...]
    """Nodes of LOD1, LOD2, … the version holds; upper levels may lag behind the blocks."""
    first_block: int
    stop_block: int
    tokens_before: Int64[np.ndarray, " blocks_plus_1"]
    """Real tokens of the timeline before each block of the range, and before its end."""
    tail_tokens: int = 0
    vectors_per_node: int = 1
    """m: vectors, and so the cost, of a gist."""
    encoding: object = None
    """What made the gists; only compared. Rows of another encoding are never reused."""
    block_states: Int8[np.ndarray, " blocks"] | None = None
    """`EntryState` of each block of the range; None when all are whole."""

    def __post_init__(self) -> None:
        num_blocks = self.level_counts[0] if self.level_counts else 0
        if not 0 <= self.first_block <= self.stop_block <= num_blocks:
            raise FocusError(
                f"blocks {self.first_block}-{self.stop_block} are outside version {self.seq} of context "
                f"{self.context!r}, which has {num_blocks} blocks"
            )
        if self.tail_tokens and self.stop_block != num_blocks:
            raise FocusError("only a history that reaches the tip has a tail")
        if self.block_states is not None:
            _check_states(self.block_states, self.num_blocks)

    @classmethod
    def of(
        cls, reader: TreeReader, first_block: int = 0, stop_block: int | None = None, *, vectors_per_node: int = 1
    ) -> History:
        """A part of a reader's timeline, by default all of it and its tail. Blocks are whole unless the reader says so.

        Raises:
            FocusError: a range outside the version, or states that are not one a block.
        """
        version = reader.version
        at_tip = stop_block is None or stop_block == version.num_blocks
        stop = version.num_blocks if stop_block is None else stop_block
        tail = reader.tail() if at_tip else None
        if not 0 <= first_block <= stop <= version.num_blocks:
            raise FocusError(
                f"blocks {first_block}-{stop} are outside version {version.seq} of context {version.context!r}, "
                f"which has {version.num_blocks} blocks"
            )
        return cls(
            version.context,
            version.seq,
            tuple(version.level_counts),
            first_block,
            stop,
            np.asarray(reader.tokens_before(np.arange(first_block, stop + 1)), np.int64),
            0 if tail is None else len(tail.tokens),
            vectors_per_node,
            version.encoding,
            _states_of(reader, first_block, stop - first_block),
        )

    @property
    def num_blocks(self) -> int:
        """Blocks of the range."""
        return self.stop_block - self.first_block

    @property
    def num_tokens(self) -> int:
        """Real tokens, the tail's included."""
        return int(self.tokens_before[-1] - self.tokens_before[0]) + self.tail_tokens

    @property
    def max_lod(self) -> int:
        """The highest level that holds a node of the version."""
        return len(self.level_counts)

    def num_nodes(self, lod: int) -> int:
        """Nodes of a level in the version; LOD0 counts blocks."""
        return self.level_counts[max(lod - 1, 0)] if self.level_counts and lod <= self.max_lod else 0

    def node_range(self, lod: int) -> tuple[int, int]:
        """Nodes `[first, stop)` of a level that exist and lie wholly inside the range; may be empty."""
        size = blocks_per_node(lod)
        first = -(-self.first_block // size)
        return first, max(first, min(self.stop_block // size, self.num_nodes(lod)))

    def shows_raw(self, block: int) -> bool:
        """Whether a block's tokens are there and may be shown."""
        return self.block_states is None or bool(SHOWN_RAW[self.block_states[block - self.first_block]])

    def states_between(
        self, first_block: Int64[np.ndarray, " n"], stop_block: Int64[np.ndarray, " n"]
    ) -> Int8[np.ndarray, " n"]:
        """`EntryState` of nodes over blocks `[first_block, stop_block)` of the range.

        That of their blocks where they all have the same one, else the first of `MOST_DETAIL_FIRST` among them: a node
        is tombstoned only as a whole, and whole as soon as one block is.
        """
        states = np.zeros(len(first_block), np.int8)
        if self.block_states is None:
            return states
        start, stop = first_block - self.first_block, stop_block - self.first_block
        for state in reversed(MOST_DETAIL_FIRST):
            before = self._blocks_before[state]
            states[before[stop] > before[start]] = state
        return states

    @cached_property
    def _blocks_before(self) -> np.ndarray:
        """Blocks of each state before each block of the range, and before its end: `(states, blocks + 1)`."""
        is_state = np.arange(len(EntryState))[:, None] == self.block_states
        return np.pad(np.cumsum(is_state, axis=1, dtype=np.int32), ((0, 0), (1, 0)))

    def is_tombstoned(self, lod: int, index: int) -> bool:
        """Whether a node of LOD1 or above is there, lies inside the range, and all its blocks are tombstoned."""
        first, stop = self.node_range(lod)
        if self.block_states is None or not first <= index < stop:
            return False
        size = blocks_per_node(lod)
        start = index * size - self.first_block
        before = self._blocks_before[EntryState.TOMBSTONED]
        return int(before[start + size] - before[start]) == size

    def roots(self) -> tuple[np.ndarray, np.ndarray]:
        """The coarsest tiling: `(lod, index)` of its nodes in timeline order, LOD1 and above.

        Levels that lag behind, and a range that begins or ends inside a node, leave finer nodes at the edges.
        """
        pieces: list[tuple[int, int, int]] = []  # (first block, lod, index)
        gaps = [(self.first_block, self.stop_block)]
        for lod in range(self.max_lod, 0, -1):
            size = blocks_per_node(lod)
            rest: list[tuple[int, int]] = []
            for start, stop in gaps:
                first, last = -(-start // size), min(stop // size, self.num_nodes(lod))
                if last <= first:
                    rest.append((start, stop))
                    continue
                pieces += [(index * size, lod, index) for index in range(first, last)]
                rest += [(start, first * size), (last * size, stop)]
            gaps = [(start, stop) for start, stop in rest if start < stop]
        pieces.sort()
        return np.array([p[1] for p in pieces], np.int8), np.array([p[2] for p in pieces], np.int64)


def _states_of(reader: TreeReader, first_block: int, num_blocks: int) -> np.ndarray | None:
    if not isinstance(reader, HasBlockStates):
        return None
    states = np.asarray(reader.block_states(first_block, num_blocks), np.int8)
    # All whole costs nothing to look up.
    return states if states.any() else None


def _check_states(states: np.ndarray, num_blocks: int) -> None:
    if states.shape != (num_blocks,):
        raise FocusError(f"{num_blocks} blocks need as many states, not an array of shape {states.shape}")
    unknown = (states < 0) | (states >= len(EntryState))
    if unknown.any():
        raise FocusError(f"there is no block state {states[unknown][0]}; use one of {[*map(int, EntryState)]}")
