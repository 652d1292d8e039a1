"""The actors of a compaction job: one tree store, its follower, its lexical indexer, and the compactors.

Where the store's service runs, the store is a context of it (`service_client`), which goes on when the crew goes.

What Ray does when a process dies: a compactor is restarted and its calls are made again (they are pure). The store
is restarted but its calls are not repeated blindly: the caller sees the failure, asks the marks, and goes on.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.compactor import CompactorActor, CompactorSpec
from actors.follower import FollowerActor, FollowerSpec, next_missing
from actors.lexical_indexer import LexicalIndexerActor, LexicalIndexerSpec
from actors.packing import Window
from actors.service_client import ServedContext, check_epoch, served_context
from actors.tree_store import TreeStore, TreeStoreSpec
from cluster.config import CompactionConfig, RayConfig
from cluster.errors import MegaContextError, WriterConflictError
from cluster.ray_calls import CALL_TIMEOUT_S, check_resources, get_or_raise, wait_for_actors
from models.gistnet import GistNet
from storage.contract import Version

logger = logging.getLogger("megacontext.compaction")

RELEASE_TIMEOUT_S = 60.0
"""Longest wait for a service to close the context of a crew that failed; later it closes it by itself."""


@dataclass(frozen=True)
class Workers:
    """How compactors share a cluster's CPUs and GPUs."""

    count: int
    threads: int
    num_cpus: float
    num_gpus: float


def plan_workers(config: CompactionConfig, cluster_cpus: float, *, reserved_cpus: float = 0.0) -> Workers:
    """Share CPUs out: threads of each compactor, and the CPUs it books with Ray.

    `reserved_cpus` are left unbooked for the tasks that feed the compactors.
    """
    share = max(cluster_cpus / config.num_compactors, 1.0)
    threads = config.threads_per_compactor or int(share)
    bookable = max((cluster_cpus - reserved_cpus) / config.num_compactors, 0.1)
    num_cpus = min(float(threads), int(bookable * 100) / 100)
    return Workers(config.num_compactors, threads, num_cpus, config.gpus_per_compactor)


def _is_idle(ref: Any) -> bool:
    """Whether an actor's last call is done, or there was none."""
    return ref is None or bool(ray.wait([ref], timeout=0)[0])


