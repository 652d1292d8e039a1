"""The curation jobs, as they are called from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ray_job
from cluster.cli import main
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.environment import PROJECT_ROOT
from storage.focus.events import FocusEvent, FocusEventLog
from storage.store import Store
from tests.storage.support import CONTEXT, Text, encoding_of, new_store, open_context
from tests.storage.version_support import holds, is_sound, write_and_seal

ENCODING = encoding_of("float16")
ONE, TWO = Text("one", 128 * K), Text("two", 64 * K - 7)
OWN_USES = ("--policy.document_days", "0", "--policy.min_age_days", "0")
"""What is used is kept and the rest goes, new or not."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    new_store(tmp_path / "store", ENCODING)
    with open_context(tmp_path / "store") as writer:
        write_and_seal(writer, ONE, TWO)
    log = FocusEventLog(tmp_path / "store" / CONTEXT)
    used = [(40, 0)]
    log.add(FocusEvent("s", 0, "question", "{}", [(CONTEXT, 1)], 0, 0, 0, [], {(40, 0): 1.0}, used, [], used, [], 0))
    log.flush()
    return tmp_path / "store"


def words(root: Path, *given: str) -> list[str]:
    where = ["--store.root", str(root), "--store.context", CONTEXT]
    if given[1] != "restore":
        where += ["--run.dir", str(root.parent / "runs"), "--tracking.enabled", "false"]
    return [*given, *where]


def run(root: Path, *given: str) -> int:
    return main(ray_job.JOBS, words(root, *given))


def report(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root.parent / "runs" / name / "report.json").read_text())


def whole(root: Path) -> list[int]:
    with Store(root).open_reader(CONTEXT) as reader:
        return np.flatnonzero(reader.block_states(0, 192).reshape(-1, 32).max(axis=1) == 0).tolist()


def test_a_plan_is_made_looked_at_applied_and_undone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, "curate", "report", *OWN_USES) == 0
    found = report(root, "curate-report")
    assert (found["spans"], found["spans_useful"], found["spans_never_used"]) == (6, 1, 5)
    assert (root.parent / "runs" / "curate-report" / "usage.png").stat().st_size > 1000
    assert run(root, "curate", "plan", *OWN_USES) == 0
    assert report(root, "curate-plan")["planned"]["archive"] == 5
    plan = str(root.parent / "runs" / "curate-plan" / "plan.json")
    assert run(root, "curate", "apply", "--plan", plan) == 0
    assert "nothing was changed" in capsys.readouterr().out
    holds(root, ONE, TWO)
    assert run(root, "curate", "apply", "--plan", plan, "--apply", "true") == 0
    assert whole(root) == [1]
    done = report(root, "curate-apply")
    assert done["after"]["blocks_by_state"] == {"whole": 32, "gist_only": 160, "tombstoned": 0, "speculative": 0}
    assert done["after"]["archive_bytes"] > 0
    is_sound(root)
    capsys.readouterr()
    asked = ["curate", "restore", "--documents", '["*two"]', "--json", "true"]
    assert run(root, *asked) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == 64
    assert whole(root) == [1]
    assert run(root, *asked, "--apply", "true") == 0
    assert whole(root) == [1, 4, 5]
    assert run(root, "curate", "restore", "--apply", "true") == 0
    holds(root, ONE, TWO)
    is_sound(root)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["curate", "plan", "--policy.half_life", "3"], "half_life_days"),
        (["curate", "plan", "--policy.compact_utility", "3"], "must not be above"),
        (["curate", "plan", "--policy.document_days", "-1"], "document_days=-1.0 must not be negative"),
        (["curate", "plan", "--policy.storing_uses", "-1"], "storing_uses=-1.0 must not be negative"),
        (["curate", "apply", "--plan", "none.json"], "cannot be read"),
        (["curate", "restore", "--documents", "[nobody]"], "fits 'nobody'"),
        (["curate", "watch", "--every_s", "0"], "must be more than 0"),
    ],
)
def test_what_makes_no_sense_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str], given: list[str], match: str
) -> None:
    assert run(root, *given) != 0
    assert match in capsys.readouterr().err
    holds(root, ONE, TWO)


def test_watching_goes_on_beside_another_writer_and_says_what_it_met(root: Path) -> None:
    given = ("curate", "watch", "--rounds", "2", "--every_s", "0.5", *OWN_USES)
    fast = ("--policy.retention_days", "0", "--pace.wait_s", "0.1", "--keep_days", "0")
    with open_context(root):
        assert run(root, *given, *fast) == 0
    assert whole(root) == list(range(6))
    assert report(root, "curate-watch")["rounds"] == 2
    assert "is being written by another process" in (root.parent / "runs" / "curate-watch" / "job.log").read_text()
    assert run(root, *given, *fast) == 0
    found = report(root, "curate-watch")
    assert (found["done"]["archive"], found["after"]["token_bytes_sealed"]) != (
        0,
        found["before"]["token_bytes_sealed"],
    )
    assert whole(root) == [1]
    is_sound(root)


def test_a_killed_curation_is_sound_and_the_same_command_finishes_it(root: Path) -> None:
    assert run(root, "curate", "plan", *OWN_USES) == 0
    plan = str(root.parent / "runs" / "curate-plan" / "plan.json")
    given = ("curate", "apply", "--plan", plan, "--apply", "true", "--pace.spans_per_commit", "1")
    command = [sys.executable, "ray_job.py", *words(root, *given, "--pace.pause_s", "60")]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(whole(root)) == 6:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert len(whole(root)) == 5
    is_sound(root)
    assert run(root, *given, "--pace.pause_s", "0") == 0
    assert whole(root) == [1]
    found = report(root, "curate-apply")
    assert (found["done"]["archive"], found["there_already"]) == (4, 1)
    is_sound(root)
