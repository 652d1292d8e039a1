"""MLflow: one writer a run, the driver; a tracking server that fails later does not fail the job.

Every start of a job opens a new MLflow run, also one that resumes: MLflow refuses changed parameters, and a
resumed job may have more workers. The tag `megacontext.run` holds the attempts together.
"""

from __future__ import annotations

import getpass
import json
import math
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

from cluster.config import TrackingConfig
from cluster.errors import TrackingError
from cluster.log import get_logger
from cluster.registry import DIGEST_TAG, SCHEME, database_lock, mlflow_client, tracking_uri

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# Of MLflow's own limits for one request.
_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_PARAM_LENGTH = 6000
_METRIC_NAME = re.compile(r"[^\w\-. :/]")
"""What may not be part of one; a report's own words, as `p50, ms`, may hold it."""

log = get_logger("tracking")


class Tracker(Protocol):
    """Where a run's numbers go besides its report."""

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None: ...
    def set_tags(self, tags: Mapping[str, str]) -> None: ...
    def log_artifact(self, file: Path) -> None: ...
    def register_model(self, folder: Path, name: str, digest: str) -> str: ...
    def close(self, status: RunStatus) -> None: ...
    def describe(self) -> dict[str, str]: ...


class NoTracker:
    """For `tracking.enabled=false`: forgets everything, and never imports MLflow."""

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Nothing."""

    def log_artifact(self, file: Path) -> None:
        """Nothing."""

    def register_model(self, folder: Path, name: str, digest: str) -> str:
        """Nothing, and no name."""
        return ""

    def close(self, status: RunStatus) -> None:
        """Nothing."""

    def describe(self) -> dict[str, str]:
        """An empty mapping."""
        return {}


class MLflowTracker:
    """One MLflow run, written by a thread of its own so that the job does not wait for it."""

    def __init__(
        self, config: TrackingConfig, run_dir: Path, run_name: str, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> None:
        """Open the run.

        Args:
            config: where to.
            run_dir: folder of all runs; holds the default database and its artefacts.
            run_name: MLflow's name of the run.
            params: flat mapping of what the run was asked to do.
            tags: what it came from.

        Raises:
            TrackingError: the server cannot be reached or refuses; after 20 s at most.
        """
        self.uri = tracking_uri(config, run_dir)
        is_local = self.uri.startswith("sqlite:")
        try:
            self._client = mlflow_client(self.uri)
            from mlflow.entities import Param

            # Two jobs that start together would both make the experiment.
            with database_lock(self.uri):
                experiment = self._client.get_experiment_by_name(config.experiment)
                location = (run_dir / "mlflow-artifacts").as_uri() if is_local else None
                experiment_id = (
                    experiment.experiment_id
                    if experiment
                    else self._client.create_experiment(config.experiment, artifact_location=location)
                )
            all_tags = {"mlflow.user": _user(), **tags}
            self.run_id: str = self._client.create_run(experiment_id, tags=all_tags, run_name=run_name).info.run_id
            entries = [Param(name, _param_text(value)) for name, value in params.items()]
            for start in range(0, len(entries), _PARAMS_PER_BATCH):
                self._client.log_batch(self.run_id, params=entries[start : start + _PARAMS_PER_BATCH])
        except Exception as error:  # MLflow, its stores and requests raise many types
            raise TrackingError(
                f"MLflow at {self.uri} cannot be used: {_first_line(error)}. Start it, correct tracking.uri, or go "
                "without by --tracking.enabled false"
            ) from error
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._lost = False

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers at a step (None: 0), now; written behind the caller's back. Not finite ones are left out."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        finite = {_METRIC_NAME.sub("_", k): float(v) for k, v in values.items() if math.isfinite(v)}
        metrics = [Metric(name, value, now_ms, step or 0) for name, value in finite.items()]
        for start in range(0, len(metrics), _METRICS_PER_BATCH):
            batch = metrics[start : start + _METRICS_PER_BATCH]
            self._submit(lambda batch=batch: self._client.log_batch(self.run_id, metrics=batch))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; written behind the caller's back."""
        from mlflow.entities import RunTag

        entries = [RunTag(name, value) for name, value in tags.items()]
        self._submit(lambda: self._client.log_batch(self.run_id, tags=entries))

    def log_artifact(self, file: Path) -> None:
        """Copy a file as it is when its turn comes; the next call of `close` waits for that."""
        self._submit(lambda: self._client.log_artifact(self.run_id, str(file)))

    def register_model(self, folder: Path, name: str, digest: str) -> str:
        """File a trained net with this run, and enter it in the registry, unless it is there already.

        Args:
            folder: with the net; becomes `<its name>/` of the run's artefacts.
            name: of the registered model.
            digest: of the net; the same digest gets no second version.

        Returns:
            `models:/<name>/<version>`; empty, with a warning, where the registry refused or the server was lost.
        """
        found: list[str] = []

        def register() -> None:
            try:
                found.append(self._registered(folder, name, digest))
            except Exception as error:  # the net is on disk; the run goes on without an entry
                log.warning("%s could not be registered at %s: %s", name, self.uri, _first_line(error))

        self._submit(register)
        self._writer.submit(lambda: None).result()  # everything before it is done
        return found[0] if found else ""

    def _registered(self, folder: Path, name: str, digest: str) -> str:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

        known = self._client.search_model_versions(f"name='{name}'")
        for version in known:
            if version.tags.get(DIGEST_TAG) == digest:
                return f"{SCHEME}{name}/{version.version}"
        self._client.log_artifacts(self.run_id, str(folder), folder.name)
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        source = f"{self._client.get_run(self.run_id).info.artifact_uri}/{folder.name}"
        version = self._client.create_model_version(name, source, self.run_id, {DIGEST_TAG: digest})
        return f"{SCHEME}{name}/{version.version}"

    def close(self, status: RunStatus) -> None:
        """Write what is pending, then end the run. A server that fails only costs a warning."""
        self._submit(lambda: self._client.set_terminated(self.run_id, status))
        self._writer.shutdown(wait=True)

    def describe(self) -> dict[str, str]:
        """Where to find the run: `tracking_uri` and `run_id`."""
        return {"tracking_uri": self.uri, "run_id": self.run_id}

    def _submit(self, call: Any) -> None:
        if not self._lost:
            self._writer.submit(self._write, call)

    def _write(self, call: Any) -> None:
        if self._lost:  # what is queued behind a failure would only wait for the same timeout again
            return
        try:
            call()
        except Exception as error:  # the report on disk has everything; a lost server is no reason to lose a job
            self._lost = True
            log.warning(
                "MLflow at %s was lost, and with it the rest of this run there: %s", self.uri, _first_line(error)
            )


def open_tracker(
    config: TrackingConfig, run_dir: Path, run_name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Tracker:
    """The tracker a configuration asks for; arguments and errors as of `MLflowTracker`."""
    return MLflowTracker(config, run_dir, run_name, params, tags) if config.enabled else NoTracker()


def _param_text(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list | tuple | dict) else str(value)
    return text if len(text) <= _PARAM_LENGTH else text[: _PARAM_LENGTH - 1] + "…"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        return "unknown"