class Crew:
    """Handles of a job's actors. Use as a context manager: leaving closes the store and ends the actors."""

    def __init__(self, store_spec: TreeStoreSpec, ray_config: RayConfig) -> None:
        """Start the store on this machine, or attach to the store's service, and take the writer's place.

        Raises:
            StorageError: the store refused; nothing was changed.
            ServiceMismatchError: a service runs that is of another store, code or format.
            ResourceError: `store.service` is `require`, and none runs.
            ResourceTimeoutError: Ray gave no process in time.
        """
        self.version: Version
        self.epoch: int
        self._timeout_s = ray_config.resource_timeout_s
        self._here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        served = served_context(store_spec)
        if served is not None:
            logger.info("writing through the service of store %s", store_spec.store.root)
        self.store: Any = served or (
            ray.remote(TreeStore)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=0, scheduling_strategy=self._here)
            .remote(store_spec)
        )
        self.compactors: list[Any] = []
        self._gistnet_refs: list[Any] = []
        self._num_batches = 0
        self.follower: Any = None
        self._follow_ref: Any = None
        self.nodes_made = 0
        self.indexer: Any = None
        self._index_ref: Any = None
        try:
            self.version, self.epoch = self.call(self.store.open.remote(), "opening the context")
            if served is not None:
                check_epoch(store_spec, self.epoch)
        except BaseException:
            self._leave()
            raise

    def call(self, ref: Any, what: str) -> Any:
        """The result of one call, within `CALL_TIMEOUT_S`; errors of ours arrive as themselves."""
        return get_or_raise(ref, CALL_TIMEOUT_S, what)

    def bring_gistnet(self, gistnet: GistNet) -> None:
        """Put the net where every actor can fetch it."""
        self._gistnet_refs = [ray.put(gistnet)]

    def hire_compactors(self, spec: CompactorSpec, workers: Workers) -> None:
        """Start the compactors and wait until they have loaded their models.

        Raises:
            ResourceError: the cluster could never give what they ask for.
            ResourceTimeoutError: it did not in time.
        """
        requested = {"CPU": workers.num_cpus}
        if workers.num_gpus:
            requested["GPU"] = workers.num_gpus
        check_resources([requested] * workers.count, "the compactors")
        remote = ray.remote(CompactorActor).options(
            num_cpus=workers.num_cpus, num_gpus=workers.num_gpus, max_restarts=-1, max_task_retries=-1
        )
        self.compactors = [remote.remote(spec) for _ in range(workers.count)]
        wait_for_actors(self.compactors, requested, self._timeout_s, "compactors")
        self.call([c.ready.remote(self._gistnet_refs) for c in self.compactors], "loading the models")

    def hire_follower(self, spec: FollowerSpec) -> None:
        """Start the follower beside the store, whose files it reads."""
        self.follower = (
            ray.remote(FollowerActor)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=self._here)
            .remote(spec)
        )

    def hire_indexer(self, spec: LexicalIndexerSpec) -> None:
        """Start the lexical indexer beside the store, whose files it reads."""
        self.indexer = (
            ray.remote(LexicalIndexerActor)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=self._here)
            .remote(spec)
        )

    @property
    def gistnet_refs(self) -> list[Any]:
        """The net's reference, in the list that actors follow once."""
        return self._gistnet_refs

    def encode(self, windows: Sequence[Window]) -> Any:
        """Reference to the spans of a batch, made by the compactor whose turn it is."""
        compactor = self.compactors[self._num_batches % len(self.compactors)]
        self._num_batches += 1
        return compactor.encode.remote(windows, self._gistnet_refs)

    def follow(self, version: Version) -> None:
        """Let follower and indexer work when there is something for them and they are idle."""
        if self.indexer is not None and _is_idle(self._index_ref):
            self._collect_index()
            self._index_ref = self.indexer.advance.remote()
        if not _is_idle(self._follow_ref):
            return
        self._collect()
        if next_missing(version) is not None:
            self._follow_ref = self.follower.advance.remote(self._gistnet_refs, self.store)

    def finish_levels(self) -> None:
        """Wait until every node that can be made is made, and every block indexed that can be."""
        self._collect()
        self._follow_ref = self.follower.advance.remote(self._gistnet_refs, self.store)
        if self.indexer is not None:
            self._collect_index()
            self._index_ref = self.indexer.advance.remote()
        self._collect()
        self._collect_index()

    def _collect(self) -> None:
        ref, self._follow_ref = self._follow_ref, None
        if ref is not None:
            self.nodes_made += self.call(ref, "making the upper levels")

    def _collect_index(self) -> None:
        ref, self._index_ref = self._index_ref, None
        if ref is None:
            return
        try:
            self.call(ref, "indexing text")
        except WriterConflictError as error:
            # The index is derived: whoever builds it now, or the next job, brings it up to date.
            logger.warning("the text of new blocks is not indexed by this job: %s", error)
            ray.kill(self.indexer)
            self.indexer = None

    def close(self) -> None:
        """Flush and close the context, end the actors.

        Raises:
            StorageError: what flushing met; what was acknowledged is safe.
        """
        try:
            self.call(self.store.close.remote(), "closing the context")
        finally:
            self._kill()

    def _leave(self) -> None:
        """End what is ours. A service goes on, so it is asked to let go of the context, as far as it answers."""
        if isinstance(self.store, ServedContext):
            with contextlib.suppress(RayError, MegaContextError):
                get_or_raise(self.store.close.remote(), RELEASE_TIMEOUT_S, "letting go of the context")
        self._kill()

    def _kill(self) -> None:
        store = None if isinstance(self.store, ServedContext) else self.store
        for actor in (*self.compactors, self.follower, self.indexer, store):
            if actor is not None:
                ray.kill(actor)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            # The store may be what failed; its context is safe whatever happens to the process.
            self._leave()
