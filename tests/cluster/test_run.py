from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from cluster import metric_names as names
from cluster.config import CompactJob, CorpusConfig, RunConfig, TrackingConfig
from cluster.config_parser import parse_job
from cluster.errors import RunConflictError, StorageError, TrackingError
from cluster.run import JobRun, write_atomically
from cluster.tables import Table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tracked_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs with one MLflow database: making its tables takes seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def tracked(tracked_dir: Path, request: pytest.FixtureRequest) -> CompactJob:
    name = request.node.name.replace("[", "-").replace("]", "")[:60]
    return CompactJob(run=RunConfig(name, tracked_dir), corpus=CorpusConfig(paths=["a", "b"]))


@pytest.fixture
def untracked(tmp_path: Path) -> CompactJob:
    return CompactJob(
        run=RunConfig("small", tmp_path / "runs"),
        tracking=TrackingConfig(enabled=False),
        corpus=CorpusConfig(paths=["a"]),
    )


def mlflow_runs(job: CompactJob) -> list[Run]:
    """MLflow runs of the job's name, oldest first."""
    client = MlflowClient(tracking_uri=f"sqlite:///{job.run.dir}/mlflow.db")
    experiment = client.get_experiment_by_name("megacontext")
    assert experiment is not None
    wanted = f"tags.`megacontext.run` = '{job.run.name}'"
    return client.search_runs([experiment.experiment_id], wanted, order_by=["attributes.start_time ASC"])


def run_and_raise(job: CompactJob, error: BaseException) -> None:
    with JobRun.start("compact", job) as run:
        (run.folder / "state").write_text("kept")
        run.log_metrics({names.TOKENS_TOTAL: 7.0})
        raise error


def report_of(job: CompactJob) -> dict[str, object]:
    return json.loads((job.run.dir / job.run.name / "report.json").read_text())


def test_a_finished_run_leaves_folder_and_mlflow_alike(tracked: CompactJob) -> None:
    with JobRun.start("compact", tracked) as run:
        assert report_of(tracked)["status"] == "running"
        for step in range(3):
            run.log_metrics({names.TOKENS_PER_S: 10.0 * step}, step)
        run.log_digests({"base_lm": "sha256:1", "corpus": "sha256:2"})
        (run.folder / "levels.png").write_bytes(b"a picture")
        results = {
            names.TOKENS_TOTAL: np.int64(1234),
            names.NODES_BY_LOD: {0: 5, 1: 2},
            names.DELTA_NLL: float("nan"),
            "feed": "actors",
        }
        run.finish(results, [Table([{"lod": 0, "nodes": 5}], "Levels"), "And *words*."])

    report = report_of(tracked)
    assert report["schema_version"] == 1
    assert report["status"] == "finished"
    assert report["job"] == "compact"
    assert report["tokens_total"] == 1234
    assert report["nodes_by_lod"] == {"0": 5, "1": 2}
    assert report["delta_nll"] is None
    assert report["feed"] == "actors"
    assert report["digests"] == {"base_lm": "sha256:1", "corpus": "sha256:2"}
    assert report["error"] is None
    assert list(report) == sorted(report)
    assert str(report["started_at"]) <= str(report["finished_at"])
    text = (run.folder / "report.md").read_text()
    assert "## Levels\n\n| lod | nodes |" in text
    assert "And *words*." in text
    assert "![levels](levels.png)" in text

    (logged,) = mlflow_runs(tracked)
    assert logged.info.status == "FINISHED"
    assert logged.info.run_name == tracked.run.name
    assert report["mlflow"] == {"run_id": logged.info.run_id, "tracking_uri": f"sqlite:///{tracked.run.dir}/mlflow.db"}
    assert logged.data.params["corpus.paths"] == '["a", "b"]'
    assert logged.data.params["store.segment_super_blocks"] == "32"
    assert logged.data.metrics["tokens_total"] == 1234
    assert logged.data.metrics["nodes_by_lod.1"] == 2
    assert "delta_nll" not in logged.data.metrics
    assert logged.data.tags["megacontext.job"] == "compact"
    assert logged.data.tags["megacontext.digest.corpus"] == "sha256:2"
    assert logged.data.tags["mlflow.source.git.commit"] == report["git_revision"]
    client = MlflowClient(tracking_uri=f"sqlite:///{tracked.run.dir}/mlflow.db")
    history = client.get_metric_history(logged.info.run_id, "tokens_per_s")
    assert [(point.step, point.value) for point in history] == [(0, 0.0), (1, 10.0), (2, 20.0)]
    artefacts = {file.path for file in client.list_artifacts(logged.info.run_id)}
    assert artefacts == {"config.yaml", "report.json", "report.md", "job.log", "levels.png"}
    assert str(logged.info.artifact_uri).startswith(tracked.run.dir.as_uri())


def test_the_written_configuration_starts_the_same_job(untracked: CompactJob) -> None:
    unnamed = replace(untracked, run=RunConfig(dir=untracked.run.dir))
    with JobRun.start("tree rebuild-gists", unnamed) as run:
        pass
    assert run.folder.name == "tree-rebuild-gists"
    again = parse_job(CompactJob, ["--config", str(run.folder / "config.yaml")])
    assert again == run.job
    assert again.run.name == "tree-rebuild-gists"


