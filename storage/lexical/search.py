"""Lexical search: the blocks of a history that share rare terms with a text, by BM25.

Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), equation 3.15, with the idf
ln(1 + (N - n + 0.5) / (n + 0.5)), which is never negative. A block is the document; each term of the query counts
once. N, n and the mean length are those of the whole context, as far as it is indexed or the reader sees it, also
when only a part is searched: a word is as rare as it is in all that was read, and no search has to count again.

The time of a search is bounded by pruning: of a query's terms only the rarest are looked up, as many as the
parameters allow. What is pruned is common, and says least.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from cluster.errors import ConfigError, NodeMissingError
from storage.contract import TreeReader
from storage.lexical.index import LEXICAL_FILE
from storage.lexical.reader import IndexReader, IndexSnapshot
from storage.lexical.recent import RecentTerms
from storage.lexical.terms import Decode, block_terms, terms_of


@dataclass(frozen=True)
class LexicalParameters:
    """BM25's two constants, and which terms of a query are looked up."""

    k1: float = 1.2
    """How much a term's second occurrence in a block adds; 0: nothing."""
    b: float = 0.75
    """How much a long block's terms count less; 0: not at all, 1: in proportion."""
    max_terms: int = 32
    """Terms that are looked up, the rarest first."""
    max_share: float = 0.05
    """Share of all blocks from which on a term is too common to be looked up."""
    min_common_blocks: int = 64
    """A term of so few blocks is looked up whatever its share, for contexts that are still short."""
    max_postings: int = 65_536
    """Blocks of all the looked-up terms together: what bounds the time of a search."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            ConfigError: naming the value.
        """
        if not (self.k1 >= 0 and 0 <= self.b <= 1):
            raise ConfigError(f"BM25 needs k1 >= 0 and 0 <= b <= 1, got k1={self.k1}, b={self.b}")
        if min(self.max_terms, self.min_common_blocks, self.max_postings, self.max_share) < 0:
            raise ConfigError(f"the bounds of a lexical search must not be negative: {self}")


@dataclass(frozen=True, eq=False)
class ReplacedText:
    """Other text in some blocks than was indexed, as a reader over the same version gives it."""

    reader: TreeReader
    blocks: np.ndarray
    """int64, ascending: where its text differs."""


