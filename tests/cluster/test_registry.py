"""Nets by name: what a run registers is found again, by version, newest and alias; what is not there is said."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cluster import registry
from cluster.config import BaseLMConfig, CompactJob, GistNetConfig, RunConfig, TrackingConfig
from cluster.errors import ConfigError, TrackingError
from cluster.gist_evaluation_config import EvaluateGistJob
from cluster.registry import local_net, with_local_nets
from cluster.tracking import MLflowTracker


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registered")


@pytest.fixture(scope="module")
def names(run_dir: Path) -> list[str]:
    """What three registrations were called; the second is of the first's net."""
    found = []
    for number, digest in enumerate(["a" * 64, "a" * 64, "b" * 64]):
        folder = run_dir / f"run-{number}" / "gistnet"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(digest)
        tracker = MLflowTracker(TrackingConfig(), run_dir, f"run-{number}", {}, {})
        found.append(tracker.register_model(folder, "net", digest))
        tracker.close("FINISHED")
    return found


@pytest.fixture
def uri(run_dir: Path) -> str:
    return f"sqlite:///{run_dir}/mlflow.db"


def test_equal_nets_are_one_version(names: list[str]) -> None:
    assert names == ["models:/net/1", "models:/net/1", "models:/net/2"]


def test_versions_aliases_and_the_newest_are_folders(names: list[str], uri: str, tmp_path: Path) -> None:
    MlflowClient(tracking_uri=uri, registry_uri=uri).set_registered_model_alias("net", "best", "1")
    for name, digest in ((names[0], "a"), (names[2], "b"), ("models:/net/latest", "b"), ("models:/net@best", "a")):
        assert (local_net(name, uri, tmp_path) / "config.json").read_text() == digest * 64


@pytest.mark.parametrize("name", ["models:/net/7", "models:/other/latest", "models:/other/1", "models:/net@worst"])
def test_what_is_not_there_is_refused_with_what_is(names: list[str], uri: str, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is not in the registry .*models:/net/1, models:/net/2"):
        local_net(name, uri, tmp_path)


@pytest.mark.parametrize("name", ["models:/net", "models:/net/new", "models:/"])
def test_what_is_no_name_is_refused(uri: str, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="models:/NAME/VERSION"):
        local_net(name, uri, tmp_path)


def test_every_net_of_a_job_becomes_a_folder(names: list[str], run_dir: Path, tmp_path: Path) -> None:
    run, lm = RunConfig(dir=run_dir), BaseLMConfig(cache_dir=tmp_path)
    compact = with_local_nets(CompactJob(run=run, base_lm=lm, gistnet=GistNetConfig(path="models:/net/2")))
    assert (Path(compact.gistnet.path) / "config.json").read_text() == "b" * 64
    job = EvaluateGistJob(run=run, base_lm=lm)
    job = replace(job, evaluation=replace(job.evaluation, gistnets=["mean", "models:/net/1"]))
    mean, registered = with_local_nets(job).evaluation.gistnets
    assert mean == "mean"
    assert (Path(registered) / "config.json").read_text() == "a" * 64


def test_a_job_without_registered_nets_is_left_alone(tmp_path: Path) -> None:
    job = CompactJob(run=RunConfig(dir=tmp_path / "nothing-here"))
    assert with_local_nets(job) is job
    assert not (tmp_path / "nothing-here").exists()


def test_a_registry_that_does_not_answer_is_said_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in registry._HTTP_LIMITS:
        monkeypatch.delenv(name, raising=False)
    started = time.monotonic()
    job = CompactJob(
        run=RunConfig(dir=tmp_path),
        tracking=TrackingConfig(uri="http://127.0.0.1:9"),
        gistnet=GistNetConfig(path="models:/net/1"),
    )
    with pytest.raises(TrackingError, match="127.0.0.1:9"):
        with_local_nets(job)
    assert time.monotonic() - started < 60


def test_a_name_that_the_registry_refuses_costs_a_warning_and_nothing_else(
    run_dir: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = MLflowTracker(TrackingConfig(), run_dir, "refused", {}, {})
    assert tracker.register_model(run_dir / "run-0/gistnet", "a/b", "c" * 64) == ""
    tracker.log_metrics({"after": 1.0})
    tracker.close("FINISHED")
    assert "a/b could not be registered" in caplog.text
    run = MlflowClient(tracking_uri=uri).get_run(tracker.run_id)
    assert run.data.metrics == {"after": 1.0}
    assert run.info.status == "FINISHED"
