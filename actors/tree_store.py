"""The tree store: the actor that is the one writer of its context. Readers do not go through it."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from actors.rows import spans_from
from actors.store_metrics import StoreMetrics
from cluster.config import StoreConfig
from cluster.errors import StorageError, StoreRestartedError, WriterConflictError
from storage.codec import Values
from storage.contract import Ack, DocumentMark, DocumentMeta, SpanWrite, Version
from storage.schema import Encoding, TreeIdentity
from storage.store import Store
from storage.tree.bulk_writer import GATHER_S, BulkWriter
from storage.tree.rebuild import EncodingBuilder
from storage.tree.writer import ContextWriter

logger = logging.getLogger("megacontext.storage")

KEPT_LATENCIES = 10_000


@dataclass(frozen=True)
class TreeStoreSpec:
    """Which context a store actor writes, and what for."""

    store: StoreConfig
    identity: TreeIdentity
    encoding: Encoding | None
    """What `append` will bring; None for a rebuild, which brings its own."""
    bulk: bool = False
    """Write whole segments directly instead of through the journal."""
    owner: str = ""


@dataclass(frozen=True)
class StoreStatus:
    """What a store actor has done since it started."""

    epoch: int
    folder: Path
    num_commits: int
    commit_ms_p50: float
    commit_ms_p99: float
    """Of commits through the journal; 0 where blocks went straight into segments."""
    waiting_seal: str
    """Why sealing waits; empty when it does not."""
    version: Version
    """The newest committed one."""
    journal_bytes: int
    committed_at: float
    """When the newest version was made, in unix seconds."""


class TreeStore:
    """Plain class; `crew`, or a `StoreService`, hosts it in a Ray actor that takes one call at a time.

    The context is opened by the first call rather than by the constructor, so that a refusal reaches the caller as
    itself, and a restarted actor opens (and recovers) by itself.
    """

    def __init__(self, spec: TreeStoreSpec) -> None:
        self._spec = spec
        self._writer: ContextWriter | None = None
        self._bulk: BulkWriter | None = None
        self._builder: EncodingBuilder | None = None
        self._checked_open = False
        self._latencies_ms: deque[float] = deque(maxlen=KEPT_LATENCIES)
        self._metrics = StoreMetrics(spec.store.context)

    def _counted(self, ack: Ack, *, now: bool = False) -> Ack:
        """Let the metrics know of a commit."""
        self._metrics.committed(ack)
        self._metrics.publish(self._opened(), self._latencies_ms, now=now)
        return ack

    def _opened(self) -> ContextWriter:
        if self._writer is None:
            spec = self._spec
            store = Store(spec.store.root, create=True)
            self._writer = store.open_writer(
                spec.store.context,
                spec.identity,
                spec.encoding,
                create=spec.encoding is not None,
                branch=spec.store.version,
                segment_super_blocks=spec.store.segment_super_blocks,
                owner=spec.owner,
            )
            self._bulk = BulkWriter(self._writer, GATHER_S) if spec.bulk else None
        return self._writer

    def _opened_under(self, epoch: int) -> ContextWriter:
        writer = self._opened()
        if writer.epoch != epoch:
            raise StoreRestartedError(
                f"the store of context {writer.name!r} was lost and started anew (epoch {epoch}, now {writer.epoch})"
            )
        return writer

    def open(self) -> tuple[Version, int]:
        """Take the writer's place; the newest version, and the epoch to write under.

        Raises:
            WriterConflictError, IncompatibleTreeError, CorruptTreeError: see `Store.open_writer`.
        """
        writer = self._opened()
        return writer.version(), writer.epoch

    def append(self, epoch: int, *batches: Sequence[SpanWrite]) -> Ack:
        """Store batches of spans in one commit (`TreeWriter.append`).

        Raises:
            StoreRestartedError: this process is not the one that was opened under `epoch`; spans that one had
                accepted and not stored are gone.
        """
        writer = self._opened_under(epoch)
        started = time.perf_counter()
        spans = [span for batch in batches for span in batch]
        self._cut_abandoned(writer, spans)
        if self._bulk is not None:
            return self._counted(self._bulk.append(spans))
        ack = writer.append(spans)
        self._latencies_ms.append((time.perf_counter() - started) * 1e3)
        return self._counted(ack)

    def _cut_abandoned(self, writer: ContextWriter, spans: Sequence[SpanWrite]) -> None:
        """Before the first write: a document an earlier job left open, and that does not go on now, is ended."""
        if not spans or self._checked_open:
            return
        self._checked_open = True
        abandoned = writer.open_document()
        if abandoned is not None and spans[0].document.key != abandoned.key:
            logger.warning(
                "document %s was left open by an earlier job and does not go on now; it stays, cut", abandoned.uri
            )
            writer.close_document(abandoned.key)

    def append_table(self, epoch: int, table: pa.Table) -> Ack:
        """Store the data rows of a table (`rows.spans_from`), as `append`."""
        return self.append(epoch, list(spans_from(table, self._opened().encoding.arrays)))

    def append_tail(self, document: DocumentMeta, token_offset: int, tokens: np.ndarray) -> Ack:
        """As `TreeWriter.append_tail`."""
        writer = self._opened()
        return (self._bulk or writer).append_tail(document, token_offset, tokens)

    def marks(self, keys: Sequence[str], at_block: int | None = None) -> dict[str, DocumentMark]:
        """As `TreeWriter.marks`; with `at_block`, as they were when the timeline had so many blocks."""
        writer = self._opened()
        if at_block is None:
            return writer.marks(keys)
        found = ((key, document.mark_at(at_block)) for key in keys if (document := writer.document(key)) is not None)
        return {key: mark for key, mark in found if mark is not None}

    def open_document(self) -> DocumentMeta | None:
        """As `TreeWriter.open_document`."""
        return self._opened().open_document()

    def close_document(self, key: str) -> Ack:
        """As `TreeWriter.close_document`."""
        writer = self._opened()
        return (self._bulk or writer).close_document(key)

    def put_nodes(self, lod: int, first: int, arrays: Mapping[str, Values]) -> Ack:
        """As `TreeWriter.put_nodes`; during a rebuild the nodes belong to the encoding under construction."""
        writer = self._opened()
        return self._counted((self._builder or writer).put_nodes(lod, first, arrays))

    def put_spans(self, first_block: int, spans: Sequence[SpanWrite]) -> Ack:
        """Store the gists of consecutive stored blocks under the encoding that is being rebuilt."""
        arrays = {name: np.concatenate([np.asarray(span.arrays[name]) for span in spans]) for name in spans[0].arrays}
        return self.put_nodes(1, first_block, arrays)

    def begin_rebuild(self, encoding: Encoding) -> tuple[int, tuple[int, ...]]:
        """Start or go on with another encoding: its id, and the nodes of LOD1, LOD2, … it has already."""
        self._builder = EncodingBuilder(self._opened(), encoding)
        counts = self._builder.level_counts()
        return self._builder.encoding_id, counts

    def activate_rebuild(self) -> Ack:
        """Make the rebuilt encoding the branch's own (`EncodingBuilder.activate`)."""
        if self._builder is None:
            raise StorageError("activate_rebuild without begin_rebuild (the store was restarted): run the job again")
        return self._builder.activate()

    def flush(self, epoch: int) -> Ack:
        """Make everything accepted durable, and seal what is full.

        Raises:
            StoreRestartedError: as `append`; what was accepted under `epoch` may be gone.
        """
        writer = self._opened_under(epoch)
        return self._counted((self._bulk or writer).flush(), now=True)

    def lent(self, branch: str) -> ContextWriter:
        """The writer, for a piece of work of somebody else between this job's calls.

        Raises:
            WriterConflictError: the job writes another branch, or makes gists anew, which needs all tokens.
        """
        writer = self._opened()
        written = writer.version().branch
        if written != branch or self._builder is not None:
            doing = f"writes branch {written!r}" if written != branch else "rebuilds gists"
            raise WriterConflictError(
                f"{self._spec.owner or 'another job'} {doing} of context {writer.name!r} through the store's service; "
                f"branch {branch!r} can be curated when it has ended"
            )
        return writer

    def process_id(self) -> int:
        """Of the process that holds the context."""
        return os.getpid()

    def status(self) -> StoreStatus:
        """Latencies and sealing."""
        writer = self._opened()
        latencies = np.array(self._latencies_ms or [0.0])
        with writer.reading() as db:
            version = writer.version()
            journal_bytes = db.execute("SELECT coalesce(sum(length(payload)), 0) FROM journal").fetchone()[0]
            committed_at = db.execute("SELECT created_at FROM commits WHERE seq = ?", (version.seq,)).fetchone()[0]
        return StoreStatus(
            writer.epoch,
            writer.folder,
            len(self._latencies_ms),
            float(np.percentile(latencies, 50)),
            float(np.percentile(latencies, 99)),
            str(writer.sealer.error or ""),
            version,
            journal_bytes,
            committed_at,
        )

    def close(self) -> None:
        """Flush and give up the writer's place."""
        writer, self._writer = self._writer, None
        if writer is not None:
            (self._bulk or writer).close()
