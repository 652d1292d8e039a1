"""LensNet as a rival of focus: the candidates it scores above 0, the best first."""

from __future__ import annotations

from dataclasses import dataclass

from actors.evaluation.contents import Reading
from actors.focus_signals import QUERY_CONTEXT_TOKENS, Question, find_candidates, search_history, signals
from cluster.config import TOKENS_PER_BLOCK as K
from models.focus.allocators import RankedBlocks
from models.focus.dense import KeySpace
from models.gistnet import GistNet
from models.lensnet import LensNet
from models.tokenizer import Tokenizer
from storage.lexical import LexicalSearcher


@dataclass(frozen=True)
class LensRival:
    """Scores what words and keys find in a history, and the newest blocks before its tail."""

    net: LensNet
    gistnet: GistNet
    tokenizer: Tokenizer
    lexical: LexicalSearcher
    key_space: KeySpace
    key_tokens: int
    """Newest tokens that ask keys for candidates."""

    def rank(self, reading: Reading, shown_from: int) -> RankedBlocks:
        """Blocks before the raw tail that are worth showing, the best first.

        Args:
            reading: the history.
            shown_from: first block of the tail.
        """
        history, reader = reading.history, reading.reader
        num_newest = min(-(-QUERY_CONTEXT_TOKENS // K) + 1, history.num_blocks)
        newest = reading.ids(history.stop_block - num_newest, num_newest)
        question = Question.of(reading.lm, self.gistnet, self.tokenizer, newest)
        hits = search_history(reader, history, self.lexical, self.key_space, question, shown_from, self.key_tokens)
        blocks = find_candidates(reader, history, hits, shown_from, opening=True)
        candidates = signals(
            reader, history, self.gistnet, self.key_space, question, hits, blocks, shown_from, own=True
        )
        scores = self.net.scores(candidates)
        order = sorted(range(len(blocks)), key=lambda i: (-scores[i], -blocks[i]))
        return [(int(blocks[i]), 0) for i in order if scores[i] > 0]
