from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.config import BaseLMConfig, CompactJob, RunConfig, StoreConfig
from cluster.environment import absolute_paths, base_folder, in_submitted_job, quiet_environment


def test_relative_paths_start_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = absolute_paths(CompactJob(store=StoreConfig(root=Path("/abs/store"))))
    assert job.run.dir == tmp_path / "runs"
    assert job.store.root == Path("/abs/store")
    assert job.base_lm.cache_dir == Path.home() / ".cache/megacontext"
    assert absolute_paths(job) == job


def test_a_submitted_job_does_not_write_into_its_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert in_submitted_job()
    assert absolute_paths(CompactJob()).run.dir == tmp_path / "home/megacontext/runs"
    monkeypatch.setenv("MEGACONTEXT_HOME", str(tmp_path / "chosen"))
    assert absolute_paths(CompactJob()).store.root == tmp_path / "chosen/data/store"


def test_megacontext_home_wins_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGACONTEXT_HOME", str(tmp_path))
    assert base_folder() == tmp_path
    job = CompactJob(run=RunConfig(dir=Path("r/../s")), base_lm=BaseLMConfig(cache_dir=Path("c")))
    assert absolute_paths(job).run.dir == tmp_path / "s"
    assert absolute_paths(job).base_lm.cache_dir == tmp_path / "c"


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_DEDUP_LOGS", "1")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    quiet_environment()
    assert os.environ["RAY_DEDUP_LOGS"] == "1"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
