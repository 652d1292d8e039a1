from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from cluster.cli import Job, main
from cluster.config import RunConfig, StoreConfig
from cluster.errors import ContextNotFoundError

received: list[object] = []


@dataclass(frozen=True)
class SmallJob:
    """Do something small.

    And more about it."""

    run: RunConfig = field(default_factory=RunConfig)
    """Run."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Store."""


def works(job: SmallJob) -> None:
    received.append(job)


def returns_three(job: SmallJob) -> int:
    return 3


def refuses(job: SmallJob) -> None:
    raise ContextNotFoundError("no context 'x' in the store")


def refuses_in_a_worker(job: SmallJob) -> None:
    error = RayTaskError("f", "Traceback of the worker", ContextNotFoundError("no context 'x'"), pid=1, ip="x")
    raise error.as_instanceof_cause()


def is_interrupted(job: SmallJob) -> None:
    raise KeyboardInterrupt


def has_a_bug(job: SmallJob) -> None:
    raise ZeroDivisionError("a bug")


JOBS = [
    Job("works", SmallJob, f"{__name__}:works"),
    Job("three", SmallJob, f"{__name__}:returns_three"),
    Job("refuses", SmallJob, f"{__name__}:refuses"),
    Job("worker", SmallJob, f"{__name__}:refuses_in_a_worker"),
    Job("interrupted", SmallJob, f"{__name__}:is_interrupted"),
    Job("bug", SmallJob, f"{__name__}:has_a_bug"),
    Job("group one", SmallJob, f"{__name__}:works"),
    Job("group two", SmallJob, f"{__name__}:returns_three"),
    Job("missing", SmallJob, "no_such_module_anywhere:run"),
]


def test_a_job_gets_its_configuration_with_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    received.clear()
    assert main(JOBS, ["works", "--store.context", "here", "--run.dir", "some/../runs"]) == 0
    (job,) = received
    assert isinstance(job, SmallJob)
    assert job.store.context == "here"
    assert job.run.dir == tmp_path / "runs"
    assert job.store.root == tmp_path / "data/store"


def test_a_job_of_several_words_is_chosen_by_all_of_them() -> None:
    assert main(JOBS, ["group", "one"]) == 0
    assert main(JOBS, ["group", "two"]) == 3


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_overview_has_one_line_a_job(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(JOBS, words) == (0 if words else 2)
    captured = capsys.readouterr()
    lines = (captured.out if words else captured.err).splitlines()
    for job in JOBS:
        assert f"  {job.command:<11}  Do something small." in lines


def test_a_group_lists_its_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(JOBS, ["group"]) == 2
    text = capsys.readouterr().err
    assert "group one" in text
    assert "works" not in text
    assert main(JOBS, ["group", "--help"]) == 0


def test_an_unknown_job_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(JOBS, ["wroks"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: unknown job 'wroks'; did you mean 'works'?")
    assert "group one, group two, missing" in text
    assert main(JOBS, ["group", "tow"]) == 2
    assert "did you mean 'group two'?" in capsys.readouterr().err


def test_our_own_errors_are_one_line_and_their_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(JOBS, ["refuses"]) == 5
    assert capsys.readouterr().err == "error: no context 'x' in the store\n"


def test_our_own_errors_from_a_worker_lose_rays_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(JOBS, ["worker"]) == 5
    assert capsys.readouterr().err == "error: no context 'x'\n"


def test_debug_raises_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGACONTEXT_DEBUG", "")
    with pytest.raises(ContextNotFoundError):
        main(JOBS, ["refuses", "--debug"])
    assert main(JOBS[:1], ["works"]) == 0


def test_an_impossible_value_is_refused_before_the_job_is_imported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(JOBS, ["missing", "--store.segment_super_blocks", "3"]) == 2
    assert "store.segment_super_blocks=3 must be a power of two" in capsys.readouterr().err
    assert main(JOBS, ["missing", "--store.contxt", "a"]) == 2
    assert "did you mean 'store.context'?" in capsys.readouterr().err


def test_an_interrupt_says_that_the_same_command_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(JOBS, ["interrupted", "--store.context", "a"]) == 130
    assert "the same command resumes: ray_job.py interrupted --store.context a" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        main(JOBS, ["bug"])


def test_print_config_prints_and_does_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    received.clear()
    assert main(JOBS, ["works", "--store.context", "a", "--print_config"]) == 0
    assert "context: a" in capsys.readouterr().out
    assert not received


def test_arguments_default_to_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ray_job.py", "three"])
    assert main(JOBS) == 3
