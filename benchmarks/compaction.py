"""Compaction three ways, over the same modules: a bare loop in one process, plain actors, Ray Data.

Each is a context manager that `process_tree.Child` runs in a process of its own. `ingest` brings files into the
context and returns once every level is complete and durable.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actors.compactor import Compactor
from actors.crew import Crew, plan_workers
from actors.feeds import PACKER_CPUS, run_actor_feed, run_ray_data_feed
from actors.follower import FollowerSpec, LevelFollower, next_missing
from actors.packing import PackedItem, Packer, batched_windows
from actors.plan import CompactionPlan, plan_models
from actors.tree_store import TreeStoreSpec
from benchmarks.corpus import open_files
from benchmarks.harness import BenchmarkError, Setting
from cluster.config import CompactionConfig, GistNetConfig, RayConfig, StoreConfig
from cluster.ray_runtime import ray_session
from storage.contract import Ack, TreeWriter, Version
from storage.corpus import QuarantinedItem, read_corpus
from storage.store import Store
from storage.tree.bulk_writer import BulkWriter

COMPUTE_THREADS = 1
"""torch threads of the compactor and of the follower, in every one of the three."""

NUM_CPUS = 2
"""CPUs of the feeds' Ray: one computes, one packs and stores."""

Feed = Literal["actors", "ray_data"]


@dataclass(frozen=True)
class Compaction:
    """What is to be compacted with what, decided once for all three."""

    plan: CompactionPlan
    store: StoreConfig
    compaction: CompactionConfig
    ray: RayConfig
    feed: Feed
    """Which feed this is, or is compared with: Ray Data writes whole segments, plain actors write the journal."""

    @property
    def folder(self) -> Path:
        """The context's folder."""
        return self.store.root / self.store.context

    @property
    def follower(self) -> FollowerSpec:
        """The follower of the context."""
        return FollowerSpec(self.folder, self.store.context, COMPUTE_THREADS)


def plan_compaction(setting: Setting, root: Path, gistnet: GistNetConfig, feed: Feed) -> Compaction:
    """Decide everything, the compute dtype included, for a new context below `root`."""
    store = StoreConfig(root=root, context="bench")
    return Compaction(
        plan_models(setting.base_lm, gistnet, store),
        store,
        CompactionConfig(feed=feed, threads_per_compactor=COMPUTE_THREADS),
        RayConfig(address="local", num_cpus=NUM_CPUS),
        feed,
    )


def _refuse(item: PackedItem) -> None:
    what = f"quarantined, {item.detail}" if isinstance(item, QuarantinedItem) else "skipped as stored already"
    raise BenchmarkError(f"a document of the corpus was {what}: the two sides would do different work")


class BareLoop:
    """The floor: read, pack, encode, store and follow, one after the other, without Ray."""

    def __init__(self, job: Compaction) -> None:
        self._job = job
        self._stack = ExitStack()

    def __enter__(self) -> BareLoop:
        job, plan = self._job, self._job.plan
        writer = Store(job.store.root, create=True).open_writer(
            job.store.context,
            plan.identity,
            plan.encoding,
            create=True,
            segment_super_blocks=job.store.segment_super_blocks,
        )
        self._writer: TreeWriter = BulkWriter(writer) if job.feed == "ray_data" else writer
        self._stack.callback(self._writer.close)
        self._compactor = Compactor(plan.compactor_spec(COMPUTE_THREADS, job.compaction.window_batch), plan.gistnet)
        self._follower = LevelFollower(job.follower, plan.gistnet, writer.put_nodes)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ingest(self, files: list[Path]) -> Version:
        """Compact files, documents in order."""
        items = read_corpus(open_files(files))
        packed = Packer(self._job.plan.tokenizer, self._writer.marks).pack(items)
        for windows in batched_windows(packed, self._job.compaction.windows_per_batch, _refuse):
            ack = self._writer.append(self._compactor.encode(windows))
            if next_missing(ack.version) is not None:
                self._follower.advance()
        self._writer.flush()
        self._follower.advance()
        return self._writer.flush().version


class ActorFeed:
    """`feeds.run_actor_feed` with a crew that stays: the steady state is what is measured."""

    def __init__(self, job: Compaction) -> None:
        self._job = job
        self._stack = ExitStack()

    def __enter__(self) -> ActorFeed:
        job = self._job
        try:
            session = self._stack.enter_context(ray_session(job.ray))
            self._crew = self._stack.enter_context(_crew(job, bulk=False))
            workers = plan_workers(job.compaction, session.resources["CPU"])
            spec = job.plan.compactor_spec(workers.threads, job.compaction.window_batch)
            self._crew.hire_compactors(spec, workers)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ingest(self, files: list[Path]) -> Version:
        """Compact files, documents in order."""
        job, crew = self._job, self._crew
        items = read_corpus(open_files(files))
        run_actor_feed(crew, items, job.plan.tokenizer, job.compaction, _following(crew), _refuse)
        return _finish(crew)


class RayDataFeed:
    """`feeds.run_ray_data_feed` on a running cluster; every ingest starts its own crew and stages, as a job does."""

    def __init__(self, job: Compaction) -> None:
        self._job = job
        self._stack = ExitStack()

    def __enter__(self) -> RayDataFeed:
        self._session = self._stack.enter_context(ray_session(self._job.ray))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ingest(self, files: list[Path]) -> Version:
        """Compact files, documents in order."""
        job = self._job
        workers = plan_workers(job.compaction, self._session.resources["CPU"], reserved_cpus=PACKER_CPUS)
        spec = job.plan.compactor_spec(workers.threads, job.compaction.window_batch)
        with _crew(job, bulk=True) as crew:
            run_ray_data_feed(crew, open_files(files), spec, workers, job.compaction, _following(crew), _refuse)
            return _finish(crew)


Host = type[ActorFeed] | type[RayDataFeed]

FEEDS: dict[Feed, Host] = {"actors": ActorFeed, "ray_data": RayDataFeed}


def _crew(job: Compaction, *, bulk: bool) -> Crew:
    crew = Crew(TreeStoreSpec(job.store, job.plan.identity, job.plan.encoding, bulk=bulk), job.ray)
    crew.bring_gistnet(job.plan.gistnet)
    crew.hire_follower(job.follower)
    return crew


def _following(crew: Crew) -> Callable[[Ack], None]:
    return lambda ack: crew.follow(ack.version)


def _finish(crew: Crew) -> Version:
    crew.call(crew.store.flush.remote(crew.epoch), "making the last blocks durable")
    crew.finish_levels()
    return crew.call(crew.store.flush.remote(crew.epoch), "sealing").version


def check_same_tree(found: Version, expected: Version) -> None:
    """Refuse a comparison whose sides did not make the same tree.

    Raises:
        BenchmarkError: with both sizes.
    """
    mine, theirs = (found.num_tokens, found.level_counts), (expected.num_tokens, expected.level_counts)
    if mine != theirs:
        raise BenchmarkError(f"the feed made {mine} (tokens, nodes by level), the bare loop {theirs}")
