"""What a Working Context represents: consecutive blocks of one pinned tree, and the tree it is read from.

Blocks, nodes and levels are those of the tree: node `(lod, index)` covers blocks `[index·32^(lod-1), …)`. Here and in
a Working Context an entry at LOD0 is a whole block of raw tokens, `(0, block)`, because blocks are what is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import FocusError


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


def blocks_per_node(lod: int) -> int:
    """Blocks a node covers; an entry at LOD0 is one block."""
    return K ** max(lod - 1, 0)


@dataclass(frozen=True, eq=False)
class History:
    """Blocks `[first_block, stop_block)` of one version, and its tail when it reaches the tip.

    Raises:
        FocusError: a range outside the version.
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

    def __post_init__(self) -> None:
        num_blocks = self.level_counts[0] if self.level_counts else 0
        if not 0 <= self.first_block <= self.stop_block <= num_blocks:
            raise FocusError(
                f"blocks {self.first_block}-{self.stop_block} are outside version {self.seq} of context "
                f"{self.context!r}, which has {num_blocks} blocks"
            )
        if self.tail_tokens and self.stop_block != num_blocks:
            raise FocusError("only a history that reaches the tip has a tail")

    @classmethod
    def of(
        cls, reader: TreeReader, first_block: int = 0, stop_block: int | None = None, *, vectors_per_node: int = 1
    ) -> History:
        """A part of a reader's timeline, by default all of it and its tail.

        Raises:
            FocusError: a range outside the version.
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
