"""The tree store's numbers among Ray's metrics: what a dashboard shows and an alert watches."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Sequence

import numpy as np

from cluster import metric_names as names
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.metrics import MetricPublisher
from storage.contract import Ack
from storage.tree import catalogue
from storage.tree.writer import ContextWriter

PUBLISH_S = 5.0
"""Between two looks at the catalogue, which cost it a millisecond each."""


class StoreMetrics:
    """Publishes for one writer, tagged `job="store"`, `run=<context>`. Not thread-safe."""

    def __init__(self, context: str) -> None:
        self._publisher = MetricPublisher("store", context)
        self._next = 0.0
        self._commits = self._blocks = self._nodes = 0

    def committed(self, ack: Ack) -> None:
        """Count a commit."""
        self._commits += ack.new_blocks + ack.new_nodes > 0
        self._blocks += ack.new_blocks
        self._nodes += ack.new_nodes

    def publish(self, writer: ContextWriter, latencies_ms: Sequence[float], *, now: bool = False) -> None:
        """Publish when it is time again; with `now` in any case."""
        if not now and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PUBLISH_S
        self._publisher.set(store_numbers(writer, latencies_ms))
        self._publisher.add(
            {
                names.STORE_COMMITS_TOTAL: self._commits,
                names.STORE_BLOCKS_TOTAL: self._blocks,
                names.STORE_NODES_TOTAL: self._nodes,
            }
        )
        self._commits = self._blocks = self._nodes = 0


def store_numbers(writer: ContextWriter, latencies_ms: Sequence[float]) -> dict[str, float]:
    """A writer's present state by metric name; sizes in bytes, times in ms."""
    with writer.reading() as db:
        rows, journal = db.execute("SELECT count(*), coalesce(sum(length(payload)), 0) FROM journal").fetchone()
        segments, sealed = db.execute("SELECT count(*), coalesce(sum(stored_bytes), 0) FROM segments").fetchone()
        retired = db.execute("SELECT count(*) FROM branches WHERE state != 'live'").fetchone()[0]
        version = writer.version()
    log = writer.folder / f"{catalogue.CATALOGUE_FILE}-wal"
    latencies = np.array(latencies_ms or [0.0])
    # Levels above the blocks come behind the commits: how many nodes wait to be made.
    counts = (*version.level_counts, 0)
    behind = sum(max(0, below // K - above) for below, above in itertools.pairwise(counts))
    return {
        names.CONTEXT_TOKENS: version.num_tokens,
        names.STORE_JOURNAL_ROWS: rows,
        names.STORE_JOURNAL_BYTES: journal,
        names.STORE_LOG_BYTES: log.stat().st_size if log.exists() else 0,
        names.STORE_SEGMENTS: segments,
        names.STORE_SEALED_BYTES: sealed,
        names.STORE_RETIRED_BRANCHES: retired,
        names.STORE_NODES_BEHIND: behind,
        names.STORE_SEALING_WAITS: writer.sealer.error is not None,
        names.STORE_EPOCH: writer.epoch,
        names.STORE_FREE_BYTES: shutil.disk_usage(writer.folder).free,
        names.COMMIT_MS_P50: float(np.percentile(latencies, 50)),
        names.COMMIT_MS_P99: float(np.percentile(latencies, 99)),
    }