@dataclass(frozen=True)
class _Changes:
    """Terms of replaced blocks and of those beside them, whose cut words they complete."""

    then: Mapping[int, Counter[str]] = field(default_factory=dict)
    """As they are counted in the statistics."""
    now: Mapping[int, Counter[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, reader: TreeReader, replaced: ReplacedText, decode: Decode, stop: int) -> _Changes:
        """Of blocks `[0, stop)`."""
        touched = np.unique(np.asarray(replaced.blocks, np.int64)[:, None] + np.arange(-1, 2))
        touched = touched[(touched >= 0) & (touched < stop)]
        then: dict[int, Counter[str]] = {}
        now: dict[int, Counter[str]] = {}
        for run in np.split(touched, np.flatnonzero(np.diff(touched) != 1) + 1):
            if len(run):
                first, end = int(run[0]), int(run[-1]) + 1
                then.update(zip(run.tolist(), block_terms(reader, decode, first, end), strict=True))
                now.update(zip(run.tolist(), block_terms(replaced.reader, decode, first, end), strict=True))
        return cls(then, now)

    @property
    def blocks(self) -> np.ndarray:
        return np.fromiter(self.now, np.int64, len(self.now))

    @property
    def added_terms(self) -> int:
        return sum(terms.total() for terms in self.now.values()) - sum(terms.total() for terms in self.then.values())

    def added_blocks(self, term: str) -> int:
        """How many more blocks hold a term."""
        return sum(term in terms for terms in self.now.values()) - sum(term in terms for terms in self.then.values())

    def postings(self, term: str, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where in blocks `[first, stop)` a term occurs, how often, and the lengths of those blocks."""
        found = [
            (b, terms[term], terms.total()) for b, terms in self.now.items() if first <= b < stop and term in terms
        ]
        blocks, counts, lengths = np.array(found, np.int64).reshape(-1, 3).T
        return blocks, counts.astype(np.float64), lengths.astype(np.float64)


@dataclass(frozen=True)
class _Edge:
    """The last block of the range that is searched, read as if nothing followed it."""

    block: int
    terms: Counter[str]
    num_uncounted: int
    """1 when the block is in no statistics yet, because its document still grows; else 0."""


@dataclass(frozen=True)
class _Term:
    text: str
    num_blocks: int
    most_indexed: int


class LexicalSearcher:
    """Searches one context. Cheap to open; use one a thread, and keep it: it remembers what is not indexed."""

    def __init__(self, folder: Path, decode: Decode) -> None:
        """Search the context in `folder`, whose tokens `decode` turns into text, with or without an index."""
        self._decode = decode
        self._index = IndexReader(folder / LEXICAL_FILE)
        self._recent = RecentTerms(decode)

    def search(
        self,
        reader: TreeReader,
        query_text: str,
        limit: int,
        first_block: int = 0,
        stop_block: int | None = None,
        *,
        parameters: LexicalParameters | None = None,
        replaced: ReplacedText | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best blocks of a range, the best first; of equal ones the newer.

        Nothing behind the range is looked at, not even the rest of a word its last block ends inside. How far the
        index has come changes the time of a search and nothing else.

        Args:
            reader: pinned to the version that is searched.
            query_text: any text; it has no syntax.
            limit: the most blocks to return.
            first_block, stop_block: the range `[first_block, stop_block)`, by default the version's all.
            parameters: by default `LexicalParameters()`.
            replaced: text that stands in `reader`'s for this search: its result is that of a context, index and all,
                that was made of it. Costs 0.3 ms a replaced block.

        Returns:
            `(n,)` int64 blocks and `(n,)` float64 scores above 0; `n` is less than `limit`, perhaps 0, where fewer
            blocks hold a term that is not pruned.

        Raises:
            NodeMissingError: a range outside the version.
            StorageError: the machine refused to read.
        """
        version = reader.version
        stop_block = version.num_blocks if stop_block is None else stop_block
        if not 0 <= first_block <= stop_block <= version.num_blocks:
            raise NodeMissingError(
                f"blocks {first_block} to {stop_block} are not all in version {version.seq} of context "
                f"{version.context!r}, which has {version.num_blocks} blocks"
            )
        terms = set(terms_of(query_text))
        if not terms or first_block == stop_block or limit < 1:
            return np.empty(0, np.int64), np.empty(0, np.float64)
        wanted = parameters or LexicalParameters()
        blocks, scores = self._index.read(
            reader, lambda index: self._scores(index, reader, terms, first_block, stop_block, wanted, replaced)
        )
        if limit < len(scores):
            # Only those that may be among the best are sorted: of 50,000 blocks in a tenth of the time.
            candidates = scores >= np.partition(scores, -limit)[-limit]
            blocks, scores = blocks[candidates], scores[candidates]
        best = np.lexsort((-blocks, -scores))[:limit]
        return blocks[best], scores[best]

    def _scores(
        self,
        index: IndexSnapshot,
        reader: TreeReader,
        query: set[str],
        first: int,
        stop: int,
        parameters: LexicalParameters,
        replaced: ReplacedText | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        recent = self._recent
        recent.follow(reader, index.num_blocks)
        changes = _Changes() if replaced is None else _Changes.of(reader, replaced, self._decode, recent.stop)
        last = stop - 1
        searched = reader if replaced is None else replaced.reader
        edge_terms = block_terms(searched, self._decode, last, stop, text_stop=stop)[0]
        edge = _Edge(last, edge_terms, int(last >= recent.stop))
        num_blocks = recent.stop + edge.num_uncounted
        num_terms = index.num_terms + recent.num_terms + edge.num_uncounted * edge_terms.total() + changes.added_terms
        terms = _rarest(self._known_terms(index, query, edge, changes), num_blocks, parameters)
        blocks, counts, lengths, sizes = self._postings(index, terms, first, edge, changes)
        frequencies = np.array([term.num_blocks for term in terms], np.float64)
        idf = np.log1p((num_blocks - frequencies + 0.5) / (frequencies + 0.5))
        # A block without a term scores nothing, so a mean of 0 divides nothing.
        mean_length = max(num_terms / num_blocks, 1e-9)
        damping = parameters.k1 * (1 - parameters.b + parameters.b * lengths / mean_length)
        weights = np.repeat(idf, sizes) * (parameters.k1 + 1) * counts / (counts + damping)
        found, places = np.unique(blocks, return_inverse=True)
        # Of nothing, bincount makes integers.
        return found, np.bincount(places, weights, len(found)).astype(np.float64, copy=False)

    def _known_terms(self, index: IndexSnapshot, query: set[str], edge: _Edge, changes: _Changes) -> list[_Term]:
        known = []
        for text in query:
            num_indexed, most = index.frequency(text)
            counted = num_indexed + self._recent.frequency(text) + changes.added_blocks(text)
            if text in edge.terms:
                # Half a word at the end of the range may be known nowhere else.
                counted = max(counted + edge.num_uncounted, 1)
            known.append(_Term(text, counted, most))
        return known

    def _postings(
        self, index: IndexSnapshot, terms: list[_Term], first: int, edge: _Edge, changes: _Changes
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
        """Blocks, counts and block lengths of all terms, one term after the other, and how many each has."""
        changed = changes.blocks
        blocks, counts, lengths = [np.empty(0, np.int64)], [np.empty(0)], [np.empty(0)]
        sizes = []
        for term in terms:
            indexed, times = index.postings(term.text, term.most_indexed, first, min(index.num_blocks, edge.block))
            newer, newer_times = self._recent.postings(term.text, first, edge.block)
            found = np.concatenate([indexed, newer])
            # What was counted in replaced blocks is stale.
            valid = ~np.isin(found, changed)
            at_edge = [edge.block] if term.text in edge.terms else []
            put, put_times, put_lengths = changes.postings(term.text, first, edge.block)
            blocks += [found[valid], put, np.array(at_edge, np.int64)]
            counts += [
                np.concatenate([times, newer_times])[valid],
                put_times,
                np.array([edge.terms[term.text] for _ in at_edge], np.float64),
            ]
            known_lengths = [index.lengths[indexed].astype(np.float64), self._recent.lengths(newer)]
            lengths += [
                np.concatenate(known_lengths)[valid],
                put_lengths,
                np.array([edge.terms.total() for _ in at_edge], np.float64),
            ]
            sizes.append(int(valid.sum()) + len(put) + len(at_edge))
        return np.concatenate(blocks), np.concatenate(counts), np.concatenate(lengths), sizes

    def close(self) -> None:
        """Release the index file."""
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rarest(terms: list[_Term], num_blocks: int, parameters: LexicalParameters) -> list[_Term]:
    """The terms worth looking up, the rarest first."""
    most = max(parameters.min_common_blocks, parameters.max_share * num_blocks)
    # By text where equally rare: the order is the order of summation, and so part of the result.
    known = sorted((t for t in terms if 0 < t.num_blocks <= most), key=lambda t: (t.num_blocks, t.text))
    chosen: list[_Term] = []
    left = parameters.max_postings
    for term in known[: parameters.max_terms]:
        left -= term.num_blocks
        if left < 0:
            break
        chosen.append(term)
    return chosen
