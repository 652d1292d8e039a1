"""The compact job, by the same command line: submitted to a cluster, and joined to it by address."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from storage.store import Store
from storage.tree.verify import verify_context
from tests.actors.helpers import assert_same_tree, make_text
from tests.cluster.conftest import ROOT, SubmittedCluster


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index, words in enumerate((400, 30, 700)):
        (corpus / f"doc{index}.txt").write_text(make_text(index, words))
    return ["ray_job.py", "compact", "--config", "configs/tiny.yaml", "--corpus.paths", f"[{corpus}]"]


def test_submitted_and_joined_compaction_agree(submitted_cluster: SubmittedCluster, command: list[str]) -> None:
    done = submitted_cluster.submit("python", *command, "--store.context", "submitted", timeout_s=240)
    assert done.returncode == 0, done.stdout + done.stderr
    home = submitted_cluster.home
    report = json.loads((home / "runs" / "tiny" / "report.json").read_text())
    assert report["status"] == "finished"
    assert report["documents_total"] == 3

    joined = [sys.executable, *command, "--store.context", "joined", "--ray.address", submitted_cluster.address]
    done = subprocess.run(
        joined, cwd=ROOT, env=submitted_cluster.environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr

    store = Store(home / "data" / "store")
    with store.open_reader("submitted") as left, store.open_reader("joined") as right:
        assert left.version.max_lod >= 1
        assert_same_tree(left, right)
    assert verify_context(store.folder("joined"), "joined").ok
