"""What the rivals find in a history for the raw tail at its end, or for a question behind it: ranked blocks.

The tail's own blocks are left out: they are shown anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.evaluation.contents import Reading
from actors.evaluation.scorer import BlockCaches, CandidateScorer
from cluster.config import TOKENS_PER_BLOCK as K
from models.focus.allocators import RankedBlocks, ranked_by_score, reciprocal_rank_fusion
from models.focus.dense import KeyIndex, KeySpace, query_states
from models.gistnet import GistNet
from models.tokenizer import Tokenizer
from storage.contract import TreeReader
from storage.lexical import LexicalSearcher, ReplacedText
from storage.schema import KEYS

RANKED_BLOCKS = 64
"""Blocks a retriever returns; far more than any budget here shows."""

QUERY_CONTEXT_TOKENS = 512
"""Newest tokens the language model reads to know what the query's own mean."""

DENSE_QUERY_TOKENS = 16
"""Newest tokens whose states are the dense query: at 8 to 20 recall was best, at 64 half of it was left."""

RERANK_QUERY_TOKENS = 32
"""Tokens of the tail whose likelihood, given a block, ranks the block."""


@dataclass(frozen=True)
class Retrieval:
    """Everything retrieval needs for one history."""

    reading: Reading
    lexical: LexicalSearcher
    tokenizer: Tokenizer
    gistnet: GistNet
    key_space: KeySpace
    shown_from: int
    """First block of the raw tail: it is shown anyway."""
    query_tokens: int
    """Newest tokens that ask."""
    question: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Tokens behind the history; where there are any, they alone ask."""
    indexed: TreeReader | None = None
    """The reader beneath a planted one: what lexical indexes know."""
    planted_blocks: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Where the reading's text differs from it."""
    key_index: KeyIndex | None = None
    """Keys of blocks `[history's first, shown_from)`; made when there is none."""

    def bm25(self) -> RankedBlocks:
        """Lexical hits of the tail's text."""
        text = self.tokenizer.decode(self._tail(len(self.question) or self.query_tokens))
        first, reader = self.reading.history.first_block, self.reading.reader
        replaced = None if self.indexed is None else ReplacedText(reader, self.planted_blocks)
        blocks, _ = self.lexical.search(
            self.indexed or reader, text, RANKED_BLOCKS, first, self.shown_from, replaced=replaced
        )
        return [(int(block), 0) for block in blocks]

    def dense(self) -> RankedBlocks:
        """Blocks whose routing keys are like the tail's states."""
        history, reader = self.reading.history, self.reading.reader
        if self.shown_from <= history.first_block:
            return []
        index = self.key_index or KeyIndex(reader, self.key_space, history.first_block, self.shown_from, array=KEYS)
        context = self._tail(QUERY_CONTEXT_TOKENS)
        asking = len(self.question) or DENSE_QUERY_TOKENS
        states = query_states(self.reading.lm, self.gistnet, context, min(asking, len(context)))
        return ranked_by_score(index.scores(states, "pooled"), history.first_block, limit=RANKED_BLOCKS)

    def random(self, seed: int) -> RankedBlocks:
        """Blocks in an order that says nothing."""
        history = self.reading.history
        blocks = np.arange(history.first_block, self.shown_from)
        np.random.Generator(np.random.PCG64(seed)).shuffle(blocks)
        return [(int(block), 0) for block in blocks[:RANKED_BLOCKS]]

    def reranked(self, blocks: Sequence[int], caches: BlockCaches) -> RankedBlocks:
        """Blocks by the likelihood the language model gives the newest tokens after each of them and the gists.

        Args:
            blocks: what is ranked.
            caches: the same blocks in the same order.
        """
        if not blocks:
            return []
        ids = self._tail(RERANK_QUERY_TOKENS + 1)
        scorer = CandidateScorer(caches, self.reading.nothing())
        nll = scorer.nll_with_each([], [(i,) for i in range(len(blocks))], ids).mean(axis=1)
        return [(blocks[i], 0) for i in np.argsort(nll, kind="stable").tolist()]

    def _tail(self, num_tokens: int) -> np.ndarray:
        history = self.reading.history
        num_blocks = min(-(-max(num_tokens - len(self.question), 0) // K) + 1, history.num_blocks)
        newest = self.reading.ids(history.stop_block - num_blocks, num_blocks)
        return np.concatenate([newest, self.question])[-num_tokens:]


def fused(rankings: Sequence[RankedBlocks]) -> RankedBlocks:
    """Reciprocal rank fusion, as many as a retriever returns."""
    return reciprocal_rank_fusion(rankings)[:RANKED_BLOCKS]


def shortlist(rankings: Sequence[RankedBlocks], picks: int, size: int) -> list[int]:
    """At most `size` blocks: the first `picks` of every ranking, then the next of each in turn.

    Raises:
        ValueError: so many picks do not fit.
    """
    chosen: dict[int, None] = {}
    for ranking in rankings:
        chosen.update(dict.fromkeys(block for block, _ in ranking[:picks]))
    if len(chosen) > size:
        raise ValueError(f"a shortlist of {size} cannot hold {picks} picks of each of {len(rankings)} rankings")
    depth = picks
    while len(chosen) < size and any(len(ranking) > depth for ranking in rankings):
        for ranking in rankings:
            if len(ranking) > depth and len(chosen) < size:
                chosen.setdefault(ranking[depth][0])
        depth += 1
    return list(chosen)
