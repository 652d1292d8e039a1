"""What the rivals find in a history for the raw tail at its end, or for a question behind it: ranked blocks.

The tail's own blocks are left out: they are shown anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32
from torch import Tensor

from actors.evaluation import rivals
from actors.evaluation.contents import Reading
from actors.evaluation.scorer import BlockCaches, CandidateScorer
from actors.focus_signals import QUERY_CONTEXT_TOKENS, RANKED_BLOCKS
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.evaluation_config import RetrievalConfig
from models.focus.allocators import RankedBlocks, ranked_by_score, reciprocal_rank_fusion
from models.focus.block_embeddings import BlockEmbeddings
from models.focus.dense import KeyIndex, KeySpace, Match, query_states
from models.gistnet import GistNet
from models.tokenizer import Tokenizer
from storage.contract import TreeReader
from storage.lexical.search import LexicalParameters, LexicalSearcher, ReplacedText
from storage.schema import KEYS

RANDOM_SEED_STRIDE = 1_000_003
"""Between the random choices of two evaluations; no evaluation has so many places."""


class Found:
    """What was found at one place, and how long it took, what it builds on included."""

    def __init__(self) -> None:
        self.ranked: dict[str, RankedBlocks] = {}
        self.seconds: dict[str, float] = {}
        """CPU seconds of this process."""

    def timed(self, name: str, call: Callable[[], RankedBlocks], *builds_on: str) -> None:
        """Keep a ranking under its name."""
        started = time.process_time()
        self.ranked[name] = call()
        self.seconds[name] = time.process_time() - started + sum(self.seconds[other] for other in builds_on)


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
    config: RetrievalConfig
    """How it is searched."""
    embeddings: BlockEmbeddings | None = None
    """Sentence embeddings of the blocks, where they are searched."""
    question: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Tokens behind the history; where there are any, they alone ask."""
    indexed: TreeReader | None = None
    """The reader beneath a planted one: what lexical indexes know."""
    planted_blocks: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Where the reading's text differs from it."""
    key_index: KeyIndex | None = None
    """Keys of blocks `[history's first, shown_from)`; made when there is none."""
    limit: int = RANKED_BLOCKS
    """Blocks of a ranking at most."""

    def find(self, wanted: Collection[str], random_seed: int) -> Found:
        """Rankings of all `wanted` that search, and of what they are made of."""
        found = Found()
        if rivals.RANDOM in wanted:
            found.timed(rivals.RANDOM, lambda: self.random(random_seed))
        # What measures a shortlist measures what the others would have shown.
        measured = set(wanted) & {rivals.RERANK, *rivals.ORACLES}
        fused = self.config.fusion if measured or rivals.FUSION in wanted else ()
        searchers = {rivals.BM25: self.bm25, rivals.DENSE: self.dense, rivals.MINILM: self.minilm}
        for name, search in searchers.items():
            if name in wanted or name in fused:
                found.timed(name, search)
        if fused:
            found.timed(rivals.FUSION, lambda: self._fused(found), *fused)
        return found

    def _fused(self, found: Found) -> RankedBlocks:
        rankings = [found.ranked[name] for name in self.config.fusion]
        return reciprocal_rank_fusion(rankings, self.config.fusion_constant)[: self.limit]

    def bm25(self) -> RankedBlocks:
        """Lexical hits of the tail's text."""
        first, reader = self.reading.history.first_block, self.reading.reader
        replaced = None if self.indexed is None else ReplacedText(reader, self.planted_blocks)
        blocks, _ = self.lexical.search(
            self.indexed or reader,
            self._asking_text(self.config.bm25_query_tokens),
            self.limit,
            first,
            self.shown_from,
            parameters=LexicalParameters(k1=self.config.bm25_k1, b=self.config.bm25_b),
            replaced=replaced,
        )
        return [(int(block), 0) for block in blocks]

    def minilm(self) -> RankedBlocks:
        """Blocks whose sentence embedding is like that of the tail's text."""
        assert self.embeddings is not None  # made wherever it is asked for
        first = self.reading.history.first_block
        if self.shown_from <= first:
            return []
        text = self._asking_text(self.config.minilm_query_tokens)
        return ranked_by_score(self.embeddings.scores(text, first, self.shown_from), first, limit=self.limit)

    def dense(self) -> RankedBlocks:
        """Blocks whose routing keys are like the tail's states."""
        if self.shown_from <= self.reading.history.first_block:
            return []
        return self.dense_by(self.asking_states(self.config.dense_query_tokens))

    def asking_states(self, num_tokens: int) -> Float32[Tensor, "q D"]:
        """States of the question, or of the newest tokens: the last rows of those of more."""
        context = self._tail(QUERY_CONTEXT_TOKENS)
        asking = len(self.question) or num_tokens
        return query_states(self.reading.lm, self.gistnet, context, min(asking, len(context)))

    def dense_by(self, states: Float32[Tensor, "q D"], match: Match = "pooled") -> RankedBlocks:
        """Blocks whose routing keys are like some states."""
        first, reader = self.reading.history.first_block, self.reading.reader
        index = self.key_index or KeyIndex(reader, self.key_space, first, self.shown_from, array=KEYS)
        return ranked_by_score(index.scores(states, match), first, limit=self.limit)

    def random(self, seed: int) -> RankedBlocks:
        """Blocks in an order that says nothing."""
        history = self.reading.history
        blocks = np.arange(history.first_block, self.shown_from)
        np.random.Generator(np.random.PCG64(seed)).shuffle(blocks)
        return [(int(block), 0) for block in blocks[: self.limit]]

    def reranked(self, blocks: Sequence[int], caches: BlockCaches) -> RankedBlocks:
        """Blocks by the likelihood the language model gives the newest tokens after each of them and the gists.

        Args:
            blocks: what is ranked.
            caches: the same blocks in the same order.
        """
        if not blocks:
            return []
        ids = self._tail(self.config.rerank_query_tokens + 1)
        scorer = CandidateScorer(caches, self.reading.nothing())
        nll = scorer.nll_with_each([], [(i,) for i in range(len(blocks))], ids).mean(axis=1)
        return [(blocks[i], 0) for i in np.argsort(nll, kind="stable").tolist()]

    def _asking_text(self, num_tokens: int) -> str:
        """Text of the question, or of the newest tokens."""
        return self.tokenizer.decode(self._tail(len(self.question) or num_tokens))

    def _tail(self, num_tokens: int) -> np.ndarray:
        history = self.reading.history
        num_blocks = min(-(-max(num_tokens - len(self.question), 0) // K) + 1, history.num_blocks)
        newest = self.reading.ids(history.stop_block - num_blocks, num_blocks)
        return np.concatenate([newest, self.question])[-num_tokens:]


def shortlist(rankings: Sequence[RankedBlocks], picks: int, size: int, then: RankedBlocks = ()) -> list[int]:
    """The first `picks` blocks of every ranking, those that agree once, and of `then` what still fits in `size`.

    Raises:
        ValueError: the picks do not fit.
    """
    chosen: dict[int, None] = {}
    for ranking in rankings:
        chosen.update(dict.fromkeys(block for block, _ in ranking[:picks]))
    if len(chosen) > size:
        raise ValueError(f"a shortlist of {size} cannot hold {picks} picks of each of {len(rankings)} rankings")
    for block, _ in then:
        if len(chosen) < size:
            chosen[block] = None
    return list(chosen)
