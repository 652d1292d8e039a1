"""Bulk ingest: blocks go straight into segments, without passing through the journal.

Spans are gathered in memory until they fill a segment; its catalogue commit acknowledges them. Where segments fill
faster than `gather_s`, up to eight are written as one, by a thread of its own while the next are gathered: files and
their syncs are most of the time where gists come ready-made, and nothing beside a GistNet. What a crash costs is at
most one segment's worth of unacknowledged work, or the last `gather_s` of it and what is being written, which the
job's next run does again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from storage.codec import Values, encode_arrays
from storage.contract import Ack, DocumentMark, DocumentMeta, SpanWrite, Version
from storage.tree.accept import accept_spans
from storage.tree.documents import OpenDocument
from storage.tree.reader import ContextReader
from storage.tree.writer import ContextWriter

GATHER_S = 1.0
"""How long a full segment of a fast feed may wait for others."""

SEGMENTS_AT_ONCE = 8
"""Full segments that do not wait any longer: 10 MB at d = 576."""


@dataclass(frozen=True)
class _Flight:
    """Blocks that are being written."""

    first_block: int
    num_blocks: int
    ack: Future[Ack]


class BulkWriter:
    """A `TreeWriter` that fills whole segments. Acknowledgements count what is pending; `flush` makes it durable."""

    def __init__(self, writer: ContextWriter, gather_s: float = 0.0) -> None:
        """Write through `writer`, which this object then owns.

        Args:
            writer: of the context.
            gather_s: a segment that is full is written by the first `append` so many seconds after the last one, or
                with seven others, while the caller goes on; a write that failed is told to the next call. 0: at once,
                before `append` returns.
        """
        self._writer = writer
        self._gather_s = gather_s
        self._stored_at = -gather_s
        self._pending: list[SpanWrite] = []
        self._num_pending = 0
        # Documents as they will be once what is pending is stored; those on disk are not repeated.
        self._planned: dict[str, OpenDocument] = {}
        self._hand = ThreadPoolExecutor(1, f"bulk-{writer.name}") if gather_s else None
        self._flight: _Flight | None = None

    def version(self) -> Version:
        """The newest committed version."""
        return self._writer.version()

    def append(self, spans: Sequence[SpanWrite], request_id: str = "") -> Ack:
        """Gather spans, and store the segments that they fill.

        What is stored or pending already is skipped. A span that is refused leaves nothing of its call behind. When a
        commit fails, everything pending is dropped: it was never acknowledged, and `marks` say where to go on.
        """
        writer = self._writer
        new_blocks = self._landed(wait=False)
        accepted = accept_spans(
            spans, writer.name, self._written() + self._num_pending, self._growing(), self._document
        )
        # Encoded now: bad values are refused with their own call, and what waits takes the bytes it will have on disk.
        specs = writer.encoding.arrays
        encoded = [replace(s, arrays=encode_arrays(specs, s.arrays, s.num_blocks)) for s in accepted.spans]
        self._pending += encoded
        self._num_pending += accepted.num_blocks
        self._planned.update({document.meta.key: document for document in accepted.documents})
        while num_blocks := self._due():
            new_blocks += self._store(num_blocks, request_id)
        waiting = self._num_pending + (self._flight.num_blocks if self._flight else 0)
        return Ack(writer.version(), new_blocks, accepted.skipped_blocks, pending_blocks=waiting)

    def _written(self) -> int:
        """Blocks of the timeline, with those that are being written."""
        flight = self._flight
        return self._writer.version().num_blocks if flight is None else flight.first_block + flight.num_blocks

    def _growing(self) -> OpenDocument | None:
        growing = next((document for document in self._planned.values() if document.state == "open"), None)
        stored = self._writer.open_document()
        if growing is not None or stored is None or stored.key in self._planned:
            return growing
        return self._writer.document(stored.key)

    def _document(self, key: str) -> OpenDocument | None:
        planned = self._planned.get(key)
        return planned.copy() if planned is not None else self._writer.document(key)

    def _due(self) -> int:
        """How many pending blocks are to be stored now: up to the next segment boundary, or full segments."""
        size = self._writer.sealer.segment_nodes
        room = size - self._written() % size
        if room < size:
            return room if self._num_pending >= room else 0
        num_full = self._num_pending // size
        if num_full < SEGMENTS_AT_ONCE and time.monotonic() < self._stored_at + self._gather_s:
            return 0
        return min(num_full, SEGMENTS_AT_ONCE) * size

    def _store(self, num_blocks: int, request_id: str) -> int:
        """Write the first pending blocks: as one segment when they fill one or more, through the journal otherwise.

        Returns:
            How many blocks were committed: these, or with a hand to write them those that it wrote before.
        """
        new_blocks = self._landed(wait=True)
        size = self._writer.sealer.segment_nodes
        first = self._written()
        fills = num_blocks % size == 0 and first % size == 0
        spans, rest = _split(self._pending, num_blocks)
        if fills and self._hand is not None:
            self._flight = _Flight(first, num_blocks, self._hand.submit(self._writer.append_segment, spans, request_id))
        else:
            try:
                store = self._writer.append_segment if fills else self._writer.append
                new_blocks += store(spans, request_id).new_blocks
            except BaseException:
                self._forget()
                raise
        self._stored_at = time.monotonic()
        self._pending, self._num_pending = rest, self._num_pending - num_blocks
        if self._flight is None:
            self._keep_planned()
        return new_blocks

    def _landed(self, *, wait: bool) -> int:
        """How many blocks the writing thread has committed since the last call; those it is at are waited for or not.

        Raises:
            StorageError: it could not; everything pending is dropped.
        """
        flight = self._flight
        if flight is None or not (wait or flight.ack.done()):
            return 0
        try:
            ack = flight.ack.result()
        except BaseException:
            self._forget()
            raise
        self._flight = None
        self._keep_planned()
        return ack.new_blocks

    def _forget(self) -> None:
        self._pending, self._num_pending, self._planned, self._flight = [], 0, {}, None

    def _keep_planned(self) -> None:
        """Only documents of pending spans: the others are on disk."""
        keys = {span.document.key for span in self._pending}
        self._planned = {key: document for key, document in self._planned.items() if key in keys}

    def append_tail(self, document: DocumentMeta, token_offset: int, tokens: np.ndarray) -> Ack:
        """Flush, then as `ContextWriter.append_tail`."""
        self.flush()
        return self._writer.append_tail(document, token_offset, tokens)

    def close_document(self, key: str, *, complete: bool = False) -> Ack:
        """Flush, then as `ContextWriter.close_document`."""
        self.flush()
        return self._writer.close_document(key, complete=complete)

    def put_nodes(self, lod: int, first: int, arrays: Mapping[str, Values]) -> Ack:
        """As `ContextWriter.put_nodes`."""
        return self._writer.put_nodes(lod, first, arrays)

    def marks(self, keys: Sequence[str]) -> dict[str, DocumentMark]:
        """High-water marks on disk; pending spans are not counted, because they are not durable."""
        return self._writer.marks(keys)

    def open_document(self) -> DocumentMeta | None:
        """The document that is still growing on disk."""
        return self._writer.open_document()

    def reader(self) -> ContextReader:
        """A reader pinned to the newest committed version."""
        return self._writer.reader()

    def flush(self) -> Ack:
        """Commit what is pending, what fills no segment through the journal, and seal what is full."""
        self._stored_at = -self._gather_s
        new_blocks = 0
        while num_blocks := self._due() or self._num_pending:
            new_blocks += self._store(num_blocks, "flush")
            self._stored_at = -self._gather_s
        new_blocks += self._landed(wait=True)
        return Ack(self._writer.flush().version, new_blocks)

    def close(self) -> None:
        """Flush and close."""
        try:
            self.flush()
        finally:
            if self._hand is not None:
                self._hand.shutdown()
            self._writer.close()


def _split(spans: list[SpanWrite], num_blocks: int) -> tuple[list[SpanWrite], list[SpanWrite]]:
    """The first `num_blocks` blocks, and the rest."""
    head: list[SpanWrite] = []
    for position, span in enumerate(spans):
        if num_blocks < span.num_blocks:
            cut = [span.part(0, num_blocks)] if num_blocks else []
            return head + cut, [span.part(num_blocks, span.num_blocks), *spans[position + 1 :]]
        head.append(span)
        num_blocks -= span.num_blocks
    return head, []