def test_a_failed_run_says_so_everywhere_and_raises(tracked: CompactJob) -> None:
    with pytest.raises(StorageError, match="the disk"):
        run_and_raise(tracked, StorageError("the disk"))
    folder = tracked.run.dir / tracked.run.name
    report = report_of(tracked)
    assert report["status"] == "failed"
    assert report["error"] == {"type": "StorageError", "message": "the disk"}
    assert "StorageError: the disk" in (folder / "report.md").read_text()
    assert "Traceback" in (folder / "job.log").read_text()
    (logged,) = mlflow_runs(tracked)
    assert logged.info.status == "FAILED"
    assert logged.data.metrics["tokens_total"] == 7


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(15)])
def test_an_interrupted_run_is_killed_in_mlflow(tracked: CompactJob, error: BaseException) -> None:
    with pytest.raises(type(error)):
        run_and_raise(tracked, error)
    assert report_of(tracked)["status"] == "interrupted"
    assert mlflow_runs(tracked)[0].info.status == "KILLED"


def test_the_same_name_resumes_the_folder_in_a_new_mlflow_run(tracked: CompactJob) -> None:
    with pytest.raises(ValueError, match="first"):
        run_and_raise(tracked, ValueError("first"))
    more_workers = replace(tracked, compaction=replace(tracked.compaction, num_compactors=2))
    with JobRun.start("compact", more_workers) as run:
        assert (run.folder / "state").read_text() == "kept"
        run.finish({})
    assert report_of(tracked)["status"] == "finished"
    assert report_of(tracked)["error"] is None
    assert [logged.info.status for logged in mlflow_runs(tracked)] == ["FAILED", "FINISHED"]
    assert (run.folder / "job.log").read_text().count(" of job compact, revision ") == 2


def test_a_second_process_is_refused_and_harms_nothing(untracked: CompactJob) -> None:
    with JobRun.start("compact", untracked) as run:
        before = {file: file.read_bytes() for file in run.folder.iterdir() if file.suffix}
        code = (
            "import sys; from cluster.cli import Job, main; from cluster.config import CompactJob\n"
            "from cluster.run import JobRun\n"
            "def run(job):\n    with JobRun.start('compact', job): pass\n"
            "sys.exit(main([Job('compact', CompactJob, '__main__:run')], sys.argv[1:]))"
        )
        command = [sys.executable, "-c", code, "compact", "--config", str(run.folder / "config.yaml")]
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert second.returncode == RunConflictError.exit_code
        assert f"process {os.getpid()} on " in second.stderr
        assert "--run.name" in second.stderr
        assert {file: file.read_bytes() for file in before} == before
    with JobRun.start("compact", untracked):
        pass  # the lock went with the run


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_run_frees_its_folder_and_does_not_look_finished(untracked: CompactJob) -> None:
    with JobRun.start("compact", untracked) as run:
        run.finish({})
    code = (
        "import os, signal, sys; from cluster.config import CompactJob\n"
        "from cluster.config_parser import parse_job; from cluster.run import JobRun\n"
        "JobRun.start('compact', parse_job(CompactJob, sys.argv[1:]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", code, "--config", str(run.folder / "config.yaml")]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == -signal.SIGKILL
    assert report_of(untracked)["status"] == "running"
    with JobRun.start("compact", untracked) as run:
        run.finish({})
    assert report_of(untracked)["status"] == "finished"


def test_without_tracking_mlflow_is_not_even_imported(untracked: CompactJob) -> None:
    code = (
        "import sys; from cluster.config import CompactJob\n"
        "from cluster.config_parser import parse_job; from cluster.run import JobRun\n"
        "with JobRun.start('compact', parse_job(CompactJob, sys.argv[1:])) as run:\n"
        "    run.log_metrics({'a': 1.0}); run.log_digests({'b': 'c'}); run.finish({'tokens_total': 1})\n"
        "print('mlflow' in sys.modules, repr(run.mlflow_command))"
    )
    command = [sys.executable, "-c", code, "--run.dir", str(untracked.run.dir), "--tracking.enabled", "false"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False ''", done.stderr
    assert not (untracked.run.dir / "mlflow.db").exists()


def test_a_tracker_that_cannot_be_reached_fails_the_start_quickly(untracked: CompactJob) -> None:
    job = replace(untracked, tracking=TrackingConfig(uri="http://127.0.0.1:9"))
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9 cannot be used.*--tracking\.enabled false"):
        JobRun.start("compact", job)
    report = report_of(untracked)
    assert report["status"] == "failed"
    assert isinstance(report["error"], dict)
    assert report["error"]["type"] == "TrackingError"
    with JobRun.start("compact", untracked):
        pass  # the failed start left no lock


def test_results_may_not_take_the_reports_own_names(untracked: CompactJob) -> None:
    with pytest.raises(ValueError, match="job, status"), JobRun.start("compact", untracked) as run:
        run.finish({"status": "fine", "job": 3})


def test_a_full_disk_does_not_hide_the_error_that_it_caused(
    untracked: CompactJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = JobRun.start("compact", untracked)
    monkeypatch.setattr("cluster.run.write_atomically", full)
    with pytest.raises(StorageError, match="first"), run:
        raise StorageError("first")
    assert "could not be written" in capsys.readouterr().err


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.json"
    write_atomically(file, "one")

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "two")
    assert file.read_text() == "one"
    assert list(tmp_path.iterdir()) == [file]
