"""A run: its folder, log, lock, MLflow entry and report, whatever way the job ends."""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from filelock import FileLock, Timeout

from cluster import metric_names
from cluster.config import RunConfig, TrackingConfig
from cluster.config_parser import to_yaml
from cluster.environment import PROJECT_ROOT, absolute_paths
from cluster.errors import RunConflictError
from cluster.log import get_logger, logging_to
from cluster.progress import Progress
from cluster.provenance import config_digest, flatten, git_revision, package_versions
from cluster.tables import Table
from cluster.tracking import RunStatus, Tracker, open_tracker

REPORT_SCHEMA_VERSION = 1

Status = Literal["running", "finished", "failed", "interrupted"]

_MLFLOW_STATUS: dict[Status, RunStatus] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class TrackedJob(Protocol):
    """What a job's configuration must have to become a run."""

    @property
    def run(self) -> RunConfig: ...
    @property
    def tracking(self) -> TrackingConfig: ...


class JobRun:
    """One run of one job. Use as `with JobRun.start("compact", job) as run:`.

    Leaves `<run.dir>/<name>/` with `config.yaml`, `report.json`, `report.md`, `job.log` and what the job adds
    (plots as `*.png`), and the same in MLflow. A run of the same name continues in the same folder, and its
    report replaces the earlier one.
    """

    def __init__(self, job_name: str, job: TrackedJob) -> None:
        """Use `start`. Touches nothing yet."""
        self.job_name = job_name
        self.name = job.run.name or job_name.replace(" ", "-")
        self.job = absolute_paths(_named(job, self.name))
        self.folder = self.job.run.dir / self.name
        self.log = get_logger(job_name.replace(" ", "."))
        self.status: Status = "running"
        self._started = time.monotonic()
        self._header: dict[str, Any] = {
            "schema_version": REPORT_SCHEMA_VERSION,
            "name": self.name,
            "job": job_name,
            "started_at": _now(),
            "finished_at": None,
            "versions": package_versions(),
            "git_revision": git_revision(PROJECT_ROOT),
            "config_digest": config_digest(self.job),
            "digests": {},
            "mlflow": {},
            "error": None,
        }
        self._results: dict[str, Any] = {}
        self._markdown = ""
        self._tracker: Tracker | None = None
        self._resources = ExitStack()

    @classmethod
    def start(cls, job_name: str, job: TrackedJob) -> JobRun:
        """Make the folder, take its lock, begin the log, write `config.yaml`, open the MLflow run.

        Args:
            job_name: the job's words on the command line; also the run's name when `run.name` is empty.
            job: its validated configuration.

        Raises:
            RunConflictError: another live process has this run.
            TrackingError: MLflow cannot be used. The report says so too.
        """
        run = cls(job_name, job)
        try:
            run._open()
        except BaseException as error:
            run._end(error)
            raise
        return run

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resources.enter_context(_only_process(self.folder))
        self._resources.enter_context(logging_to(self.folder / "job.log"))
        config = self.folder / "config.yaml"
        write_atomically(config, f"# python ray_job.py {self.job_name} --config {config}\n{to_yaml(self.job)}")
        self._write_report()  # a job that is killed leaves "running", not its predecessor's success
        self._tracker = open_tracker(
            self.job.tracking,
            self.job.run.dir,
            self.name,
            params=flatten(asdict(self.job)),  # type: ignore[call-overload]
            tags={
                "megacontext.job": self.job_name,
                "megacontext.run": self.name,
                "megacontext.config_digest": self._header["config_digest"],
                "mlflow.source.name": f"ray_job.py {self.job_name}",
                "mlflow.source.git.commit": self._header["git_revision"],
            },
        )
        self._header["mlflow"] = self._tracker.describe()
        self.log.debug("run %s of job %s, revision %s", self.name, self.job_name, self._header["git_revision"])

    def __enter__(self) -> JobRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end(error)

    def progress(self, total: int | None, unit: str, label: str = "", *, initial: int = 0) -> Progress:
        """A progress display for a part of this job; arguments as of `Progress`."""
        return Progress(total, unit, label, initial=initial)

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers on the way, under names of `cluster.metric_names`. Does not wait for MLflow."""
        if self._tracker is not None:
            self._tracker.log_metrics(values, step)

    def log_digests(self, digests: Mapping[str, str]) -> None:
        """Record what went in (`base_lm`, `tokenizer`, `gistnet`, `corpus`, ...), in the report and as MLflow tags."""
        self._header["digests"].update(digests)
        if self._tracker is not None:
            self._tracker.set_tags({f"megacontext.digest.{name}": digest for name, digest in digests.items()})

    def register_model(self, folder: Path, name: str, digest: str) -> str:
        """Enter a trained net in MLflow's registry; its name there, empty without tracking. As `Tracker`'s."""
        return "" if self._tracker is None else self._tracker.register_model(folder, name, digest)

    def finish(self, report: Mapping[str, Any], sections: str | Sequence[Table | str] = "") -> None:
        """Hand in the results; the report is written when the `with` block ends.

        Args:
            report: results by the names of `cluster.metric_names`; numbers, texts, lists and nested mappings.
                Numbers become MLflow metrics, nested ones as `a.b` or `a.0`. Not finite ones are written as null.
            sections: body of `report.md`: Markdown, or tables and Markdown in order.

        Raises:
            ValueError: a result is named as one of the report's own fields.
        """
        if taken := sorted(set(report) & {*self._header, "status"}):
            raise ValueError(f"results may not be named {', '.join(taken)}: the report uses these itself")
        self._results = {str(name): value for name, value in report.items()}
        parts = [sections] if isinstance(sections, str) else sections
        self._markdown = "\n\n".join(part if isinstance(part, str) else part.markdown() for part in parts)

    @property
    def report_path(self) -> Path:
        """The machine-readable report."""
        return self.folder / "report.json"

    @property
    def mlflow_command(self) -> str:
        """How to look at the run in MLflow's own pages; empty when it is not tracked."""
        uri = self._header["mlflow"].get("tracking_uri", "")
        # An http tracking URI is the address of the pages themselves.
        return f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite:") else uri

    def _end(self, error: BaseException | None) -> None:
        """Write down how it ended. Never raises in place of `error`."""
        if isinstance(error, RunConflictError):  # the folder belongs to the other process
            self._resources.close()
            return
        if error is None:
            self.status = "finished"
        else:
            self.status = "failed" if isinstance(error, Exception) else "interrupted"
            self._header["error"] = {"type": type(error).__name__, "message": str(error)}
            self.log.debug("%s", "".join(traceback.format_exception(error)))
        try:
            self._header["finished_at"] = _now()
            self._results.setdefault(metric_names.WALL_SECONDS, time.monotonic() - self._started)
            self._write_report()
            self._close_tracker()
        except OSError as trouble:  # a full disk is often why the job failed
            if error is None:
                raise
            self.log.warning("the report in %s could not be written: %s", self.folder, trouble)
        finally:
            self._resources.close()

    def _close_tracker(self) -> None:
        if self._tracker is None:
            return
        self._tracker.log_metrics(_numbers(self._results))
        named = ["config.yaml", "report.json", "report.md", "job.log"]
        for file in [*(self.folder / name for name in named), *sorted(self.folder.glob("*.png"))]:
            if file.exists():
                self._tracker.log_artifact(file)
        self._tracker.close(_MLFLOW_STATUS[self.status])

    def _write_report(self) -> None:
        content = _plain(self._header | {"status": self.status} | self._results)
        write_atomically(self.report_path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")
        write_atomically(self.folder / "report.md", self._report_markdown())

    def _report_markdown(self) -> str:
        header = self._header
        rows: list[dict[str, Any]] = [
            {"run": "status", self.name: self.status},
            {"run": "started", self.name: header["started_at"]},
            {"run": "finished", self.name: header["finished_at"]},
            {"run": "revision", self.name: header["git_revision"]},
            {"run": "configuration", self.name: f"`config.yaml`, {header['config_digest']}"},
            *({"run": name, self.name: value} for name, value in {**header["versions"], **header["digests"]}.items()),
        ]
        if header["error"]:
            rows.append({"run": "error", self.name: f"{header['error']['type']}: {header['error']['message']}"})
        plots = [f"![{plot.stem}]({plot.name})" for plot in sorted(self.folder.glob("*.png"))]
        title = f"# {self.job_name}: {self.name}"
        return "\n\n".join(filter(None, [title, self._markdown.strip(), *plots, Table(rows).markdown()])) + "\n"


def _named(job: Any, name: str) -> Any:
    return replace(job, run=replace(job.run, name=name))


def is_finished(folder: Path, job: object) -> bool:
    """Whether a run in this folder came to its end, with a configuration that gives the same results."""
    path = folder / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    return report.get("status") == "finished" and report["config_digest"] == config_digest(job)


def write_atomically(file: Path, text: str) -> None:
    """Replace a file's content so that a reader, or a crash, finds the old or the new one, never a part."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _only_process(folder: Path) -> ExitStack:
    """Hold the folder's lock; the system releases it when the process dies, in whatever way."""
    lock = FileLock(folder / ".lock")
    owner = folder / ".owner"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = owner.read_text(encoding="utf-8").strip() if owner.exists() else "another process"
        raise RunConflictError(
            f"{folder} belongs to a job that is still running ({who}); wait for it, stop it, or take another --run.name"
        ) from error
    held = ExitStack()
    held.callback(lock.release)
    held.callback(owner.unlink, missing_ok=True)
    owner.write_text(f"process {os.getpid()} on {os.uname().nodename} since {_now()}\n", encoding="utf-8")
    return held


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in flatten(_plain(results)).items() if isinstance(value, int | float)}


def _plain(value: Any) -> Any:
    """Only what JSON has: text keys, lists, finite numbers; NumPy and torch scalars become Python's."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if callable(getattr(value, "item", None)):
        return _plain(value.item())
    return str(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
