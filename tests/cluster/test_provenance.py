from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import CompactJob, CorpusConfig, RayConfig, RunConfig, TrackingConfig
from cluster.provenance import config_digest, flatten, git_revision, package_versions


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MEGACONTEXT_GIT_REVISION", raising=False)
    (tmp_path / "file").write_text("one")
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in (["init", "-q"], ["add", "file"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    return tmp_path


def test_revision_of_a_checkout_and_of_a_changed_one(checkout: Path) -> None:
    clean = git_revision(checkout)
    assert len(clean) == 40
    (checkout / "untracked").write_text("x")
    assert git_revision(checkout) == clean
    (checkout / "file").write_text("two")
    assert git_revision(checkout) == f"{clean}-dirty"


def test_no_checkout_and_somebody_elses_are_unknown(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert git_revision(tmp_path_factory.mktemp("plain")) == "unknown"
    inside = checkout / "site-packages"
    inside.mkdir()
    assert git_revision(inside) == "unknown"
    monkeypatch.setenv("PATH", "")
    assert git_revision(checkout) == "unknown"
    monkeypatch.setenv("MEGACONTEXT_GIT_REVISION", "abc123")
    assert git_revision(inside) == "abc123"


def test_digest_changes_with_what_can_change_results_only() -> None:
    job = CompactJob(corpus=CorpusConfig(paths=["a"]))
    same = replace(job, run=RunConfig(name="x"), ray=RayConfig(address="local"), tracking=TrackingConfig(enabled=False))
    assert config_digest(same) == config_digest(job)
    assert config_digest(replace(job, corpus=CorpusConfig(paths=["b"]))) != config_digest(job)


def test_versions_and_flat_names() -> None:
    assert package_versions()["ray"].count(".") == 2
    assert flatten({"a": {"b": 1, "c": {"d": "x"}}, "e": [1, 2], "f": ["y"], "g": []}) == {
        "a.b": 1,
        "a.c.d": "x",
        "e.0": 1,
        "e.1": 2,
        "f": ["y"],
        "g": [],
    }
