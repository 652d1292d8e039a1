from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cluster.config import TrackingConfig
from cluster.errors import TrackingError
from cluster.registry import database_lock, mlflow_client
from cluster.tracking import MLflowTracker, NoTracker, open_tracker


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def test_disabled_is_no_tracker(run_dir: Path) -> None:
    assert isinstance(open_tracker(TrackingConfig(enabled=False), run_dir, "x", {}, {}), NoTracker)


def test_opening_is_quiet_and_takes_any_number_and_length_of_parameters(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = {f"key.{index}": index for index in range(250)} | {"long": "x" * 10_000, "paths": ["a", "b"]}
    tracker = open_tracker(TrackingConfig(experiment="own"), run_dir, "many", params, {"a": "b"})
    assert isinstance(tracker, MLflowTracker)
    tracker.log_metrics({"fine": 1.0, "nan": float("nan"), "inf": float("inf"), "share (0, 1)": 0.5})
    tracker.close("FINISHED")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    run = MlflowClient(tracking_uri=tracker.uri).get_run(tracker.run_id)
    assert len(run.data.params) == 252
    assert run.data.params["key.249"] == "249"
    assert run.data.params["paths"] == '["a", "b"]'
    assert len(run.data.params["long"]) == 6000
    assert run.data.metrics == {"fine": 1.0, "share _0_ 1_": 0.5}
    assert run.data.tags["a"] == "b"


def test_logging_does_not_wait_and_close_does(run_dir: Path) -> None:
    tracker = MLflowTracker(TrackingConfig(), run_dir, "speed", {}, {})
    write = tracker._client.log_batch

    def slow(*args: object, **kwargs: object) -> None:
        time.sleep(0.05)
        write(*args, **kwargs)  # type: ignore[arg-type]

    tracker._client.log_batch = slow  # type: ignore[method-assign]
    started = time.monotonic()
    for step in range(20):
        tracker.log_metrics({"x": float(step)}, step)
    assert time.monotonic() - started < 0.5, "20 writes take a second"
    tracker.close("FINISHED")
    history = MlflowClient(tracking_uri=tracker.uri).get_metric_history(tracker.run_id, "x")
    assert [point.value for point in history] == [float(step) for step in range(20)]


def test_a_server_lost_on_the_way_costs_one_warning(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = MLflowTracker(TrackingConfig(), run_dir, "lost", {}, {})
    calls = []

    def gone(*_: object, **__: object) -> None:
        calls.append(1)
        raise ConnectionError("connection refused")

    tracker._client.log_batch = gone  # type: ignore[method-assign]
    for step in range(10):
        tracker.log_metrics({"x": 1.0}, step)
    tracker.close("FINISHED")
    assert len(calls) == 1, "what waits behind a failure is given up"
    assert [record.message for record in caplog.records if "was lost" in record.message] == [
        f"MLflow at {tracker.uri} was lost, and with it the rest of this run there: connection refused"
    ]


def test_a_server_that_never_answers_is_given_up(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(TrackingError, match="cannot be used"):
            MLflowTracker(TrackingConfig(uri=uri), run_dir, "x", {}, {})
        assert time.monotonic() - started < 10


def test_an_impossible_uri_is_a_tracking_error(run_dir: Path) -> None:
    with pytest.raises(TrackingError, match="nonsense://x cannot be used"):
        MLflowTracker(TrackingConfig(uri="nonsense://x"), run_dir, "x", {}, {})


STARTED_TOGETHER = """
import sys, time
from pathlib import Path

import mlflow  # takes seconds, and not the same in every process
from cluster.config import TrackingConfig
from cluster.tracking import open_tracker

run_dir, name, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(run_dir / f"ready-{name}").touch()
while len(list(run_dir.glob("ready-*"))) < number:
    time.sleep(0.001)
open_tracker(TrackingConfig(experiment="together"), run_dir, name, {}, {}).close("FINISHED")
"""


def test_jobs_that_start_together_share_a_new_database(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTED_TOGETHER, str(tmp_path)]
    jobs = [
        subprocess.Popen([*command, name, "3"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name in "abc"
    ]
    said = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], said
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("together")
    assert experiment is not None
    assert {run.info.run_name for run in client.search_runs([experiment.experiment_id])} == {"a", "b", "c"}


def test_a_database_that_another_job_makes_for_ever_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.registry._LOCK_TIMEOUT_S", 0.05)
    with database_lock(f"sqlite:///{tmp_path}/mlflow.db"), pytest.raises(TrackingError, match="held by another job"):
        mlflow_client(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "sqlite://", "sqlite:///:memory:", "sqlite:///{}/none/x.db"])
def test_what_cannot_be_made_here_is_not_locked(tmp_path: Path, uri: str) -> None:
    with database_lock(uri.format(tmp_path)):
        assert list(tmp_path.iterdir()) == []
