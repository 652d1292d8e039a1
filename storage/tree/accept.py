"""Which part of a write is new: the rules of documents, order and idempotence, shared by every kind of tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import InvalidWriteError, OutOfOrderError
from storage.codec import encode_arrays
from storage.contract import DocumentMeta, PrunedSpan, SpanWrite
from storage.geometry import NO_TOKEN
from storage.schema import Encoding
from storage.tree.documents import OpenDocument


@dataclass
class Accepted:
    """The new part of an `append`, to be stored as one run of blocks, and its documents' new high-water marks."""

    spans: list[SpanWrite] = field(default_factory=list)
    documents: list[OpenDocument] = field(default_factory=list)
    skipped_blocks: int = 0
    num_blocks: int = 0
    """New blocks, those of `spans`."""
    num_tokens: int = 0
    """Their tokens."""

    @property
    def open_document(self) -> OpenDocument | None:
        """The document that goes on growing after this write."""
        return self.documents[-1] if self.documents[-1].state == "open" else None

    def pruned(self, first_block: int) -> list[PrunedSpan]:
        """What is not whole of the new blocks, on the timeline; the first new one is `first_block`."""
        found, start = [], first_block
        for span in self.spans:
            found += [part._replace(first=start + part.first) for part in span.pruned]
            start += span.num_blocks
        return found

    def blocks(self, tokens_before: int) -> dict[str, np.ndarray]:
        """Tokens, counts and prefix sum of the run, given the timeline's tokens before it."""
        before = []
        for span in self.spans:
            # All blocks but a document's last one are full.
            before.append(np.arange(tokens_before, tokens_before + span.num_blocks * K, K, dtype=np.int64))
            tokens_before += span.total_tokens
        return {
            "tokens": _joined([span.tokens for span in self.spans]),
            "tokens_before": _joined(before)[:, None],
            "num_tokens": _joined([span.num_tokens for span in self.spans])[:, None],
        }

    def encoded(self, encoding: Encoding) -> dict[str, np.ndarray]:
        """The run's gists, keys, … as stored bytes (`encode_arrays`)."""
        pieces = [encode_arrays(encoding.arrays, span.arrays, span.num_blocks) for span in self.spans]
        return {name: _joined([arrays[name] for arrays in pieces]) for name in pieces[0]}

    def encoded_before(self) -> dict[str, np.ndarray]:
        """As `encoded`, of spans that went through `encode_arrays` already."""
        pieces = [span.arrays for span in self.spans]
        return {name: _joined([np.asarray(arrays[name]) for arrays in pieces]) for name in pieces[0]}


def _joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """The pieces one after the other; a single one is not copied, and a commit usually has one."""
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _still_open(key: str, context: str, growing: OpenDocument) -> OutOfOrderError:
    return OutOfOrderError(
        f"document {key!r} cannot begin: {growing.meta.key!r} is still open in context {context!r}. Finish it, or end "
        "it with close_document."
    )


def accept_spans(
    spans: Sequence[SpanWrite],
    context: str,
    tip_block: int,
    open_document: OpenDocument | None,
    find: Callable[[str], OpenDocument | None],
    *,
    checked: bool = False,
) -> Accepted:
    """Drop what is stored, refuse gaps, and plan the documents' new high-water marks. Changes nothing.

    Args:
        spans: as handed to `append`.
        context: name, for messages.
        tip_block: blocks of the timeline.
        open_document: the document that is growing.
        find: a fresh copy of the stored document of a key.
        checked: the spans went through here before, so each is sound in itself.

    Raises:
        InvalidWriteError, OutOfOrderError: see `TreeWriter.append`.
    """
    accepted = Accepted()
    planned: dict[str, OpenDocument] = {}
    growing = open_document.copy() if open_document else None
    for span in spans:
        if not checked:
            span.check()
        key = span.document.key
        is_growing = growing is not None and growing.meta.key == key
        document = growing if is_growing else planned.get(key) or find(key)
        stop = span.first_block + span.num_blocks
        if document is None:
            if growing is not None:
                raise _still_open(key, context, growing)
            document = OpenDocument(None, span.document, tip_block + accepted.num_blocks)
        elif stop <= document.num_blocks and (document.state != "open" or not span.last):
            accepted.skipped_blocks += span.num_blocks
            continue
        elif document.state != "open":
            raise OutOfOrderError(
                f"document {key!r} is {document.state} with {document.num_blocks} blocks and cannot grow"
            )
        stored = document.num_blocks - span.first_block
        if stored < 0:
            raise OutOfOrderError(
                f"document {key!r} is stored up to block {document.num_blocks}; the span starts at "
                f"{span.first_block}. Send the blocks between first."
            )
        if stored >= span.num_blocks:
            raise OutOfOrderError(
                f"document {key!r} has all {stop} blocks already but is still open; end it with "
                "close_document(complete=True)"
            )
        accepted.skipped_blocks += stored
        new = span.part(stored, span.num_blocks) if stored else span
        document.grow(new)
        accepted.spans.append(new)
        accepted.num_blocks += new.num_blocks
        accepted.num_tokens += new.total_tokens
        if key not in planned:
            planned[key] = document
            accepted.documents.append(document)
        growing = document if document.state == "open" else None
    return accepted


def accept_tail(
    meta: DocumentMeta,
    token_offset: int,
    tokens: np.ndarray,
    context: str,
    tip_block: int,
    open_document: OpenDocument | None,
    known: OpenDocument | None,
) -> OpenDocument | None:
    """The document with its tail grown by what is new; None when nothing is.

    Raises:
        InvalidWriteError, OutOfOrderError: see `TreeWriter.append_tail`.
    """
    tokens = np.ascontiguousarray(tokens, np.uint32)
    if (tokens == NO_TOKEN).any():
        raise InvalidWriteError(f"document {meta.key!r}: {NO_TOKEN:#x} marks an empty slot and is no token")
    if known is None and open_document is not None:
        raise _still_open(meta.key, context, open_document)
    document = known or OpenDocument(None, meta, tip_block)
    stored = document.num_tokens + len(document.tail)
    if token_offset > stored:
        raise OutOfOrderError(
            f"document {meta.key!r} is stored up to token {stored}; the write starts at {token_offset}"
        )
    fresh = tokens[stored - token_offset :]
    if len(fresh) == 0:
        return None
    if document.state != "open":
        raise OutOfOrderError(f"document {meta.key!r} is {document.state} and cannot grow")
    document.tail = np.concatenate([document.tail, fresh])
    return document


def ended_document(key: str, context: str, open_document: OpenDocument | None, *, complete: bool) -> OpenDocument:
    """A copy of the open document, ended.

    Raises:
        OutOfOrderError: see `TreeWriter.close_document`.
    """
    if open_document is None or open_document.meta.key != key:
        raise OutOfOrderError(f"document {key!r} is not open in context {context!r}")
    document = open_document.copy()
    document.end(complete=complete)
    return document
