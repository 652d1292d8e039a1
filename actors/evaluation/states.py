"""What there is of blocks: a reader that curation has been at, and one as it would be afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int8

from models.focus.history import HasBlockStates
from storage.contract import BlockState, DocumentInfo, Tail, TreeReader, Version
from storage.geometry import NO_TOKEN
from storage.tree.states import PRUNED


def states_of(reader: TreeReader, first_block: int, num_blocks: int) -> Int8[np.ndarray, " blocks"]:
    """`BlockState` of consecutive blocks; all are whole unless the reader says otherwise."""
    if isinstance(reader, HasBlockStates):
        return np.array(reader.block_states(first_block, num_blocks), np.int8)
    return np.full(num_blocks, BlockState.WHOLE, np.int8)


def has_tokens(reader: TreeReader) -> Bool[np.ndarray, " blocks"]:
    """Of every block of a version, whether its tokens can be read."""
    return ~np.isin(states_of(reader, 0, reader.version.num_blocks), PRUNED)


class ReaderOver:
    """Implements `TreeReader` by another reader, which stays its caller's; others change some of it.

    It names the same version as the reader beneath, so rows that were assembled from one of the two must not be taken
    over (`Assembler.assemble(previous=…)`) for the other.
    """

    def __init__(self, reader: TreeReader) -> None:
        self._reader = reader

    @property
    def version(self) -> Version:
        """The version of the reader beneath."""
        return self._reader.version

    def tokens(self, first_block: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of consecutive blocks (`TreeReader.tokens`)."""
        return self._reader.tokens(first_block, num_blocks)

    def block_states(self, first_block: int, num_blocks: int) -> np.ndarray:
        """States of consecutive blocks: `(num_blocks,)` int8."""
        return states_of(self._reader, first_block, num_blocks)

    def tokens_before(self, blocks: np.ndarray) -> np.ndarray:
        """Real tokens of the timeline before each block (`TreeReader.tokens_before`)."""
        return self._reader.tokens_before(blocks)

    def read(self, name: str, lod: int, indices: np.ndarray | Sequence[int]) -> torch.Tensor:
        """Nodes of a level in the order asked for (`TreeReader.read`)."""
        return self._reader.read(name, lod, indices)

    def read_node(self, name: str, lod: int, index: int) -> torch.Tensor:
        """One node (`TreeReader.read_node`)."""
        return self._reader.read_node(name, lod, index)

    def read_group(self, name: str, lod: int, group: int) -> torch.Tensor:
        """A sibling group (`TreeReader.read_group`)."""
        return self._reader.read_group(name, lod, group)

    def documents(self) -> list[DocumentInfo]:
        """The version's documents in timeline order (`TreeReader.documents`)."""
        return self._reader.documents()

    def document_at(self, block: int) -> DocumentInfo:
        """The document a block belongs to (`TreeReader.document_at`)."""
        return self._reader.document_at(block)

    def tail(self) -> Tail | None:
        """The open document's unfilled tail (`TreeReader.tail`)."""
        return self._reader.tail()

    def close(self) -> None:
        """Nothing: the reader beneath is its caller's."""


class CuratedReader(ReaderOver):
    """The same nodes, some of whose tokens are not to be had."""

    def __init__(self, reader: TreeReader, states: Int8[np.ndarray, " blocks"]) -> None:
        """Args:
        reader: belongs to the caller, who closes it.
        states: `BlockState` of every block of its version. What is pruned beneath stays so.
        """
        super().__init__(reader)
        beneath = states_of(reader, 0, reader.version.num_blocks)
        self._states = np.where(np.isin(beneath, PRUNED) & ~np.isin(states, PRUNED), beneath, states).astype(np.int8)

    def block_states(self, first_block: int, num_blocks: int) -> np.ndarray:
        """States of consecutive blocks: `(num_blocks,)` int8."""
        return self._states[first_block : first_block + num_blocks].copy()

    def tokens(self, first_block: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of consecutive blocks (`TreeReader.tokens`)."""
        tokens, counts = self._reader.tokens(first_block, num_blocks)
        pruned = np.isin(self._states[first_block : first_block + num_blocks], PRUNED)
        tokens, counts = tokens.copy(), counts.copy()
        tokens[pruned], counts[pruned] = NO_TOKEN, 0
        return tokens, counts
