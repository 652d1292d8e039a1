"""Terms of the blocks that the lexical index does not hold yet, kept in memory between searches.

For the tail behind the index's mark: 0.1 ms and 8 KB a block, paid once. It takes a whole history too, where
there is no index, at 3 s and 260 MB a million tokens.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict, deque

import numpy as np

from storage.contract import TreeReader
from storage.lexical.terms import Decode, block_terms, settled_blocks

logger = logging.getLogger("megacontext.storage")

BATCH_BLOCKS = 1024

MANY_BLOCKS = 8192
"""Unindexed blocks (262,144 tokens) from which on it is said that an index would help."""


class RecentTerms:
    """Postings of blocks `[first, stop)`, which only ever move forward with the index and the context."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._source: tuple[str, int] | None = None
        self._reset(0)

    def _reset(self, first: int) -> None:
        self.first = self.stop = first
        self.num_terms = 0
        self._terms: deque[Counter[str]] = deque()
        self._blocks: defaultdict[str, deque[int]] = defaultdict(deque)

    def follow(self, reader: TreeReader, first: int) -> None:
        """Hold the blocks from `first`, the index's mark, to the last one whose terms are final."""
        source = (reader.version.context, reader.version.branch_id)
        if source != self._source or not self.first <= first <= self.stop:
            self._source = source
            self._reset(first)
        while self.first < first:
            self._drop_first()
        settled = settled_blocks(reader)
        if settled - self.stop > MANY_BLOCKS:
            logger.warning(
                "context %s: %d blocks are in no lexical index and are read into memory to be searched; index them",
                reader.version.context,
                settled - self.stop,
            )
        while self.stop < settled:
            self._append(block_terms(reader, self._decode, self.stop, min(self.stop + BATCH_BLOCKS, settled)))

    def _append(self, blocks: list[Counter[str]]) -> None:
        for terms in blocks:
            for term in terms:
                self._blocks[term].append(self.stop)
            self._terms.append(terms)
            self.num_terms += terms.total()
            self.stop += 1

    def _drop_first(self) -> None:
        terms = self._terms.popleft()
        for term in terms:
            blocks = self._blocks[term]
            blocks.popleft()
            if not blocks:
                del self._blocks[term]
        self.num_terms -= terms.total()
        self.first += 1

    def frequency(self, term: str) -> int:
        """In how many of the blocks a term occurs."""
        return len(self._blocks.get(term, ()))

    def postings(self, term: str, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Where in blocks `[first, stop)` a term occurs and how often: int64 and float64, ascending."""
        blocks = [block for block in self._blocks.get(term, ()) if first <= block < stop]
        counts = [self._terms[block - self.first][term] for block in blocks]
        return np.array(blocks, np.int64), np.array(counts, np.float64)

    def lengths(self, blocks: np.ndarray) -> np.ndarray:
        """Terms of each of the blocks, counted as often as they occur: float64."""
        return np.array([self._terms[block - self.first].total() for block in blocks.tolist()], np.float64)
