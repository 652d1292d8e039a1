"""Texts as trees whose tokens are UTF-8 bytes, and BM25 computed the long way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from storage.contract import DocumentMeta, SpanWrite, TreeWriter
from storage.geometry import NO_TOKEN
from storage.lexical.search import LexicalParameters
from tests.storage.support import encoding_of

ENCODING = encoding_of()
UNPRUNED = LexicalParameters(max_terms=10_000, max_share=1.0)


def decode(tokens: Sequence[np.ndarray]) -> list[str]:
    """Texts of byte tokens; a character cut in two shows as U+FFFD, as with byte-level tokenizers."""
    return [bytes(row.tolist()).decode("utf-8", "replace") for row in tokens]


def span(key: str, text: str, first: int = 0, stop: int | None = None, *, ends: bool = True) -> SpanWrite:
    """Blocks `[first, stop)` of a document."""
    raw = text.encode()
    num_blocks = -(-len(raw) // K)
    stop = num_blocks if stop is None else stop
    part = np.frombuffer(raw[first * K : stop * K], np.uint8).astype(np.uint32)
    padded = np.full((stop - first) * K, NO_TOKEN, np.uint32)
    padded[: len(part)] = part
    counts = np.minimum(len(raw) - np.arange(first, stop) * K, K).astype(np.uint8)
    gists = np.zeros((stop - first, ENCODING.arrays[0].width), np.float32)
    meta = DocumentMeta(key, key)
    return SpanWrite(meta, first, padded.reshape(-1, K), counts, {"gists": gists}, last=ends and stop == num_blocks)


def write(tree: TreeWriter, *texts: str) -> None:
    """Append documents, each in one span."""
    for text in texts:
        tree.append([span(f"doc{tree.version().num_blocks}", text)])


def words_of_blocks(texts: Sequence[str]) -> list[list[str]]:
    """Words (split at spaces, ASCII) of every block of a timeline of documents, those cut by an edge with both."""
    blocks = []
    for text in texts:
        for start in range(0, len(text), K):
            stop = min(start + K, len(text))
            words, place = [], 0
            for word in text.split(" "):
                if word and place < stop and place + len(word) > start:
                    words.append(word)
                place += len(word) + 1
            blocks.append(words)
    return blocks


def bm25_scores(blocks: Sequence[Sequence[str]], query: set[str], k1: float, b: float) -> list[float]:
    """Okapi BM25 of every block, term by term."""
    mean = sum(map(len, blocks)) / len(blocks)
    scores = []
    for words in blocks:
        counts, score = Counter(words), 0.0
        for term in query:
            containing = sum(term in other for other in blocks)
            idf = math.log(1 + (len(blocks) - containing + 0.5) / (containing + 0.5))
            if counts[term]:
                damped = counts[term] + k1 * (1 - b + b * len(words) / mean)
                score += idf * counts[term] * (k1 + 1) / damped
        scores.append(score)
    return scores
