"""What this process finds in, and puts into, its environment. Free of Ray: read before Ray is imported."""

from __future__ import annotations

import os
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TypeVar

JobT = TypeVar("JobT")

PROJECT_ROOT = Path(__file__).resolve().parent.parent
"""The checkout, or where the packages are installed."""

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "TOKENIZERS_PARALLELISM": "false",
}


def quiet_environment() -> None:
    """Turn down what third parties print, sharing and telemetry included. What is set already stays.

    Ray reads some of these when it is imported, so call this first.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")


def in_submitted_job() -> bool:
    """Whether this process is the driver that `ray job submit` started."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def base_folder() -> Path:
    """Where relative paths of a configuration start: MEGACONTEXT_HOME, or the current folder.

    A submitted job runs in a copy of the working directory that Ray deletes some time after the job;
    what it writes must not end there, so its default is `~/megacontext`.
    """
    home = os.environ.get("MEGACONTEXT_HOME", "")
    if home:
        return Path(home).expanduser().absolute()
    return Path.home() / "megacontext" if in_submitted_job() else Path.cwd()


def absolute_paths(job: JobT) -> JobT:
    """A copy of a job's configuration whose `Path` fields are absolute.

    Actors work in other folders than the driver, so a relative path would mean something else there.
    """
    changes = {}
    for field in fields(job):  # type: ignore[arg-type]
        value = getattr(job, field.name)
        if isinstance(value, Path):
            changes[field.name] = Path(os.path.normpath(base_folder() / value.expanduser()))
        elif is_dataclass(value):
            changes[field.name] = absolute_paths(value)
    return replace(job, **changes)  # type: ignore[type-var]
