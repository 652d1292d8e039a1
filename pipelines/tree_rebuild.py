"""tree rebuild-gists: re-derives a context's levels with another net."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from typing import Any

import ray

from actors.crew import Crew, plan_workers
from actors.follower import FollowerSpec
from actors.packing import Window, windows_of
from actors.plan import check_space, plan_models
from actors.service_client import check_service_use
from actors.tree_store import TreeStoreSpec
from cluster import metric_names as names
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import TreeRebuildGistsJob
from cluster.ray_runtime import ray_session
from cluster.run import JobRun
from cluster.tables import Table
from pipelines.tree_report import encoding_rows, level_rows, measure_tree
from storage.contract import TreeReader
from storage.geometry import NO_TOKEN
from storage.store import Store

logger = logging.getLogger("megacontext.tree")


def run(job: TreeRebuildGistsJob) -> None:
    """Encode the stored tokens again with another GistNet, beside the old gists, and activate the result.

    Interrupted, it goes on where it stopped. Readers pinned before the activation keep the old gists.
    """
    check_service_use(job.store, job.ray)
    plan = plan_models(job.base_lm, job.gistnet, job.store)
    store = Store(job.store.root)
    folder = store.folder(job.store.context)
    with store.open_reader(job.store.context, job.store.version) as reader:
        num_tokens = reader.version.num_tokens
        reader.require_whole(0, reader.version.num_blocks, "making gists again")
    check_space(job.store, plan, num_tokens)
    with JobRun.start("tree rebuild-gists", job) as job_run:
        owner = f"run {job_run.name!r} of job {job_run.job_name}"
        spec = TreeStoreSpec(job.store, plan.identity, None, owner=owner)
        job_run.log_digests(plan.digests())
        with ray_session(job.ray), Crew(spec, job.ray) as crew:
            encoding_id, counts = crew.call(crew.store.begin_rebuild.remote(plan.encoding), "starting the rebuild")
            workers = plan_workers(job.compaction, ray.cluster_resources().get("CPU", 1.0))
            crew.bring_gistnet(plan.gistnet)
            crew.hire_follower(
                FollowerSpec(folder, job.store.context, job.compaction.follower_threads, encoding_id, job.store.version)
            )
            crew.hire_compactors(plan.compactor_spec(workers.threads, job.compaction.window_batch), workers)
            done = counts[0] if counts else 0
            with (
                store.open_reader(job.store.context, job.store.version) as reader,
                job_run.progress(reader.version.num_blocks, "blocks", "rebuilding") as progress,
            ):
                progress.advance(done)
                _encode_again(crew, reader, done, job, progress.advance)
            crew.finish_levels()
            version = crew.call(crew.store.activate_rebuild.remote(), "activating the new gists").version
        tree = measure_tree(job.store)
        tables = [
            Table(level_rows(tree), "The tree"),
            Table(encoding_rows(version.encoding), "What made the gists"),
        ]
        for table in tables:
            table.show()
        job_run.finish(
            {
                names.BLOCKS_TOTAL: version.num_blocks,
                names.NODES_BY_LOD: {str(lod): version.num_nodes(lod) for lod in range(version.max_lod + 1)},
                names.BYTES_STORED: tree.stored_bytes,
                "version": version.seq,
                "gistnet": version.encoding.gistnet_id,
            },
            tables,
        )


def _encode_again(crew: Crew, reader: TreeReader, done: int, job: TreeRebuildGistsJob, advance: Any) -> None:
    """Windows of the stored documents through the compactors, in timeline order."""
    limit = job.compaction.max_in_flight * len(crew.compactors)
    waiting: deque[tuple[Any, int]] = deque()

    def collect() -> None:
        ref, num_blocks = waiting.popleft()
        crew.call(ref, "storing rebuilt gists")
        advance(num_blocks)

    for first_block, windows in _stored_windows(reader, done, job.compaction.windows_per_batch):
        spans = crew.encode(windows)
        num_blocks = sum(-(-len(window.tokens) // K) for window in windows)
        waiting.append((crew.store.put_spans.remote(first_block, spans), num_blocks))
        while len(waiting) >= limit:
            collect()
    while waiting:
        collect()


def _stored_windows(reader: TreeReader, done: int, size: int) -> Iterator[tuple[int, list[Window]]]:
    """`(first block on the timeline, windows)` of everything from block `done` on, `size` windows at a time."""
    batch: list[Window] = []
    first_block = 0
    for document in reader.documents():
        if document.first_block + document.num_blocks <= done:
            continue
        tokens, _ = reader.tokens(document.first_block, document.num_blocks)
        flat = tokens.reshape(-1)
        stored = max(done - document.first_block, 0)
        for window in windows_of(document.meta, flat[flat != NO_TOKEN], stored):
            if not batch:
                first_block = document.first_block + window.first_block
            batch.append(window)
            if len(batch) == size:
                yield first_block, batch
                batch = []
    if batch:
        yield first_block, batch
