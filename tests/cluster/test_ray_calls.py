from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError

from cluster.errors import ModelError, ResourceError, ResourceTimeoutError, StorageError, is_recoverable
from cluster.ray_calls import check_resources, get_or_raise, own_error, wait_for_actors
from cluster.ray_runtime import RaySession

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Worker:
    def __init__(self, refuse: str = "") -> None:
        if refuse == "ours":
            raise ModelError("no model at x:\nneither here\nnor there")
        if refuse:
            raise ZeroDivisionError(refuse)

    def fail(self) -> None:
        raise StorageError("the disk is full")

    def bug(self) -> None:
        raise ZeroDivisionError("a bug")

    def fail_through(self, other: Any) -> None:
        ray.get(other.fail.remote())

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds


RemoteWorker: Any = ray.remote(Worker)


@pytest.fixture
def worker() -> Iterator[Any]:
    actor = RemoteWorker.options(num_cpus=0).remote()
    yield actor
    ray.kill(actor)


def test_values_come_through(worker: Any) -> None:
    assert get_or_raise(worker.sleep.remote(0.0), 30, "the worker") == 0.0
    assert get_or_raise([worker.sleep.remote(0.0)] * 2, 30, "the worker") == [0.0, 0.0]


def test_our_errors_arrive_as_they_were_raised(worker: Any) -> None:
    with pytest.raises(StorageError) as caught:
        get_or_raise(worker.fail.remote(), 30, "the worker")
    assert type(caught.value) is StorageError
    assert str(caught.value) == "the disk is full"
    assert isinstance(caught.value.__cause__, RayTaskError), "the worker's traceback is kept for --debug"
    assert not is_recoverable(caught.value)


def test_also_through_a_second_worker(worker: Any) -> None:
    other = RemoteWorker.options(num_cpus=0).remote()
    with pytest.raises(StorageError) as caught:
        get_or_raise(other.fail_through.remote(worker), 30, "the worker")
    assert str(caught.value) == "the disk is full"


def test_also_from_a_constructor() -> None:
    refusing = RemoteWorker.options(num_cpus=0).remote("ours")
    with pytest.raises(ModelError) as caught:
        get_or_raise(refusing.sleep.remote(0.0), 30, "the worker")
    assert str(caught.value) == "no model at x:\nneither here\nnor there"
    with pytest.raises(ModelError, match="neither here"):
        wait_for_actors([RemoteWorker.options(num_cpus=0).remote("ours")], {}, 30)


def test_other_errors_stay_what_they_are(worker: Any) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"):
        get_or_raise(worker.bug.remote(), 30, "the worker")
    with pytest.raises(ActorDiedError, match="a reason"):
        wait_for_actors([RemoteWorker.options(num_cpus=0).remote("a reason")], {}, 30)
    assert own_error(ZeroDivisionError("cluster.errors.ModelError: x")) is None


def test_a_late_answer_is_a_bounded_wait(worker: Any) -> None:
    started = time.monotonic()
    with pytest.raises(ResourceTimeoutError, match=r"the slow one did not answer within 0\.2 s\. Free now: CPU 4"):
        get_or_raise(worker.sleep.remote(2.0), 0.2, "the slow one")
    assert time.monotonic() - started < 2


def test_actors_that_do_not_fit_are_a_bounded_wait_that_says_what_there_is() -> None:
    actors = [RemoteWorker.options(num_cpus=2).remote() for _ in range(3)]
    try:
        with pytest.raises(ResourceTimeoutError) as caught:
            wait_for_actors(actors, {"CPU": 2}, 5.0, "compactors")
        message = str(caught.value)
        assert "only 2 of 3 compactors started within 5 s; each asks for CPU 2. Free now: " in message
        assert "The whole cluster: CPU 4" in message
        assert "Free now: CPU" not in message, "none is free"
        # Any two of them have the CPUs.
        calls = {actor.__ray_ready__.remote(): actor for actor in actors}
        placed, _ = ray.wait(list(calls), num_returns=2, timeout=30.0)
        wait_for_actors([calls[call] for call in placed], {"CPU": 2}, 5.0)
    finally:
        for actor in actors:
            ray.kill(actor)


def test_what_can_never_be_is_refused_before_asking(ray_cluster: RaySession) -> None:
    check_resources([{"CPU": 2}, {"CPU": 2}], "compaction")
    check_resources([], "nothing")
    with pytest.raises(
        ResourceError, match="compaction asks for CPU 5 on one node, and no node has that. Nodes: CPU 4"
    ):
        check_resources([{"CPU": 5}], "compaction")
    with pytest.raises(ResourceError, match="asks for CPU 1, GPU 1 on one node"):
        check_resources([{"CPU": 1, "GPU": 1}], "training")
    with pytest.raises(ResourceError, match=r"asks for CPU 6 at the same time \(3 actors\).*has CPU 4"):
        check_resources([{"CPU": 2}] * 3, "compaction")
