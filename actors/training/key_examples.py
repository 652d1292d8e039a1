"""What routing keys are trained on: real text with facts planted in it, questions for them, and pairs of blocks of the
text itself that share rare words.

Shapes: W windows of T tokens, n = T / 32 blocks each, Q questions of at most L tokens, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64

from actors.training.key_facts import KeyFact
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import ModelError
from models.tokenizer import Tokenizer

QUESTION_TOKENS = 48
"""L: of a longer question the last ones count."""

CONTEXT_TOKENS = 16
"""Of other text at least, before a question, as there is before one that is asked."""

LITERAL, DESCRIBED = 0, 1
KINDS = ("literal", "described")

RARE_NATS = 7.0
"""Surprisal of a token under the corpus' unigrams from which it counts as rare: one in 1,100."""

SHARED_NATS = 18.0
"""Of the rare tokens that two blocks share, in all, to be a pair: two or three words."""


@dataclass(frozen=True)
class KeyExamples:
    """One shard of them. Blocks are counted over its windows: block b of window w is `w * n + b`."""

    windows: Int64[np.ndarray, "W T"]
    questions: list[Int64[np.ndarray, " L"]]
    """Token ids, at most 48."""
    contexts: Int64[np.ndarray, "Q C"]
    """64 token ids of other text; as many of the last ones as are needed go before a question."""
    kinds: Int64[np.ndarray, " Q"]
    """`LITERAL` or `DESCRIBED`."""
    words: Int64[np.ndarray, " Q"]
    """Number of the thing asked for; equal ones, the same thing."""
    answers: Int64[np.ndarray, "Q 2"]
    """First and last block that a reader needs for an answer: that which names the thing, by the name's last token,
    and those that hold what is to be found of it."""
    spans: Int64[np.ndarray, "Q 2"]
    """First and last block that holds any of the fact."""
    pairs: Int64[np.ndarray, "P 2"]
    """A later block, and the earlier one of its window that shares most with it."""
    pair_own: Bool[np.ndarray, "P 32"]
    """Tokens of the later block that the earlier one does not have."""


def make_examples(
    windows: np.ndarray,
    facts: Sequence[KeyFact],
    numbers: Sequence[int],
    tokenizer: Tokenizer,
    surprisal: Float32[np.ndarray, " V"],
    seed: Sequence[int],
) -> KeyExamples:
    """Plant facts evenly over windows, ask for each in both ways, and find pairs.

    Args:
        windows: `(W, T)` token ids; what is pushed out of a window by facts is lost.
        facts: at most as many as fit.
        numbers: of the things they are about.
        tokenizer: of the windows.
        surprisal: of every token, nats.
        seed: of where facts are planted.

    Raises:
        ModelError: too many facts for the windows.
    """
    random = np.random.default_rng(seed)
    windows = windows.astype(np.int64)
    num_windows, num_tokens = windows.shape
    num_blocks = num_tokens // K
    owners = np.arange(len(facts)) * num_windows // max(len(facts), 1)
    answers, spans = np.zeros((2, len(facts), 2), np.int64)
    planted = windows.copy()
    for window in range(num_windows):
        own = np.flatnonzero(owners == window).tolist()
        statements = [_statement(facts[fact], tokenizer) for fact in own]
        planted[window], begins = _plant(windows[window], [ids for ids, _ in statements], random)
        for fact, (ids, needed), begin in zip(own, statements, begins, strict=True):
            answers[fact] = window * num_blocks + (begin + np.array(needed)) // K
            spans[fact] = window * num_blocks + (begin + np.array([0, len(ids) - 1])) // K
    texts = [text for fact in facts for text in (fact.literal, fact.described)]
    questions = [tokenizer.encode("\n\n" + text)[-QUESTION_TOKENS:].astype(np.int64) for text in texts]
    pairs, own_tokens = _pairs(planted, spans, surprisal)
    return KeyExamples(
        planted,
        questions,
        _contexts(windows, len(questions), random),
        np.tile([LITERAL, DESCRIBED], len(facts)),
        np.repeat(np.asarray(numbers, np.int64), 2),
        np.repeat(answers, 2, axis=0),
        np.repeat(spans, 2, axis=0),
        pairs,
        own_tokens,
    )


