"""From documents to windows: tokenise, leave out what is stored, cut every 1,024 tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeGuard

import numpy as np

from cluster.config import SLOTS_PER_SUPER_BLOCK as WINDOW_TOKENS
from cluster.config import TOKENS_PER_BLOCK as K
from models.tokenizer import Tokenizer
from storage.contract import DocumentMark, DocumentMeta
from storage.corpus import Document, QuarantinedItem
from storage.corpus.document import CorpusItem

BLOCKS_PER_WINDOW = WINDOW_TOKENS // K
DOCUMENTS_AT_A_TIME = 64
CHARACTERS_AT_A_TIME = 2**20
"""Documents tokenised in one call: bounded by number and by characters, so that memory is too."""

Marks = Callable[[Sequence[str]], Mapping[str, DocumentMark]]


@dataclass(frozen=True)
class Window:
    """Up to 1,024 tokens of one document, from a window boundary of the document on."""

    document: DocumentMeta
    first_block: int
    tokens: np.ndarray
    """(1 ... 1024,) uint32"""
    last: bool
    """The document ends with it."""


@dataclass(frozen=True)
class Skipped:
    """A document that is stored already."""

    key: str
    num_tokens: int


PackedItem = Window | Skipped | QuarantinedItem


def document_meta(document: Document) -> DocumentMeta:
    """What a tree keeps of a document beside its tokens."""
    return DocumentMeta(
        document.key,
        document.uri,
        document.content_sha256,
        document.size_bytes,
        document.modified_at,
        document.tags,
    )


def windows_of(document: DocumentMeta, tokens: np.ndarray, stored_blocks: int = 0) -> Iterator[Window]:
    """Windows of a document, beginning with the one that holds its first block that is not stored.

    Windows are counted from the document's start, so a resumed document is encoded exactly as an undisturbed one.
    """
    first_window = stored_blocks // BLOCKS_PER_WINDOW
    for start in range(first_window * WINDOW_TOKENS, len(tokens), WINDOW_TOKENS):
        stop = min(start + WINDOW_TOKENS, len(tokens))
        yield Window(document, start // K, tokens[start:stop], last=stop == len(tokens))


class Packer:
    """Turns corpus items into windows, in order."""

    def __init__(self, tokenizer: Tokenizer, marks: Marks) -> None:
        """Pack with a tokenizer; `marks` tells how far documents are stored (asked in batches)."""
        self._tokenizer = tokenizer
        self._marks = marks

    def pack(self, items: Iterable[CorpusItem]) -> Iterator[PackedItem]:
        """Yield windows of new documents, and quarantined and skipped ones as they come."""
        for batch in _batches(items):
            documents = [item for item in batch if isinstance(item, Document)]
            marks = self._marks([document.key for document in documents])
            new = [d for d in documents if not _is_stored(marks.get(d.key))]
            new = [d for d in new if _is_encodable(d.text)]
            tokens = dict(zip((d.key for d in new), self._tokenizer.encode_batch([d.text for d in new]), strict=True))
            for item in batch:
                if isinstance(item, QuarantinedItem):
                    yield item
                elif item.key in tokens:
                    yield from self._windows(item, tokens[item.key], marks.get(item.key))
                elif _is_stored(mark := marks.get(item.key)):
                    yield Skipped(item.key, mark.num_tokens)
                else:
                    yield QuarantinedItem(item.uri, "undecodable", "holds lone surrogates", item.size_bytes)

    def _windows(self, document: Document, tokens: np.ndarray, mark: DocumentMark | None) -> Iterator[PackedItem]:
        if len(tokens) == 0:
            yield QuarantinedItem(document.uri, "empty", "the tokenizer finds no token in it", document.size_bytes)
            return
        yield from windows_of(document_meta(document), tokens, mark.num_blocks if mark else 0)


def _is_stored(mark: DocumentMark | None) -> TypeGuard[DocumentMark]:
    return mark is not None and mark.state == "complete"


def _is_encodable(text: str) -> bool:
    """False for lone surrogates, which JSON can escape but no text encoding can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _batches(items: Iterable[CorpusItem]) -> Iterator[list[CorpusItem]]:
    batch: list[CorpusItem] = []
    keys: set[str] = set()
    characters = 0
    for item in items:
        if isinstance(item, Document):
            # The same document twice in one batch would be packed twice before its first copy is marked.
            if item.key in keys:
                yield batch
                batch, keys, characters = [], set(), 0
            keys.add(item.key)
            characters += len(item.text)
        batch.append(item)
        if len(batch) >= DOCUMENTS_AT_A_TIME or characters >= CHARACTERS_AT_A_TIME:
            yield batch
            batch, keys, characters = [], set(), 0
    if batch:
        yield batch


def batched_windows(
    items: Iterable[PackedItem], size: int, other: Callable[[PackedItem], None]
) -> Iterator[list[Window]]:
    """Group windows by `size`; everything else goes to `other` as it comes."""

    def windows() -> Iterator[Window]:
        for item in items:
            if isinstance(item, Window):
                yield item
            else:
                other(item)

    stream = windows()
    while batch := list(islice(stream, size)):
        yield batch
