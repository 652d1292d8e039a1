"""What a run's numbers came from: code, versions, configuration."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_DOES_NOT_CHANGE_RESULTS = ("run", "ray", "tracking")


def git_revision(root: Path) -> str:
    """Commit of the checkout at `root`, with `-dirty` when tracked files differ from it.

    MEGACONTEXT_GIT_REVISION wins: a job submitted to a cluster runs in a copy without `.git`. `unknown` when
    `root` is no checkout of its own, or git is missing.
    """
    if given := os.environ.get("MEGACONTEXT_GIT_REVISION", ""):
        return given
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    # An installation below somebody else's repository must not be taken for a commit of ours.
    if not top or not commit or Path(top).resolve() != root.resolve():
        return "unknown"
    return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def package_versions() -> dict[str, str]:
    """Versions of Python and of what the numbers depend on most, read without importing them."""
    versions = {"python": platform.python_version()}
    for package in ("megacontext", "torch", "ray", "transformers", "zarr"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def config_digest(job: object) -> str:
    """SHA-256 of the part of a configuration that can change results: all but `run`, `ray` and `tracking`."""
    values = asdict(job)  # type: ignore[call-overload]
    kept = {name: value for name, value in values.items() if name not in _DOES_NOT_CHANGE_RESULTS}
    return "sha256:" + hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` to `{"a.b": 1}`, and lists of numbers `{"a": [1, 2]}` to `{"a.0": 1, "a.1": 2}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