def token_surprisal(counts: Int64[np.ndarray, " V"]) -> Float32[np.ndarray, " V"]:
    """-log of every token's share of a corpus, one more than it was counted."""
    return -np.log((counts + 1) / (counts.sum() + len(counts))).astype(np.float32)


def _statement(fact: KeyFact, tokenizer: Tokenizer) -> tuple[np.ndarray, tuple[int, int]]:
    """Its tokens, and the first and last of those that answer: the one that ends the word, and the value's."""
    ids = tokenizer.encode(" " + fact.statement).astype(np.int64)
    _, named = _tokens_of(fact.word, ids, tokenizer)
    first, last = _tokens_of(fact.value, ids, tokenizer)
    return ids, (min(named, first), max(named, last))


def _tokens_of(part: str, ids: np.ndarray, tokenizer: Tokenizer) -> tuple[int, int]:
    """Numbers of the first and last token of where it first stands.

    Raises:
        ModelError: it stands nowhere.
    """
    end = next((end for end in range(1, len(ids) + 1) if part in tokenizer.decode(ids[:end])), None)
    if end is None:
        raise ModelError(f"the fact {tokenizer.decode(ids)!r} does not hold {part!r}")
    return max(first for first in range(end) if part in tokenizer.decode(ids[first:end])), end - 1


def _plant(
    window: np.ndarray, encoded: Sequence[np.ndarray], random: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """The window with the statements in it, each in a part of its own, and the first token of each."""
    size = len(window)
    total = sum(map(len, encoded))
    if 2 * total > size:
        raise ModelError(f"facts of {total} tokens in a window of {size}; lower routing_keys.facts_per_window")
    pieces: list[np.ndarray] = []
    begins: list[int] = []
    kept = size - total
    read = written = 0
    for index, ids in enumerate(encoded):
        low, high = (kept * part // len(encoded) for part in (index, index + 1))
        at = int(random.integers(low, max(high, low + 1)))
        pieces += [window[read:at], ids]
        written += at - read
        begins.append(written)
        written += len(ids)
        read = at
    return np.concatenate([*pieces, window[read:kept]]), begins


def _contexts(windows: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Stretches of the windows as they were."""
    size = QUESTION_TOKENS + CONTEXT_TOKENS
    rows = random.integers(0, len(windows), count)
    starts = random.integers(0, windows.shape[1] - size + 1, count)
    return windows[rows[:, None], starts[:, None] + np.arange(size)]


def _pairs(windows: np.ndarray, spans: np.ndarray, surprisal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every block the earlier one it shares most rare tokens with, the one right before it not counted."""
    num_windows, num_tokens = windows.shape
    num_blocks = num_tokens // K
    planted = {block for first, last in spans.tolist() for block in range(first, last + 1)}
    pairs, own = [], []
    for window in range(num_windows):
        blocks = windows[window].reshape(num_blocks, K)
        rare = [{t for t in block.tolist() if surprisal[t] >= RARE_NATS} for block in blocks]
        for later in range(2, num_blocks):
            shared = [sum(float(surprisal[t]) for t in rare[later] & rare[earlier]) for earlier in range(later - 1)]
            best = int(np.argmax(shared))
            numbers = (window * num_blocks + later, window * num_blocks + best)
            if shared[best] >= SHARED_NATS and not planted.intersection(numbers):
                pairs.append(numbers)
                own.append(~np.isin(blocks[later], blocks[best]))
    return np.array(pairs, np.int64).reshape(-1, 2), np.array(own, bool).reshape(-1, K)
