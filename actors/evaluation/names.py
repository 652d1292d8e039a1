"""What chosen blocks have in common with the text that follows: its document, its names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from models.focus.history import History
from models.tokenizer import Tokenizer
from storage.contract import TreeReader
from storage.lexical.terms import block_terms, terms_of

NAME_SHARE = 0.05
"""A term of the horizon is a name where at most this share of the history's blocks hold it, and one does."""

MIN_NAME_CHARS = 4


class SharedNames:
    """Which blocks of a history share a name with a horizon: a rare word or identifier that both hold."""

    def __init__(self, reader: TreeReader, tokenizer: Tokenizer, history: History, horizon_ids: np.ndarray) -> None:
        self._reader = reader
        self._tokenizer = tokenizer
        self._history = history
        self._horizon_ids = horizon_ids

    @cached_property
    def names(self) -> frozenset[str]:
        """Of the horizon, as far as the history holds them."""
        seen = Counter(term for block in self._terms for term in block)
        most = max(1, int(NAME_SHARE * len(self._terms)))
        terms = set(terms_of(self._tokenizer.decode(self._horizon_ids)))
        return frozenset(t for t in terms if len(t) >= MIN_NAME_CHARS and 1 <= seen[t] <= most)

    def num_sharing(self, blocks: Sequence[int]) -> int:
        """How many of some blocks share a name."""
        first = self._history.first_block
        return sum(not self.names.isdisjoint(self._terms[block - first]) for block in blocks)

    def num_same_document(self, blocks: Sequence[int]) -> int:
        """How many of some blocks are of the horizon's document."""
        first = self._reader.document_at(self._history.stop_block).first_block
        return sum(block >= first for block in blocks)

    @cached_property
    def _terms(self) -> list[Counter[str]]:
        history = self._history
        return block_terms(
            self._reader,
            self._tokenizer.decode_batch,
            history.first_block,
            history.stop_block,
            text_stop=history.stop_block,
        )
