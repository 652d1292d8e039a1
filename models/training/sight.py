"""Who sees what in a dense pass: many Working Contexts over one window of text, cut in different places.

A window of n blocks is read once with all its gists and all its raw tokens in one sequence. A mask decides what each
block's tokens see of what came before: a block as its gist, as raw tokens, or (in an overlay) as both; 32 blocks that
begin at a super-block also as the one gist of their LOD2 node. So every block is the raw tail of some Working Context
of the blocks before it, and every token a horizon behind one.

Shapes: B windows, n blocks and q = ⌊n / 32⌋ nodes each, m vectors a gist, K = 32 tokens a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from cluster.config import BLOCKS_PER_SUPER_BLOCK
from cluster.config import TOKENS_PER_BLOCK as K
from models.banded_attention import BandedMask


@dataclass(frozen=True)
class Sight:
    """For the tokens of each block, how they see each block before it. The first block is never raw: nothing comes
    before it, so nothing can be learned there."""

    gist: Bool[np.ndarray, "B n n"]
    """`[b, i, j]`: the tokens of block i see the gist of block j."""
    raw: Bool[np.ndarray, "B n n"]
    """The same of block j's raw tokens."""
    node: Bool[np.ndarray, "B n q"] | None = None
    """The same of the gist of the j-th 32 blocks. None: of no node."""
    begins: Int64[np.ndarray, "B n"] | None = None
    """With which block the Working Context of each block begins: nothing before it is seen, by gists neither. None: all
    of them with the window's first."""

    @property
    def num_blocks(self) -> int:
        """n."""
        return self.gist.shape[1]

    @classmethod
    def stacked(cls, parts: Sequence[Sight]) -> Sight:
        """Rows of several sights of equally many blocks, one after the other."""
        nodes = [part.node for part in parts if part.node is not None]
        begins = [part.begins for part in parts if part.begins is not None]
        return cls(
            np.concatenate([p.gist for p in parts]),
            np.concatenate([p.raw for p in parts]),
            np.concatenate(nodes) if nodes else None,
            np.concatenate(begins) if begins else None,
        )

    @property
    def num_nodes(self) -> int:
        """Nodes that stand in the sequence."""
        return 0 if self.node is None else self.node.shape[2]

    def sees_nodes(self) -> Bool[np.ndarray, "B n"]:
        """Whether the tokens of each block see some node."""
        seen = np.zeros(self.gist.shape[:2], bool)
        return seen if self.node is None else seen | self.node.any(axis=2)

    def tail_tokens(self) -> Int64[np.ndarray, "B n"]:
        """Raw tokens that stand unbroken before the first token of each block."""
        before = np.tril(np.ones((self.num_blocks, self.num_blocks), bool), -1)
        missing = before & ~self.raw
        # Blocks since the newest one that is not raw.
        newest = np.where(missing, np.arange(self.num_blocks), -1).max(axis=2)
        return K * (np.arange(self.num_blocks) - 1 - newest)

    @property
    def reach(self) -> int:
        """How many blocks back the farthest is that some block sees raw; 0 where none is seen."""
        _, seeing, seen = np.nonzero(self.raw)
        return int((seeing - seen).max(initial=0))

    def mask(self, num_vectors: int) -> Bool[Tensor, "B 1 T T"]:
        """The attention mask of a sequence of the gists of all nodes (q·m entries, the oldest first), of all blocks
        (n·m entries) and then all raw tokens of the blocks from the second on. True: the row's entry sees the column's.

        A gist sees itself and what would stand before it in a Working Context of gists: a node's the nodes before it,
        a block's the nodes before its super-block and the blocks of it before itself, from where its Working Context
        begins.
        """
        num_rows, n, _ = self.gist.shape
        summaries = self._among_gists(num_vectors)
        raw_from, tokens = summaries.shape[-1], (n - 1) * K
        mask = np.zeros((num_rows, 1, raw_from + tokens, raw_from + tokens), bool)
        mask[:, 0, :raw_from, :raw_from] = summaries
        mask[:, 0, raw_from:, :raw_from] = self._of_gists(num_vectors).repeat(K, axis=1)
        mask[:, 0, raw_from:, raw_from:] = self.raw[:, 1:, 1:].repeat(K, axis=1).repeat(K, axis=2)
        inside = np.kron(np.eye(n - 1, dtype=bool), np.tril(np.ones((K, K), bool)))
        mask[:, 0, raw_from:, raw_from:] |= inside
        return torch.from_numpy(mask)

    def banded_mask(self, num_vectors: int) -> BandedMask:
        """The same as `mask`, of pairs that see each other and few besides: small where `reach` is."""
        num_rows, n, _ = self.gist.shape
        reach = self.reach
        summaries = self._among_gists(num_vectors)
        back = np.zeros((num_rows, n - 1, reach), bool)
        for distance in range(1, reach + 1):
            seen = np.diagonal(self.raw[:, 1:, 1:], -distance, axis1=1, axis2=2)
            back[:, distance:, reach - distance] = seen
        return BandedMask(
            torch.from_numpy(np.broadcast_to(summaries, (num_rows, *summaries.shape[-2:])).copy()),
            torch.from_numpy(self._of_gists(num_vectors)),
            torch.from_numpy(back),
            K,
        )

    def _among_gists(self, m: int) -> Bool[np.ndarray, "B G G"] | Bool[np.ndarray, "G G"]:
        """What the gists of nodes and blocks, G = (q + n)·m, see of each other; of all rows at once where they see
        alike."""
        seen = self._among_all_gists(m)
        if self.begins is None:
            return seen
        n, q = self.num_blocks, self.num_nodes
        # First blocks of what stands in the sequence; nodes see as if everything began with the window.
        first = np.concatenate((BLOCKS_PER_SUPER_BLOCK * np.arange(q), np.arange(n)))
        begins = np.concatenate((np.zeros((len(self.begins), q), np.int64), self.begins), axis=1)
        within = first[None, None, :] >= begins[:, :, None]
        return seen & within.repeat(m, axis=1).repeat(m, axis=2)

    def _among_all_gists(self, m: int) -> Bool[np.ndarray, "G G"]:
        n, q = self.num_blocks, self.num_nodes
        nodes, gists = q * m, n * m
        before = np.tril(np.ones((gists, gists), bool))
        if not q:
            return before
        super_block = np.arange(n) // BLOCKS_PER_SUPER_BLOCK
        own = (super_block[:, None] == super_block[None]).repeat(m, axis=0).repeat(m, axis=1)
        seen = np.zeros((nodes + gists, nodes + gists), bool)
        seen[:nodes, :nodes] = np.tril(np.ones((nodes, nodes), bool))
        seen[nodes:, nodes:] = before & own
        older = super_block[:, None] > np.arange(q)[None]
        seen[nodes:, :nodes] = older.repeat(m, axis=0).repeat(m, axis=1)
        return seen

    def _of_gists(self, m: int) -> Bool[np.ndarray, "B n-1 G"]:
        """Which gists the tokens of each block from the second on see."""
        blocks = self.gist[:, 1:]
        seen = blocks if self.node is None else np.concatenate((self.node[:, 1:], blocks), axis=2)
        return seen.repeat(m, axis=2)


