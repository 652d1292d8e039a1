"""store start, status, stop, and jobs that write through the service, on a real cluster."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pipelines.compact as compact_job
import pipelines.store as store_job
import pipelines.tree_rebuild as rebuild_job
from actors.crew import Crew
from actors.service_client import ServedContext, find_service, stop_service
from cluster.config import CompactJob, GistNetConfig, RayConfig, StoreConfig, TreeRebuildGistsJob
from cluster.errors import ConfigError
from cluster.service_config import StoreStartJob, StoreStatusJob, StoreStopJob
from storage.store import Store
from storage.tree.verify import verify_context
from tests.actors.helpers import assert_same_tree, make_text
from tests.pipelines.conftest import JobFactory


@pytest.fixture
def store(tmp_path: Path) -> StoreConfig:
    """The store that `make_job` writes to."""
    return StoreConfig(root=tmp_path / "store")


@pytest.fixture
def service(ray_cluster: object, store: StoreConfig) -> Iterator[None]:
    store_job.start(StoreStartJob(store=store))
    yield
    stop_service(store.root, 30)


def through(job: CompactJob, use: str = "require") -> CompactJob:
    return dataclasses.replace(job, store=dataclasses.replace(job.store, service=use))


def report_of(job: CompactJob) -> dict[str, Any]:
    return json.loads((job.run.dir / job.run.name / "report.json").read_text())


def shown(run: Callable[[Any], None], job: Any, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    run(job)
    return json.loads(capsys.readouterr().out)


def assert_equal_trees(root: Path, one: str, other: str) -> None:
    with Store(root).open_reader(one) as left, Store(root).open_reader(other) as right:
        assert_same_tree(left, right)
    assert verify_context(Store(root).folder(other), other).problems == []


def test_start_status_and_stop(
    ray_cluster: object, store: StoreConfig, make_job: JobFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(store_job.status, StoreStatusJob(store=store, json=True), capsys)["running"] is False
    started = shown(store_job.start, StoreStartJob(store=store, actors=3, json=True), capsys)
    assert started["running"] is True
    pids = {actor["pid"] for actor in started["actors"]}
    assert len(pids) == 3
    assert {actor["root"] for actor in started["actors"]} == {os.path.realpath(store.root)}

    compact_job.run(through(make_job("run", "notes")))
    status = shown(store_job.status, StoreStatusJob(store=store, json=True), capsys)
    assert {actor["pid"] for actor in status["actors"]} == pids
    assert status["placement"].keys() == {"notes"}
    assert all(actor["contexts"] == [] for actor in status["actors"])
    store_job.status(StoreStatusJob(store=store))
    table = capsys.readouterr().out
    assert "0 of 3" in table
    assert "serves" in table
    assert "Contexts that are open for jobs: none" in table

    stopped = shown(store_job.stop, StoreStopJob(store=store, json=True), capsys)["stopped"]
    assert len(stopped) == 3
    assert find_service(store.root) is None
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("feed", [pytest.param("actors", marks=pytest.mark.slow), "ray_data"])
def test_a_tree_written_through_the_service_is_the_same(
    service: None,
    store: StoreConfig,
    make_job: JobFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    feed: str,
) -> None:
    compact_job.run(through(make_job("direct", "direct"), "off"))
    seen: list[dict[str, Any]] = []
    original = Crew.finish_levels

    def look(crew: Crew) -> None:
        assert isinstance(crew.store, ServedContext)
        seen.append(shown(store_job.status, StoreStatusJob(store=store, json=True), capsys))
        original(crew)

    monkeypatch.setattr(Crew, "finish_levels", look)
    job = through(make_job("served", "served", feed=feed, num_compactors=1))
    compact_job.run(job)
    assert_equal_trees(store.root, "direct", "served")
    (held,) = [row for actor in seen[0]["actors"] for row in actor["contexts"]]
    assert held["context"] == "served"
    assert held["held_by"] == "run 'served' of job compact"
    assert held["epoch"] == 1
    assert held["num_tokens"] == report_of(job)["tokens_total"]


@pytest.mark.parametrize("feed", ["actors", pytest.param("ray_data", marks=pytest.mark.slow)])
def test_a_killed_actor_is_survived(
    service: None,
    store: StoreConfig,
    make_job: JobFactory,
    corpus_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    feed: str,
) -> None:
    for index in range(4):
        (corpus_folder / f"long{index}.txt").write_text(make_text(100 + index, 2500))
    compact_job.run(through(make_job("calm", "calm"), "off"))
    killed: list[int] = []

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        def feed_and_kill(crew: Crew, *arguments: Any) -> None:
            if not killed:
                killed.append(crew.call(crew.store.process_id.remote(), "its process id"))
                threading.Timer(1.5 if feed == "actors" else 6.0, os.kill, (killed[0], signal.SIGKILL)).start()
            original(crew, *arguments)

        return feed_and_kill

    for name in ("run_actor_feed", "run_ray_data_feed"):
        monkeypatch.setattr(compact_job, name, wrap(getattr(compact_job, name)))
    job = through(make_job("killed", "killed", feed=feed, num_compactors=1))
    compact_job.run(job)
    assert report_of(job)["restarts"] == 1
    assert_equal_trees(store.root, "calm", "killed")
    with pytest.raises(ProcessLookupError):
        os.kill(killed[0], 0)
    # It is the service that came back: nobody wrote around it.
    found = find_service(store.root)
    assert found is not None
    assert sorted(found.describe(index)["num_restarts"] for index in (0, 1)) == [0, 1]


@pytest.mark.slow
def test_a_job_outlives_a_service_that_is_stopped(
    service: None, store: StoreConfig, make_job: JobFactory, corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(4):
        (corpus_folder / f"long{index}.txt").write_text(make_text(100 + index, 2500))
    compact_job.run(through(make_job("calm", "calm"), "off"))
    stopping: list[threading.Thread] = []
    original = compact_job.run_actor_feed

    def feed(crew: Crew, *arguments: Any) -> None:
        if not stopping:
            stopping.append(threading.Timer(1.5, stop_service, (store.root, 30.0)))
            stopping[0].start()
        original(crew, *arguments)

    monkeypatch.setattr(compact_job, "run_actor_feed", feed)
    job = through(make_job("left", "left"), "auto")
    compact_job.run(job)
    stopping[0].join()
    assert find_service(store.root) is None
    assert report_of(job)["restarts"] == 1
    assert_equal_trees(store.root, "calm", "left")


def test_gists_are_rebuilt_through_the_service(service: None, make_job: JobFactory) -> None:
    job = through(make_job("first", "c"))
    compact_job.run(job)
    rebuild_job.run(
        TreeRebuildGistsJob(
            run=dataclasses.replace(job.run, name="again"),
            base_lm=job.base_lm,
            gistnet=GistNetConfig(kind="last_token"),
            store=job.store,
            compaction=job.compaction,
        )
    )
    assert Store(job.store.root).identity("c")[1].gistnet_id == "last_token-m1"
    assert verify_context(Store(job.store.root).folder("c"), "c").problems == []


def test_a_service_is_not_started_on_a_cluster_that_ends_with_the_job(
    store: StoreConfig, make_job: JobFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a process of its own, which has not joined the test session's cluster.
    monkeypatch.setattr("cluster.ray_runtime.ray.is_initialized", lambda: False)
    local = RayConfig(address="local")
    for run, job in (
        (store_job.start, StoreStartJob(local, store)),
        (store_job.status, StoreStatusJob(local, store)),
        (store_job.stop, StoreStopJob(local, store)),
        (compact_job.run, through(dataclasses.replace(make_job(), ray=local))),
    ):
        with pytest.raises(ConfigError, match="ray start --head --node-ip-address 127.0.0.1"):
            run(job)  # type: ignore[operator]
    assert not store.root.exists()
