"""What a session finds for a question: blocks of its contexts by words and by routing keys, fused by rank.

Rankings of the contexts are merged by score before they are fused: BM25 and cosines of one net compare across trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.session_memory import SessionMemory
from models.base_lm import BaseLM
from models.focus.allocators import reciprocal_rank_fusion
from models.focus.dense import KeySpace, query_states
from models.focus.key_search import KeySearch
from models.focus.refocus import BlockName
from models.gistnet import GistNet
from models.tokenizer import Tokenizer
from storage.contract import TreeReader
from storage.lexical import LexicalSearcher
from storage.schema import KEYS

FUSION_CONSTANT = 10.0
"""k of reciprocal rank fusion, tuned on `dev` (docs/evaluation.md)."""


@dataclass(frozen=True)
class Match:
    """Why a block was found."""

    score: float
    """1 where every search finds it first."""
    lexical_rank: int | None = None
    """From 1; None where the words do not find it."""
    key_rank: int | None = None

    @property
    def why(self) -> str:
        """In a few words."""
        found = [("words", self.lexical_rank), ("key", self.key_rank)]
        return ", ".join(f"{name} #{rank}" for name, rank in found if rank is not None)


class SessionSearch:
    """Searches a session's contexts."""

    def __init__(self, memory: SessionMemory, lm: BaseLM, gistnet: GistNet, tokenizer: Tokenizer, limit: int) -> None:
        """Args: `limit` is of the blocks each search brings of each context."""
        self._memory = memory
        self._lm = lm
        self._gistnet = gistnet
        self._tokenizer = tokenizer
        self._limit = limit
        self._lexical: dict[str, LexicalSearcher] = {}
        self._keys: dict[str, KeySearch] = {}
        self._measured_blocks: dict[str, int] = {}
        """Blocks the space of a key search was measured from."""

    def find(self, question: np.ndarray, stop_block: int, limit: int) -> dict[BlockName, Match]:
        """Blocks for a question.

        Args:
            question: its tokens, at least one.
            stop_block: of the session's own context, the block at which the raw tail begins, which is shown anyway.
            limit: blocks at most.

        Raises:
            StorageError, ModelError: what searching meets.
        """
        by_words: list[tuple[float, BlockName]] = []
        by_keys: list[tuple[float, BlockName]] = []
        text = self._tokenizer.decode(question)
        states = query_states(self._lm, self._gistnet, question)
        readers = self._memory.readers()
        for source, reader in enumerate(readers):
            name, last = reader.version.context, source == len(readers) - 1
            stop = min(stop_block, reader.version.num_blocks) if last else reader.version.num_blocks
            if stop == 0:
                continue
            if name not in self._lexical:
                folder = self._memory.folder_of(source)
                self._lexical[name] = LexicalSearcher(folder, self._tokenizer.decode_batch)
            blocks, scores = self._lexical[name].search(reader, text, self._limit, 0, stop)
            by_words += _scored(blocks, scores, source)
            by_keys += _scored(*self._key_search(name, reader).best(states, "pooled", self._limit, stop), source)
        return fused([_names(by_words), _names(by_keys)], limit)

    def _key_search(self, name: str, reader: TreeReader) -> KeySearch:
        num_blocks = reader.version.num_blocks
        # Where the keys themselves say how they are compared, they do so anew when there are twice as many.
        fixed = self._gistnet.spec.key_metric == "cosine"
        if name in self._keys and (fixed or num_blocks < 2 * self._measured_blocks[name]):
            self._keys[name].follow(reader)
        else:
            space = KeySpace.of_net(self._gistnet, reader, array=KEYS)
            self._keys[name] = KeySearch(reader, space, array=KEYS)
            self._measured_blocks[name] = num_blocks
        return self._keys[name]

    def close(self) -> None:
        """Release the indexes."""
        for searcher in self._lexical.values():
            searcher.close()
        self._lexical.clear()


def fused(rankings: Sequence[Sequence[BlockName]], limit: int) -> dict[BlockName, Match]:
    """Words' and keys' rankings as one, the best first; a score of 1 is first in both."""
    words, keys = ({name: rank for rank, name in enumerate(ranking, start=1)} for ranking in rankings)
    best = len(rankings) / (FUSION_CONSTANT + 1)
    found = {}
    for name in reciprocal_rank_fusion(rankings, FUSION_CONSTANT)[:limit]:
        ranks = (words.get(name), keys.get(name))
        score = sum(1.0 / (FUSION_CONSTANT + rank) for rank in ranks if rank is not None) / best
        found[name] = Match(score, *ranks)
    return found


def _scored(blocks: np.ndarray, scores: np.ndarray, source: int) -> list[tuple[float, BlockName]]:
    return [(float(score), (int(block), source)) for block, score in zip(blocks, scores, strict=True)]


def _names(scored: list[tuple[float, BlockName]]) -> list[BlockName]:
    """The best first; of equal ones the newer."""
    return [name for _, name in sorted(scored, key=lambda pair: (-pair[0], -pair[1][1], -pair[1][0]))]
