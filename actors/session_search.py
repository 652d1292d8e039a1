"""What a session finds for a question: blocks of its contexts by words and by routing keys, fused by rank.

Rankings of the contexts are merged by score before they are fused: BM25 and cosines of one net compare across trees.
A LensNet (`session_lens`) scores what was found instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from actors.focus_signals import Hits, Question
from actors.session_memory import SessionMemory
from models.base_lm import BaseLM
from models.focus.allocators import reciprocal_rank_fusion
from models.focus.dense import KeySpace
from models.focus.key_search import KeySearch
from models.focus.refocus import BlockName
from models.gistnet import GistNet
from models.tokenizer import Tokenizer
from storage.contract import TreeReader
from storage.lexical.search import LexicalSearcher
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
    nats: float | None = None
    """What LensNet expects of showing it, nats a token; None where it was not asked."""
    leads_to: int | None = None
    """The found block behind it, whose passage may begin in it; None where it is worth something by itself."""

    @property
    def why(self) -> str:
        """In a few words."""
        found = [("words", self.lexical_rank), ("key", self.key_rank)]
        parts = [f"{name} #{rank}" for name, rank in found if rank is not None]
        if self.nats is not None:
            parts.append(f"LensNet {self.nats:+.3f} nats")
        if self.leads_to is not None:
            parts.append(f"leads to block {self.leads_to}")
        return ", ".join(parts)


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

    def read(self, tokens: np.ndarray) -> Question:
        """Read a question's tokens, at least one, as keys and words are asked.

        Raises:
            ModelError: no tokens.
        """
        return Question.of(self._lm, self._gistnet, self._tokenizer, tokens, lexical_tokens=len(tokens))

    def hits(self, question: Question, stop_block: int) -> list[Hits]:
        """What words and keys find, context by context.

        Args:
            question: of `read`.
            stop_block: of the session's own context, the block at which the raw tail begins, which is shown anyway.

        Raises:
            StorageError, ModelError: what searching meets.
        """
        found: list[Hits] = []
        readers = self._memory.readers()
        for source, reader in enumerate(readers):
            name, last = reader.version.context, source == len(readers) - 1
            stop = min(stop_block, reader.version.num_blocks) if last else reader.version.num_blocks
            if stop == 0:
                found.append(Hits({}, {}))
                continue
            if name not in self._lexical:
                folder = self._memory.folder_of(source)
                self._lexical[name] = LexicalSearcher(folder, self._tokenizer.decode_batch)
            by_words = self._lexical[name].search(reader, question.text, self._limit, 0, stop)
            by_keys = self._key_search(name, reader).best(question.states, "pooled", self._limit, stop)
            found.append(Hits(_scores(*by_words), _scores(*by_keys)))
        return found

    def spaces(self) -> list[KeySpace | None]:
        """Where the keys of each context are compared; None where nothing was searched yet."""
        names = [reader.version.context for reader in self._memory.readers()]
        return [self._keys[name].space if name in self._keys else None for name in names]

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


def fused_hits(hits: Sequence[Hits], limit: int) -> dict[BlockName, Match]:
    """What was found in all contexts, words and keys fused, the best first."""
    by_words = [scored for source, of in enumerate(hits) for scored in _named(source, of.lexical)]
    by_keys = [scored for source, of in enumerate(hits) for scored in _named(source, of.dense)]
    return fused([_names(by_words), _names(by_keys)], limit)


def leads(
    matches: Mapping[BlockName, Match], share: float, count: int, first_block: Callable[[BlockName], int]
) -> dict[BlockName, Match]:
    """The blocks before the best ones, with what they are worth for that.

    Borders of blocks cut sentences, and searches mostly find the part that ends one: its first words are in the block
    before, which nothing else may speak for.

    Args:
        matches: what was found.
        share: of a found block's score that the one before it is worth.
        count: of the best that have one.
        first_block: of the document that holds a block: what stands before it belongs to something else.
    """
    best = sorted((name for name in matches if matches[name].score > 0), key=lambda name: -matches[name].score)[:count]
    found = {}
    for block, source in best if share > 0 else ():
        before = (block - 1, source)
        known, worth = matches.get(before, Match(0.0)), share * matches[block, source].score
        if known.score < worth and block > first_block((block, source)):
            found[before] = replace(known, score=worth, leads_to=block)
    return found


def _scores(blocks: np.ndarray, scores: np.ndarray) -> dict[int, float]:
    return dict(zip(blocks.tolist(), scores.tolist(), strict=True))


def _named(source: int, found: Mapping[int, float]) -> list[tuple[float, BlockName]]:
    return [(score, (block, source)) for block, score in found.items()]


def _names(scored: list[tuple[float, BlockName]]) -> list[BlockName]:
    """The best first; of equal ones the newer."""
    return [name for _, name in sorted(scored, key=lambda pair: (-pair[0], -pair[1][1], -pair[1][0]))]
