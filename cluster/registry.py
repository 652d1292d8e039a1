"""Trained nets by name: MLflow's model registry.

`models:/gistnet/3` (a version), `models:/gistnet@best` (an alias) and `models:/gistnet/latest` stand wherever a
configuration wants the folder of a net. Versions are files of a run, put there by `Tracker.register_model`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock, Timeout

from cluster.config import BaseLMConfig, GistNetConfig, TrackingConfig
from cluster.errors import ConfigError, TrackingError
from cluster.log import get_logger, quiet_libraries

SCHEME = "models:/"
DIGEST_TAG = "megacontext.digest"

# MLflow's defaults, 7 retries of 120 s, would hold a job up for a quarter of an hour.
_HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}

_LOCK_TIMEOUT_S = 120.0

_NAME = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>\d+|latest)|@(?P<alias>[^/@]+))")

JobT = TypeVar("JobT")


def tracking_uri(config: TrackingConfig, run_dir: Path) -> str:
    """Of MLflow's server or database."""
    return config.uri or f"sqlite:///{run_dir}/mlflow.db"


def database_lock(uri: str) -> AbstractContextManager[Any]:
    """Held while tables or experiments of a local database are looked for and made: of processes that do so at the same
    time all but one would fail. Servers see to it themselves."""
    path = uri.removeprefix("sqlite:///")
    # Where nothing can be written, nothing is made.
    if path in {uri, "", ":memory:"} or not os.access(Path(path).parent, os.W_OK):
        return contextlib.nullcontext()
    return FileLock(Path(path).with_name(".mlflow.lock"), timeout=_LOCK_TIMEOUT_S)


def mlflow_client(uri: str) -> Any:
    """MLflow's client of one server or database, for runs and registry, that gives up after some 20 s; a new database
    gets its tables.

    Raises:
        TrackingError: another job has been making them for two minutes.
    """
    for name, value in _HTTP_LIMITS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    quiet_libraries()  # MLflow turns its loggers up when it is imported
    try:
        with database_lock(uri):
            return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except Timeout as error:
        raise TrackingError(f"{error.lock_file} is held by another job; end that job, or wait for it") from error


def with_local_nets(job: JobT) -> JobT:
    """A copy of a job's configuration in which registered nets are folders; fetches what lies on a server.

    Raises:
        ConfigError: no such name, version or alias.
        TrackingError: the registry cannot be used.
    """
    tracking, run = getattr(job, "tracking", None), getattr(job, "run", None)
    if not isinstance(tracking, TrackingConfig) or run is None:
        return job
    uri = tracking_uri(tracking, run.dir)
    base_lm = getattr(job, "base_lm", None)
    cache = (base_lm.cache_dir if base_lm else BaseLMConfig().cache_dir).expanduser() / "registry"
    changes: dict[str, Any] = {}
    for field in fields(job):  # type: ignore[arg-type]
        section = getattr(job, field.name)
        if isinstance(section, GistNetConfig) and section.path.startswith(SCHEME):
            changes[field.name] = replace(section, path=str(local_net(section.path, uri, cache)))
        names = getattr(section, "gistnets", [])
        if any(name.startswith(SCHEME) for name in names):
            nets = [str(local_net(name, uri, cache)) if name.startswith(SCHEME) else name for name in names]
            changes[field.name] = replace(section, gistnets=nets)
    return replace(job, **changes) if changes else job  # type: ignore[type-var]


def local_net(name: str, uri: str, cache: Path) -> Path:
    """The folder of a registered net on this machine.

    Args:
        name: `models:/...`.
        uri: MLflow's.
        cache: where nets of a server are fetched to.

    Raises:
        ConfigError: no such name, version or alias.
        TrackingError: the registry cannot be used.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"{name} names no registered net: write {SCHEME}NAME/VERSION, {SCHEME}NAME/latest or {SCHEME}NAME@ALIAS"
        )
    client = mlflow_client(uri)
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        if alias := match["alias"]:
            version = client.get_model_version_by_alias(match["name"], alias)
        elif match["version"] == "latest":
            found = client.search_model_versions(f"name='{match['name']}'")
            if not found:
                raise ConfigError(_unknown(client, name, uri))
            version = max(found, key=lambda one: int(one.version))
        else:
            version = client.get_model_version(match["name"], match["version"])
        get_logger("registry").info("%s is version %s", name, version.version)
        if version.source.startswith("file:"):
            return Path(url2pathname(urlsplit(version.source).path))
        # A version's files never change: fetched once, and there only when all of them are.
        folder = cache / hashlib.sha256(f"{uri}\0{version.name}\0{version.version}".encode()).hexdigest()[:16]
        if not folder.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=cache) as unfinished:
                if not folder.exists():
                    fetched = download_artifacts(artifact_uri=version.source, dst_path=unfinished, tracking_uri=uri)
                    Path(fetched).rename(folder)
        return folder
    except MlflowException as error:
        missing = error.error_code in {ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), "INVALID_PARAMETER_VALUE"}
        if missing:
            raise ConfigError(_unknown(client, name, uri)) from error
        raise TrackingError(f"MLflow at {uri} cannot be asked for {name}: {error}") from error
    except OSError as error:
        raise TrackingError(f"{name} cannot be fetched from MLflow at {uri}: {error}") from error


def _unknown(client: Any, name: str, uri: str) -> str:
    known = sorted(f"{SCHEME}{one.name}/{one.version}" for one in client.search_model_versions())
    listed = ", ".join(known[:20]) if known else "nothing; `train gistnet` registers what it trains"
    return f"{name} is not in the registry of {uri}. It has: {listed}"
