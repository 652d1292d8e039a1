"""Terms: what lexical search finds in code and prose, and which of them belong to a block.

A compound (`os.path.join`, a uuid, 3.14, well-known) is a term, so is each word of it, and so are the parts of a
snake_case or camelCase word: an identifier is found whole and by its parts, at the price of a third more terms than
words. Digits stay with the letters beside them, or every hash and uuid would crumble into numbers that match anything.
Chinese and Japanese, written without spaces, are one term a character.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from storage.contract import TreeReader

Decode = Callable[[Sequence[np.ndarray]], Sequence[str]]
"""Texts of token id arrays (uint32), in order."""

EDGE_TOKENS = 16
"""Tokens of each neighbour that are read to complete the words a block begins or ends inside."""

MAX_TERM_CHARS = 128
"""Longer ones (base64, minified code) are cut, in queries and in blocks alike."""

_UNSPACED = r"\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_SPACED = rf"[^\W{_UNSPACED}]+"
_COMPOUND = re.compile(rf"{_SPACED}(?:[.-]{_SPACED})*|[{_UNSPACED}]")
_WORD = re.compile(rf"{_SPACED}|[{_UNSPACED}]")
# In this order: capitals and digits alone (MAX, SHA256), an acronym before a hump (HTTP|Server), a hump, the rest.
_PART = re.compile(r"[A-Z0-9]+(?![^\W_])|[A-Z]+(?=[A-Z][a-z])|[A-Z]?[^\W_A-Z]+|[A-Z]+[0-9]*")


def terms_of(text: str, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Terms of a text that overlap characters `[start, stop)`, each whole, once for every time it occurs."""
    stop = len(text) if stop is None else stop
    for compound in _COMPOUND.finditer(text):
        if compound.end() <= start:
            continue
        if compound.start() >= stop:
            return
        words = list(_WORD.finditer(text, compound.start(), compound.end()))
        if len(words) > 1:
            yield _folded(compound.group())
        for word in words:
            if word.end() > start and word.start() < stop:
                yield from _word_terms(word, start, stop)


def _word_terms(match: re.Match[str], start: int, stop: int) -> Iterator[str]:
    word = match.group()
    rest = word[1:]
    if "_" not in word and rest == rest.lower():
        yield _folded(word)
        return
    parts = list(_PART.finditer(word))
    if parts:
        yield _folded(word)
    if len(parts) > 1 or (parts and parts[0].group() != word):
        begin = match.start()
        for part in parts:
            if begin + part.end() > start and begin + part.start() < stop:
                yield _folded(part.group())


def _folded(term: str) -> str:
    return term.casefold()[:MAX_TERM_CHARS]


def block_terms(
    reader: TreeReader, decode: Decode, first: int, stop: int, *, text_stop: int | None = None
) -> list[Counter[str]]:
    """Terms of blocks `[first, stop)` and how often each occurs.

    A word, or a compound, that a block boundary cuts counts whole with both blocks: either may be the one that
    says what the word is about, and both are needed to read it. Only neighbours of the same document complete words.

    Args:
        reader: pinned to a version that holds the blocks.
        decode: text of the tree's tokens.
        first, stop: the blocks.
        text_stop: text from this block on is not looked at; by default the version's end.
    """
    if first >= stop:
        return []
    end = reader.version.num_blocks if text_stop is None else text_stop
    low, high = max(first - 1, 0), min(stop + 1, end)
    tokens, counts = reader.tokens(low, high - low)
    rows = [row[:count] for row, count in zip(tokens, counts.tolist(), strict=True)]
    begins = _document_begins(reader, low, high)
    nothing = tokens[0, :0]
    before, through, windows = [], [], []
    for block in range(first - low, stop - low):
        left = nothing if block == 0 or begins[block] else rows[block - 1][-EDGE_TOKENS:]
        right = nothing if block + 1 == len(rows) or begins[block + 1] else rows[block + 1][:EDGE_TOKENS]
        before.append(left)
        through.append(np.concatenate([left, rows[block]]))
        windows.append(np.concatenate([left, rows[block], right]))
    num = stop - first
    texts = decode([*before, *through, *windows])
    return [
        Counter(terms_of(window, _shared_prefix(left, window), _shared_prefix(own, window)))
        for left, own, window in zip(texts[:num], texts[num : 2 * num], texts[2 * num :], strict=True)
    ]


def _document_begins(reader: TreeReader, low: int, high: int) -> np.ndarray:
    """Whether each block of `[low, high)` is its document's first: `(high - low,)` bool."""
    begins = np.zeros(high - low, bool)
    block = low
    while block < high:
        document = reader.document_at(block)
        begins[block - low] = document.first_block == block
        block = document.first_block + document.num_blocks
    return begins


def _shared_prefix(prefix: str, text: str) -> int:
    if text.startswith(prefix):
        return len(prefix)
    # They part where the prefix's last token holds only the first bytes of a character.
    return next((n for n, pair in enumerate(zip(prefix, text, strict=False)) if pair[0] != pair[1]), len(text))


def settled_blocks(reader: TreeReader) -> int:
    """Blocks whose terms no later commit changes: all but the last one of a document that still grows."""
    num_blocks = reader.version.num_blocks
    if num_blocks and reader.document_at(num_blocks - 1).state == "open":
        return num_blocks - 1
    return num_blocks
