"""Bulk ingest: blocks go straight into segments, without passing through the journal.

Spans are gathered in memory until they fill a segment; its catalogue commit acknowledges them. What a crash costs is
at most one segment's worth of unacknowledged work, which the job's next run does again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from storage.codec import Values
from storage.contract import Ack, DocumentMark, DocumentMeta, SpanWrite, Version
from storage.reader import ContextReader
from storage.writer import ContextWriter


class BulkWriter:
    """A `TreeWriter` that fills whole segments. Acknowledgements count what is pending; `flush` makes it durable."""

    def __init__(self, writer: ContextWriter) -> None:
        """Write through `writer`, which this object then owns."""
        self._writer = writer
        self._pending: list[SpanWrite] = []
        self._pending_blocks = 0

    def version(self) -> Version:
        """The newest committed version."""
        return self._writer.version()

    def _room(self) -> int:
        """Blocks up to the next segment boundary."""
        size = self._writer.sealer.segment_nodes
        return size - self._writer.version().num_blocks % size

    def append(self, spans: Sequence[SpanWrite], request_id: str = "") -> Ack:
        """Gather spans; store as many whole segments as they fill. A span that is stored already is skipped at once."""
        new_blocks = skipped = 0
        for span in spans:
            span.check()
            mark = self._writer.marks([span.document.key]).get(span.document.key)
            if mark is not None and span.first_block + span.num_blocks <= mark.num_blocks:
                skipped += span.num_blocks
                continue
            rest: SpanWrite | None = span
            while rest is not None:
                room = self._room() - self._pending_blocks
                head, rest = _split(rest, room)
                self._pending.append(head)
                self._pending_blocks += head.num_blocks
                if self._pending_blocks == self._room():
                    ack = self._store(request_id)
                    new_blocks += ack.new_blocks
                    skipped += ack.skipped_blocks
        return Ack(self.version(), new_blocks, skipped, pending_blocks=self._pending_blocks)

    def _store(self, request_id: str) -> Ack:
        """Commit what is pending: as a segment when it is exactly one, through the journal otherwise."""
        size = self._writer.sealer.segment_nodes
        direct = self._pending_blocks == size and self._writer.version().num_blocks % size == 0
        pending, self._pending, self._pending_blocks = self._pending, [], 0
        # When this fails the spans are dropped: they were never acknowledged, and the marks say where to go on.
        return self._writer.append(pending, request_id, direct=direct)

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
        """Commit what is pending through the journal, and seal what is full."""
        new_blocks = self._store("flush").new_blocks if self._pending else 0
        return Ack(self._writer.flush().version, new_blocks)

    def close(self) -> None:
        """Flush and close."""
        try:
            self.flush()
        finally:
            self._writer.close()


def _split(span: SpanWrite, room: int) -> tuple[SpanWrite, SpanWrite | None]:
    if span.num_blocks <= room:
        return span, None
    return span.part(0, room), span.part(room, span.num_blocks)