def random_sight(
    num_rows: int,
    num_blocks: int,
    rng: np.random.Generator,
    *,
    max_tail_blocks: int,
    shown_share: float = 0.0,
    overlay: bool = True,
    max_gists: int | None = None,
    restart_share: float = 0.0,
) -> Sight:
    """Windows cut into chunks of 1 … `max_tail_blocks` blocks at random.

    A block sees the earlier blocks of its chunk as raw tokens, as a raw tail, and the chunks before as gists. Of the
    super-blocks that ended before its chunk, so many as are drawn for the chunk, the oldest ones, are seen as nodes
    instead, from none to all.

    Args:
        num_rows: B.
        num_blocks: n, at least 2.
        rng: draws the cuts.
        max_tail_blocks: of a chunk.
        shown_share: of the blocks before a chunk that all of it sees as raw tokens, too, as if they had been expanded.
        overlay: whether the gist of a block that is shown raw is seen beside it; otherwise raw tokens stand instead of
            it, and none within a node.
        max_gists: a chunk sees gists of so many blocks before it at most, the newest ones. None: of all.
        restart_share: of the windows, those in which a second Working Context begins with a chunk drawn at random, as
            one does in the middle of a document: nothing before is seen from there on.
    """
    chunk_of = np.empty((num_rows, num_blocks), np.int64)
    for row in chunk_of:
        # The first block is a chunk of its own.
        sizes = rng.integers(1, max_tail_blocks + 1, num_blocks - 1)
        row[0], row[1:] = 0, np.repeat(np.arange(1, num_blocks), sizes)[: num_blocks - 1]
    before = np.tril(np.ones((num_blocks, num_blocks), bool), -1)
    earlier_chunk = chunk_of[:, :, None] > chunk_of[:, None, :]
    # One draw a chunk: its blocks are parts of one Working Context.
    draws = rng.random((num_rows, num_blocks, num_blocks)) < shown_share
    shown = np.take_along_axis(draws, chunk_of[:, :, None].repeat(num_blocks, axis=2), axis=1) & earlier_chunk
    shown[:, :, 0] = False
    tail = before & ~earlier_chunk
    node, under_node = _nodes(chunk_of, rng)
    gist = earlier_chunk & ~under_node
    if not overlay:
        shown &= ~under_node
        gist &= ~shown
    if max_gists is not None:
        oldest = earlier_chunk.sum(axis=2, keepdims=True) - max_gists
        gist &= np.arange(num_blocks) >= oldest
        node = None if node is None else node & (BLOCKS_PER_SUPER_BLOCK * np.arange(node.shape[2]) >= oldest)
    if not restart_share:
        return Sight(gist, tail | shown, node)
    begins = _begins(chunk_of, rng, restart_share)
    seen = np.arange(num_blocks) >= begins[:, :, None]
    if node is not None:
        cut = node & (BLOCKS_PER_SUPER_BLOCK * np.arange(node.shape[2]) < begins[:, :, None])
        # Of a super-block that is cut in two, what is left is seen block by block.
        gist[:, :, : BLOCKS_PER_SUPER_BLOCK * node.shape[2]] |= cut.repeat(BLOCKS_PER_SUPER_BLOCK, axis=2)
        node &= ~cut
    return Sight(gist & seen, (tail | shown) & seen, node, begins)


