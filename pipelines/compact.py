"""compact: read a corpus into a context, tokens and gists of every level, on disk.

    corpus -> windows -> compactors -> tree store -> sealed segments
                                           ^  the follower adds LOD2 and above

Run it again after any interruption: it asks the tree what is there and does only what is missing. A document of which a
part is stored is finished first, whatever the corpus has before it by now.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import ray

from actors.crew import Crew, plan_workers
from actors.feeds import PACKER_CPUS, run_actor_feed, run_ray_data_feed
from actors.follower import FollowerSpec
from actors.lexical_indexer import LexicalIndexerSpec, has_index
from actors.packing import PackedItem, Skipped
from actors.plan import CompactionPlan, Feed, check_encoding, check_space, choose_feed, estimate_tokens, plan_models
from actors.service_client import check_service_use
from actors.tree_store import StoreStatus, TreeStoreSpec
from cluster import metric_names as names
from cluster.config import CompactJob
from cluster.errors import WriterConflictError, is_recoverable
from cluster.metrics import MetricPublisher
from cluster.ray_runtime import ray_session
from cluster.run import JobRun
from cluster.tables import Table
from pipelines.tree_report import TreeSize, level_rows, measure_tree, plot_growth
from storage.contract import Ack, Version
from storage.corpus import CorpusSource, QuarantinedItem, QuarantineTable, open_corpus, read_corpus
from storage.corpus.resume import interrupted_first
from storage.store import Store

logger = logging.getLogger("megacontext.compaction")

MAX_RESTARTS = 5
"""Times the crew is started anew after a process or node was lost, before the job gives up."""

RETAKE_WAIT_S = 30.0
"""Longest wait for a lost store's process to let go of the context, in seconds."""


@dataclass
class CompactionResult:
    """What a compaction did."""

    feed: Feed
    version: Version | None = None
    new_blocks: int = 0
    new_tokens: int = 0
    skipped_documents: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    wall_s: float = 0.0
    start_s: float = 0.0
    """Until the compactors were ready."""
    growth: list[tuple[float, int, tuple[int, ...]]] = field(default_factory=list)
    """(seconds, tokens, nodes by level) after each commit."""
    status: StoreStatus | None = None
    num_restarts: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second from ready compactors to the last commit."""
        return self.new_tokens / max(self.wall_s - self.start_s, 1e-9)


def run(job: CompactJob) -> None:
    """Compact a corpus into a context and leave a report."""
    source = open_corpus(job.corpus)
    with JobRun.start("compact", job) as job_run:
        plan = prepare(job, source)
        result = compact(job, plan, source, job_run)
        tree = measure_tree(job.store)
        picture = job_run.folder / "tree.png"
        # A run that adds nothing keeps the picture of the growth.
        if result.new_tokens or not picture.exists():
            plot_growth(result.growth, tree, picture)
        tables = compaction_tables(result, tree)
        for table in tables:
            table.show()
        job_run.finish(result_report(result, tree), tables)


def prepare(job: CompactJob, source: CorpusSource) -> CompactionPlan:
    """Everything that can be refused, before anything is started."""
    check_service_use(job.store, job.ray)
    plan = plan_models(job.base_lm, job.gistnet, job.store)
    check_encoding(plan, job.store)
    need = check_space(job.store, plan, estimate_tokens(source))
    logger.info("%s; disk need at most %.2f GiB", source.describe(), need / 2**30)
    return plan


def compact(job: CompactJob, plan: CompactionPlan, source: CorpusSource, job_run: JobRun) -> CompactionResult:
    """Bring a corpus into the context; returns when every level is complete and durable.

    Raises:
        MegaContextError: what cannot be helped by trying again; what was acknowledged is safe.
    """
    estimate = estimate_tokens(source)
    result = CompactionResult(choose_feed(job.compaction, estimate))
    job_run.log_digests({**plan.digests(), "corpus": source.digest()})
    started = time.perf_counter()
    with (
        ray_session(job.ray),
        QuarantineTable(job_run.folder / "quarantine.parquet") as quarantine,
        job_run.progress(estimate, "tokens", "compacting") as progress,
    ):
        published = MetricPublisher(job_run.job_name, job_run.name)

        def on_other(item: PackedItem) -> None:
            if isinstance(item, QuarantinedItem):
                quarantine.add(item)
            elif isinstance(item, Skipped):
                result.skipped_documents += 1
                progress.advance(item.num_tokens)

        def on_ack(ack: Ack) -> None:
            before = result.version.num_tokens if result.version else 0
            result.version = ack.version
            result.new_blocks += ack.new_blocks
            result.new_tokens += ack.version.num_tokens - before
            progress.advance(ack.version.num_tokens - before)
            job_run.log_metrics({names.TOKENS_TOTAL: ack.version.num_tokens}, step=ack.version.seq)
            published.set({names.TOKENS_TOTAL: ack.version.num_tokens, names.BLOCKS_TOTAL: ack.version.num_blocks})
            result.growth.append((time.perf_counter() - started, ack.version.num_tokens, ack.version.level_counts))

        while True:
            result.skipped_documents = 0
            try:
                _run_crew(job, job_run, plan, source, result, started, on_ack, on_other)
                break
            except Exception as error:
                if result.num_restarts >= MAX_RESTARTS or not is_recoverable(error):
                    raise
                result.num_restarts += 1
                logger.warning("lost a process (%s); going on from what is stored", error)
        result.quarantined = quarantine.counts()
    result.wall_s = time.perf_counter() - started
    return result


def _run_crew(
    job: CompactJob,
    job_run: JobRun,
    plan: CompactionPlan,
    source: CorpusSource,
    result: CompactionResult,
    started: float,
    on_ack: Callable[[Ack], None],
    on_other: Callable[[PackedItem], None],
) -> None:
    bulk = result.feed == "ray_data"
    spec = TreeStoreSpec(
        job.store, plan.identity, plan.encoding, bulk=bulk, owner=f"run {job_run.name!r} of job {job_run.job_name}"
    )
    with _take_crew(spec, job, waiting=result.num_restarts > 0) as crew:
        result.version = crew.version
        cpus = ray.cluster_resources().get("CPU", 1.0)
        workers = plan_workers(job.compaction, cpus, reserved_cpus=PACKER_CPUS if bulk else 0.0)
        left = crew.call(crew.store.open_document.remote(), "asking what was interrupted")
        if left is not None:
            source = interrupted_first(source, left)
        folder = Store(job.store.root).folder(job.store.context)
        crew.bring_gistnet(plan.gistnet)
        crew.hire_follower(
            FollowerSpec(folder, job.store.context, job.compaction.follower_threads, branch=job.store.version)
        )
        if job.compaction.lexical and has_index(job.store):
            crew.hire_indexer(LexicalIndexerSpec(job.store, plan.base_lm))

        def acknowledged(ack: Ack) -> None:
            on_ack(ack)
            crew.follow(ack.version)

        compactor = plan.compactor_spec(workers.threads, job.compaction.window_batch)
        if bulk:
            result.start_s = time.perf_counter() - started
            run_ray_data_feed(crew, source, compactor, workers, job.compaction, acknowledged, on_other)
        else:
            crew.hire_compactors(compactor, workers)
            result.start_s = time.perf_counter() - started
            run_actor_feed(crew, read_corpus(source), plan.tokenizer, job.compaction, acknowledged, on_other)
        on_ack(crew.call(crew.store.flush.remote(crew.epoch), "making the last blocks durable"))
        crew.finish_levels()
        # Upper levels may have filled a segment since.
        on_ack(crew.call(crew.store.flush.remote(crew.epoch), "sealing"))
        result.status = crew.call(crew.store.status.remote(), "asking the store")


def _take_crew(spec: TreeStoreSpec, job: CompactJob, *, waiting: bool) -> Crew:
    """A crew; after a loss, wait for the dead store's process to let go of the context, or for its service."""
    deadline = time.monotonic() + (RETAKE_WAIT_S if waiting else 0.0)
    while True:
        try:
            return Crew(spec, job.ray)
        except Exception as error:
            if time.monotonic() >= deadline or not (isinstance(error, WriterConflictError) or is_recoverable(error)):
                raise
            time.sleep(0.5)


