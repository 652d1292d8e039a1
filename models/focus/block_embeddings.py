"""Blocks of a tree by the meaning of their text: a sentence encoder's vectors, made when first asked for and kept.

Encoding is what costs: about 140 blocks a second on one CPU thread, against 2 µs a block for a cosine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float32, Int64

from cluster.errors import FocusError
from models.focus.history import TreeReader
from models.sentence_encoder import VECTOR_DIM

CHUNK_BLOCKS = 4096
"""Blocks decoded, encoded or compared at a time: 6 MB of vectors."""


class TextEncoder(Protocol):
    """What makes vectors of texts: `models.sentence_encoder.SentenceEncoder`."""

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "n 384"]:
        """Vectors of length 1."""
        ...


class BlockEmbeddings:
    """Vectors of a tree's blocks. Each block is encoded once, however many places ask for it.

    Takes 1.5 kB a block that was asked for; blocks nobody asked for take address space only.
    """

    _blocks: Int64[np.ndarray, " kept"]
    _vectors: Float32[np.ndarray, "kept 384"]
    _is_encoded: Bool[np.ndarray, " kept"]

    def __init__(
        self, encoder: TextEncoder, decode: Callable[[Sequence[np.ndarray]], list[str]], reader: TreeReader
    ) -> None:
        """Encode nothing yet; `decode` gives texts of token ids, as `Tokenizer.decode_batch`."""
        self._encoder = encoder
        self._decode = decode
        self._reader = reader
        self._unchanged: BlockEmbeddings | None = None
        self._make_room(np.arange(reader.version.num_blocks))

    def vectors(self, first_block: int, stop_block: int) -> Float32[np.ndarray, "n 384"]:
        """Vectors of blocks `[first_block, stop_block)`, of length 1, in timeline order.

        Raises:
            FocusError: blocks outside the version.
        """
        out = np.empty((max(0, stop_block - first_block), VECTOR_DIM), np.float32)
        for blocks in self._chunks(first_block, stop_block):
            out[blocks - first_block] = self._gather(blocks, self._reader)
        return out

    def scores(self, query_text: str, first_block: int, stop_block: int) -> Float32[np.ndarray, " n"]:
        """Cosine of each block's vector with the query's, -1 … 1, in timeline order. Raises as `vectors`."""
        query = self._encoder.encode([query_text])[0]
        out = np.empty(max(0, stop_block - first_block), np.float32)
        for blocks in self._chunks(first_block, stop_block):
            out[blocks - first_block] = self._gather(blocks, self._reader) @ query
        return out

    def over(self, reader: TreeReader, changed_blocks: np.ndarray) -> BlockEmbeddings:
        """The same over a reader that differs in some blocks (in their place, not in number).

        Those are encoded again, and forgotten with what is returned; all others are shared with this one, whichever
        of the two is asked first.

        Raises:
            FocusError: the reader has another number of blocks.
        """
        if reader.version.num_blocks != self._reader.version.num_blocks:
            raise FocusError(
                f"vectors of {self._reader.version.num_blocks} blocks do not fit a tree of {reader.version.num_blocks}"
            )
        other = copy.copy(self)
        other._reader = reader
        other._unchanged = self
        other._make_room(np.unique(np.asarray(changed_blocks, np.int64)))
        return other

    def _make_room(self, blocks: Int64[np.ndarray, " kept"]) -> None:
        self._blocks = blocks
        self._vectors = np.empty((len(blocks), VECTOR_DIM), np.float32)  # memory is taken when it is written
        self._is_encoded = np.zeros(len(blocks), bool)

    def _chunks(self, first_block: int, stop_block: int) -> Iterator[np.ndarray]:
        num_blocks = self._reader.version.num_blocks
        if not 0 <= first_block <= stop_block <= num_blocks:
            raise FocusError(f"blocks {first_block}-{stop_block} are outside a version of {num_blocks} blocks")
        for first in range(first_block, stop_block, CHUNK_BLOCKS):
            yield np.arange(first, min(first + CHUNK_BLOCKS, stop_block))

    def _gather(self, blocks: Int64[np.ndarray, " n"], reader: TreeReader) -> Float32[np.ndarray, "n 384"]:
        """Vectors of some blocks, ascending. Missing ones are read from `reader`, the one that was asked."""
        first, stop = np.searchsorted(self._blocks, (blocks[0], blocks[-1] + 1))
        nearby = self._blocks[first:stop]
        is_own = np.isin(blocks, nearby, assume_unique=True)
        rows = first + np.searchsorted(nearby, blocks[is_own])
        self._encode(rows[~self._is_encoded[rows]], reader)
        out = np.empty((len(blocks), VECTOR_DIM), np.float32)
        out[is_own] = self._vectors[rows]
        if not is_own.all():
            assert self._unchanged is not None
            out[~is_own] = self._unchanged._gather(blocks[~is_own], reader)
        return out

    def _encode(self, rows: Int64[np.ndarray, " n"], reader: TreeReader) -> None:
        if len(rows) == 0:
            return
        blocks = self._blocks[rows]
        first = int(blocks[0])
        tokens, counts = reader.tokens(first, int(blocks[-1]) - first + 1)
        texts = self._decode([tokens[place, : counts[place]] for place in blocks - first])
        self._vectors[rows] = self._encoder.encode(texts)
        self._is_encoded[rows] = True
