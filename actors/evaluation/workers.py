"""Processes that measure places, each with one model of its own: what every evaluation shares.

An evaluation brings a specification that builds its evaluator in the worker. Places come in groups that one worker
measures one after the other, because they share something it reads once.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import ray
import torch

from cluster.config import RayConfig
from cluster.errors import ResourceTimeoutError
from cluster.heap import keep_freed_memory
from cluster.ray_calls import CALL_TIMEOUT_S, check_resources, get_or_raise, wait_for_actors
from cluster.ray_runtime import ray_session
from models.gistnet import GistNet

GROUPS_IN_FLIGHT = 2
"""Groups that wait at a worker, so that it never does."""

PlaceT = TypeVar("PlaceT")


class Evaluator(Protocol):
    """Measures one place after another."""

    def evaluate(self, place: Any) -> Sequence[Any]:
        """Every condition at one place."""
        ...


class EvaluatorSpec(Protocol):
    """Everything a worker needs to measure the same anywhere."""

    def build(self, gistnets: list[GistNet]) -> Evaluator:
        """The evaluator, with models loaded."""
        ...


class EvaluatorActor:
    """Hosts an evaluator; the nets come with every call, as for compactors, so that a restarted worker has them."""

    def __init__(self, spec: EvaluatorSpec, num_threads: int) -> None:
        self._spec = spec
        self._num_threads = num_threads
        self._evaluator: Evaluator | None = None

    def _load(self, gistnet_refs: list[Any]) -> Evaluator:
        if self._evaluator is None:
            torch.set_num_threads(self._num_threads)
            keep_freed_memory()
            self._evaluator = self._spec.build(ray.get(gistnet_refs))
        return self._evaluator

    def ready(self, gistnet_refs: list[Any]) -> int:
        """Answers with its process id once the models are loaded."""
        self._load(gistnet_refs)
        return os.getpid()

    def evaluate(self, place: Any, gistnet_refs: list[Any]) -> tuple[Any, list[Any]]:
        """The place, and what was measured there."""
        return place, list(self._load(gistnet_refs).evaluate(place))


def measure_groups(
    spec: EvaluatorSpec,
    gistnets: Sequence[GistNet],
    groups: Sequence[Sequence[PlaceT]],
    ray_config: RayConfig,
    *,
    num_workers: int,
    threads_per_worker: int,
    keep: Callable[[PlaceT, list[Any]], None],
) -> None:
    """Start workers and measure every place of every group; none starts where there is no group.

    Args:
        spec: builds the evaluator in each worker.
        gistnets: what `spec.build` is given.
        groups: places that go to one worker, in order.
        ray_config: the cluster.
        num_workers: 0: one a CPU. Never more than groups.
        threads_per_worker: torch threads of each.
        keep: called with every place and what was measured there, as it comes, in no fixed order.

    Raises:
        ResourceError: the cluster cannot hold the workers.
        MegaContextError: as raised in a worker.
    """
    if not groups:
        return
    with ray_session(ray_config) as session:
        cpus = session.resources["CPU"]
        count = min(num_workers or max(1, int(cpus)), len(groups))
        requested = {"CPU": min(float(threads_per_worker), cpus / count)}
        check_resources([requested] * count, "the evaluators")
        remote: Any = ray.remote(EvaluatorActor).options(
            num_cpus=requested["CPU"], max_restarts=-1, max_task_retries=-1
        )
        workers = [remote.remote(spec, threads_per_worker) for _ in range(count)]
        wait_for_actors(workers, requested, ray_config.resource_timeout_s, "evaluators")
        gistnet_refs = [ray.put(net) for net in gistnets]
        get_or_raise([worker.ready.remote(gistnet_refs) for worker in workers], CALL_TIMEOUT_S, "loading the models")
        for place, measured in _in_turns(workers, groups, gistnet_refs):
            keep(place, measured)


def _in_turns(
    workers: list[Any], groups: Sequence[Sequence[PlaceT]], gistnet_refs: list[Any]
) -> Iterator[tuple[PlaceT, list[Any]]]:
    """Each worker has a bounded number of groups, one after the other."""
    waiting = deque(groups)
    calls: dict[Any, tuple[Any, int]] = {}  # what is under way: its worker, and how many of its group come after it

    def hand_out(worker: Any) -> None:
        if waiting:
            group = waiting.popleft()
            for index, place in enumerate(group):
                calls[worker.evaluate.remote(place, gistnet_refs)] = (worker, len(group) - 1 - index)

    for _ in range(GROUPS_IN_FLIGHT):
        for worker in workers:
            hand_out(worker)
    while calls:
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=CALL_TIMEOUT_S)
        if not ready:
            raise ResourceTimeoutError(f"no evaluator answered within {CALL_TIMEOUT_S:.0f} s; see the run's job.log")
        worker, num_left = calls.pop(ready[0])
        yield get_or_raise(ready[0], CALL_TIMEOUT_S, "measuring a place")
        if num_left == 0:
            hand_out(worker)