# -- report ------------------------------------------------------------------------------------------------------


def result_report(result: CompactionResult, tree: TreeSize) -> dict[str, object]:
    """The machine-readable part of the report."""
    status = result.status
    return {
        names.TOKENS_TOTAL: tree.version.num_tokens,
        names.BLOCKS_TOTAL: tree.version.num_blocks,
        names.DOCUMENTS_TOTAL: tree.num_documents,
        names.DOCUMENTS_SKIPPED_TOTAL: result.skipped_documents,
        names.QUARANTINED_TOTAL: sum(result.quarantined.values()),
        names.NODES_BY_LOD: {str(lod): tree.version.num_nodes(lod) for lod in range(tree.version.max_lod + 1)},
        names.BYTES_STORED: tree.stored_bytes,
        names.TOKENS_PER_S: result.tokens_per_s,
        names.WALL_SECONDS: result.wall_s,
        names.COMMIT_MS_P50: status.commit_ms_p50 if status else None,
        names.COMMIT_MS_P99: status.commit_ms_p99 if status else None,
        "new_tokens": result.new_tokens,
        "payload_bytes": tree.payload_bytes,
        "quarantined_by_reason": result.quarantined,
        "feed": result.feed,
        "start_seconds": result.start_s,
        "restarts": result.num_restarts,
        "version": tree.version.seq,
        "gistnet": tree.version.encoding.gistnet_id,
        "compute_dtype": tree.version.encoding.compute_dtype,
    }


def compaction_tables(result: CompactionResult, tree: TreeSize) -> list[Table]:
    """The report's tables."""
    quarantine = ", ".join(f"{count} {reason}" for reason, count in result.quarantined.items()) or "none"
    run_rows: list[dict[str, object]] = [
        {"what": "new tokens", "value": f"{result.new_tokens:,}"},
        {"what": "documents in the context", "value": f"{tree.num_documents:,}"},
        {"what": "documents that were there already", "value": f"{result.skipped_documents:,}"},
        {"what": "quarantined", "value": quarantine},
        {"what": "feed", "value": result.feed},
        {"what": "tokens a second", "value": f"{result.tokens_per_s:,.0f}"},
        {"what": "time to ready workers", "value": f"{result.start_s:.1f} s"},
        {"what": "wall time", "value": f"{result.wall_s:.1f} s"},
    ]
    if result.status is not None:
        status = result.status
        if status.num_commits:
            run_rows.append(
                {
                    "what": "commit latency",
                    "value": f"p50 {status.commit_ms_p50:.1f} ms, p99 {status.commit_ms_p99:.1f} ms",
                }
            )
        if status.waiting_seal:
            run_rows.append({"what": "sealing waits", "value": status.waiting_seal})
    return [Table(run_rows, "This run"), Table(level_rows(tree), "The tree")]
