"""Who sees what in a dense pass: many Working Contexts over one window of text, cut in different places.

A window of n blocks is read once with all its gists and all its raw tokens in one sequence. A mask decides what each
block's tokens see of what came before: a block as its gist, as raw tokens, or (in an overlay) as both. So every block
is the raw tail of some Working Context of the blocks before it, and every token a horizon behind one.

Shapes: B windows, n blocks each, m vectors a gist, K = 32 tokens a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from cluster.config import TOKENS_PER_BLOCK as K


@dataclass(frozen=True)
class Sight:
    """For the tokens of each block, how they see each block before it. The first block is never raw: nothing comes
    before it, so nothing can be learned there."""

    gist: Bool[np.ndarray, "B n n"]
    """`[b, i, j]`: the tokens of block i see the gist of block j."""
    raw: Bool[np.ndarray, "B n n"]
    """The same of block j's raw tokens."""

    @property
    def num_blocks(self) -> int:
        """n."""
        return self.gist.shape[1]

    @classmethod
    def stacked(cls, parts: Sequence[Sight]) -> Sight:
        """Rows of several sights of equally many blocks, one after the other."""
        return cls(np.concatenate([p.gist for p in parts]), np.concatenate([p.raw for p in parts]))

    def tail_tokens(self) -> Int64[np.ndarray, "B n"]:
        """Raw tokens that stand unbroken before the first token of each block."""
        before = np.tril(np.ones((self.num_blocks, self.num_blocks), bool), -1)
        missing = before & ~self.raw
        # Blocks since the newest one that is not raw.
        newest = np.where(missing, np.arange(self.num_blocks), -1).max(axis=2)
        return K * (np.arange(self.num_blocks) - 1 - newest)

    def mask(self, num_vectors: int) -> Bool[Tensor, "B 1 T T"]:
        """The attention mask of a sequence of all gists (n·m entries, the oldest first) and then all raw tokens of
        the blocks from the second on. True: the row's entry sees the column's.

        A gist sees itself and the gists before it, as it would among nothing but gists.
        """
        num_rows, n, _ = self.gist.shape
        gists, tokens = n * num_vectors, (n - 1) * K
        mask = np.zeros((num_rows, 1, gists + tokens, gists + tokens), bool)
        mask[:, :, :gists, :gists] = np.tril(np.ones((gists, gists), bool))
        mask[:, 0, gists:, :gists] = self.gist[:, 1:].repeat(K, axis=1).repeat(num_vectors, axis=2)
        mask[:, 0, gists:, gists:] = self.raw[:, 1:, 1:].repeat(K, axis=1).repeat(K, axis=2)
        inside = np.kron(np.eye(n - 1, dtype=bool), np.tril(np.ones((K, K), bool)))
        mask[:, 0, gists:, gists:] |= inside
        return torch.from_numpy(mask)


def random_sight(
    num_rows: int,
    num_blocks: int,
    rng: np.random.Generator,
    *,
    max_tail_blocks: int,
    shown_share: float = 0.0,
    overlay: bool = True,
) -> Sight:
    """Windows cut into chunks of 1 … `max_tail_blocks` blocks at random.

    A block sees the earlier blocks of its chunk as raw tokens, as a raw tail, and the chunks before as gists.

    Args:
        num_rows: B.
        num_blocks: n, at least 2.
        rng: draws the cuts.
        max_tail_blocks: of a chunk.
        shown_share: of the blocks before a chunk that all of it sees as raw tokens, too, as if they had been expanded.
        overlay: whether the gist of a block that is shown raw is seen beside it; otherwise instead of it.
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
    gist = earlier_chunk if overlay else earlier_chunk & ~shown
    return Sight(gist, tail | shown)
