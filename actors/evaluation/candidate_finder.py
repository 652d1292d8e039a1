"""Candidates of a place and what is known of them: one way for labels and for the rival that was trained on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from actors.evaluation.contents import Reading
from actors.focus_signals import (
    LEXICAL_TOKENS,
    QUERY_CONTEXT_TOKENS,
    QUESTION_TOKENS,
    Planted,
    Question,
    find_candidates,
    newest_keys,
    search_history,
    signals,
)
from cluster.config import TOKENS_PER_BLOCK as K
from models.focus.dense import KeySpace
from models.gistnet import GistNet
from models.lensnet import CandidateSet
from models.tokenizer import Tokenizer
from storage.lexical.search import LexicalSearcher


@dataclass(frozen=True)
class CandidateFinder:
    """Searches histories of one context with their newest tokens."""

    gistnet: GistNet
    tokenizer: Tokenizer
    lexical: LexicalSearcher
    key_space: KeySpace
    key_tokens: int
    """Newest tokens that ask keys for candidates."""

    def find(
        self,
        reading: Reading,
        shown_from: int,
        also: Callable[[np.ndarray], np.ndarray] | None = None,
        *,
        asked: Int64[np.ndarray, " n"] | None = None,
        planted: Planted | None = None,
    ) -> CandidateSet:
        """Candidates before the raw tail, nothing being shown.

        Args:
            reading: the history.
            shown_from: first block of the tail.
            also: takes all blocks before it, and gives those that are candidates besides.
            asked: tokens of a question behind the history, which then ask alone; the newest before them are only read.
            planted: what the history has and its tree has not.
        """
        asked = np.empty(0, np.int64) if asked is None else asked[-max(QUESTION_TOKENS) :]
        history, reader = reading.history, reading.reader
        num_newest = min(-(-QUERY_CONTEXT_TOKENS // K) + 1, history.num_blocks)
        newest = np.concatenate([reading.ids(history.stop_block - num_newest, num_newest), asked])
        question = Question.of(
            reading.lm, self.gistnet, self.tokenizer, newest, lexical_tokens=len(asked) or LEXICAL_TOKENS
        )
        key_tokens = len(asked) or self.key_tokens
        hits = search_history(reader, history, self.lexical, self.key_space, question, shown_from, key_tokens, planted)
        more = [] if also is None else also(np.arange(history.first_block, shown_from)).tolist()
        blocks = find_candidates(reader, history, hits, shown_from, opening=True, also=more)
        return signals(
            reader,
            history,
            self.gistnet,
            self.key_space,
            question,
            hits,
            blocks,
            shown_from,
            tail_keys=newest_keys(reader, history),
            own=True,
        )
