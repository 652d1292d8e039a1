"""One service, many drivers: jobs of their own processes, joined to a lasting cluster by the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.store import Store
from storage.tree.verify import verify_context
from storage.versions.history import History
from tests.actors.helpers import assert_same_tree, make_text
from tests.cluster.conftest import ROOT, SubmittedCluster


class Door:
    """`ray_job.py` on the cluster, for one store."""

    def __init__(self, cluster: SubmittedCluster, folder: Path) -> None:
        self.environment = cluster.environment | {"RAY_ADDRESS": cluster.address, "MEGACONTEXT_HOME": str(folder)}
        self.root = folder / "data" / "store"
        self.corpus = folder / "corpus"
        self.corpus.mkdir()
        for index, words in enumerate((2500, 300, 2500, 2500)):
            (self.corpus / f"doc{index}.txt").write_text(make_text(index, words))

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "ray_job.py", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, *words: str) -> dict[str, Any]:
        """A job with `--json`."""
        process = self.start(*words, "--json", "true")
        out, error = process.communicate(timeout=240)
        assert process.returncode == 0, out + error
        return json.loads(out)

    def compact(self, context: str) -> subprocess.Popen[str]:
        words = [
            "compact",
            "--config",
            "configs/tiny.yaml",
            "--corpus.paths",
            f"[{self.corpus}]",
            "--run.name",
            context,
        ]
        words += ["--tracking.enabled", "false", "--store.context", context, "--store.service", "require"]
        return self.start(*words)


@pytest.fixture
def door(submitted_cluster: SubmittedCluster, tmp_path: Path) -> Iterator[Door]:
    door = Door(submitted_cluster, tmp_path)
    door.run("store", "start")
    yield door
    door.run("store", "stop")


def num_blocks(store: Store, context: str) -> int:
    if not store.has_context(context):
        return 0
    with store.open_reader(context) as reader:
        return reader.version.num_blocks


def done(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, error = process.communicate(timeout=240)
    return process.returncode, out + error


HOLD = """
import sys
from actors.crew import Crew
from actors.plan import plan_models
from actors.tree_store import TreeStoreSpec
from cluster.config import CompactJob
from cluster.config_parser import parse_job
from cluster.environment import absolute_paths
from cluster.ray_runtime import ray_session

job = absolute_paths(parse_job(CompactJob, sys.argv[1:]))
plan = plan_models(job.base_lm, job.gistnet, job.store)
with ray_session(job.ray), Crew(TreeStoreSpec(job.store, plan.identity, plan.encoding, owner="a patient job"), job.ray):
    print("attached", flush=True)
    sys.stdin.read()
"""
"""A driver that attaches to a context and does nothing more."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_drivers_write_side_by_side_and_never_the_same_context(door: Door) -> None:
    words = ["--config", "configs/tiny.yaml", "--store.context", "held", "--store.service", "require"]
    environment = door.environment | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, *words], cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "attached\n"
        (held,) = [row for actor in door.run("store", "status")["actors"] for row in actor["contexts"]]
        assert (held["context"], held["held_by"]) == ("held", "a patient job")
        (code, text), (refused, why) = map(done, [door.compact("one"), door.compact("held")])
        assert code == 0, text
        assert refused == 5, why
        assert "context 'held' is being written by a patient job through the store's service" in why
    finally:
        holder.kill()
        holder.communicate()
    code, text = done(door.compact("held"))
    assert code == 0, text
    store = Store(door.root)
    with store.open_reader("one") as left, store.open_reader("held") as right:
        assert left.version.num_blocks > 500
        assert_same_tree(left, right)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_service_outlives_a_killed_driver_which_resumes_by_the_same_command(door: Door) -> None:
    first = door.compact("one")
    store = Store(door.root)
    deadline = time.monotonic() + 120
    while num_blocks(store, "one") == 0:
        assert first.poll() is None, done(first)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    done(first)
    stopped_at = [commit.seq for commit in History(store.folder("one"), "one").log("main", 1)]
    code, text = done(door.compact("one"))
    assert code == 0, text
    with store.open_reader("one") as reader:
        assert reader.version.seq > stopped_at[0]
        assert len(reader.documents()) == 4
    assert verify_context(store.folder("one"), "one").problems == []
    assert [info.epoch for info in store.contexts()] == [2], "the same service, under a new epoch"