def _begins(chunk_of: Int64[np.ndarray, "B n"], rng: np.random.Generator, share: float) -> Int64[np.ndarray, "B n"]:
    """The first block of each block's Working Context, where `share` of the rows have a second one."""
    num_rows, n = chunk_of.shape
    begins = np.zeros((num_rows, n), np.int64)
    restarts, draws = rng.random(num_rows) < share, rng.integers(1, n, num_rows)
    for row in np.flatnonzero(restarts):
        start = int(np.searchsorted(chunk_of[row], chunk_of[row, draws[row]]))
        begins[row, start:] = start
    return begins


def _nodes(
    chunk_of: Int64[np.ndarray, "B n"], rng: np.random.Generator
) -> tuple[Bool[np.ndarray, "B n q"] | None, Bool[np.ndarray, "B n n"]]:
    """Which nodes the tokens of each block see, and which blocks they therefore do not see the gists of."""
    num_rows, n = chunk_of.shape
    q = n // BLOCKS_PER_SUPER_BLOCK
    if n <= BLOCKS_PER_SUPER_BLOCK:
        return None, np.zeros((num_rows, n, n), bool)
    first_of_chunk = (chunk_of[:, :, None] > chunk_of[:, None, :]).sum(axis=2)  # blocks before each block's chunk
    ended = first_of_chunk // BLOCKS_PER_SUPER_BLOCK
    draws = np.take_along_axis(rng.random((num_rows, n)), chunk_of, axis=1)  # one a chunk
    as_nodes = np.floor(draws * (ended + 1)).astype(np.int64)
    node = np.arange(q) < as_nodes[:, :, None]
    under = np.arange(n) < BLOCKS_PER_SUPER_BLOCK * as_nodes[:, :, None]
    return node, under
