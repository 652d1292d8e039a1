"""Checkpoints are there whole or not at all; the loss log goes back to where they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.training.checkpoints import COMPLETE, Checkpoints, Divergence, LossLog
from actors.training.fidelity import best_step


def saved(checkpoints: Checkpoints, *steps: int, complete: bool = True, own: float | None = None) -> None:
    for step in steps:
        checkpoints.path(step).mkdir(parents=True)
        (checkpoints.path(step) / "weights").write_text("w")
        if complete:
            measured = None if own is None else {"step": step, "own": [own, 9.0], "num_tokens": [3, 0]}
            checkpoints.complete(step, {"step": step, "fidelity": measured})


def test_what_was_not_completed_is_not_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == []
    assert checkpoints.newest_step() == 0
    saved(checkpoints, 10, 200)
    saved(checkpoints, 300, complete=False)
    assert checkpoints.steps() == [10, 200]
    assert checkpoints.newest_step() == 200
    assert checkpoints.facts(10) == {"step": 10, "fidelity": None}


def test_old_ones_go_and_the_best_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step, own in ((1, 3.0), (2, 2.0), (3, 2.5), (4, 2.7)):
        saved(checkpoints, step, own=own)
    saved(checkpoints, 0, 5, complete=False)  # one a death left behind, one that is being written
    assert best_step(checkpoints) == 2
    checkpoints.drop_old(1, also=2)
    assert checkpoints.steps() == [2, 4]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "step-00000004", "step-00000005"}
    checkpoints.drop_old(5)
    assert checkpoints.steps() == [2, 4]


def test_a_checkpoint_that_was_not_measured_is_not_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    saved(checkpoints, 1)
    assert best_step(checkpoints) is None
    saved(checkpoints, 2, own=2.0)
    saved(checkpoints, 3)
    # Measured at step 2 and written down again with the next one.
    checkpoints.complete(3, {"step": 3, "fidelity": checkpoints.facts(2)["fidelity"]})
    assert best_step(checkpoints) == 2


def test_the_loss_log_is_cut_back_to_a_step(tmp_path: Path) -> None:
    log = LossLog(tmp_path / "losses.jsonl")
    assert log.read() == []
    log.cut_back(0)
    for step in range(1, 6):
        log.append({"step": step, "loss": 0.1 * step})
    log.sync()
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in log.read()] == [1, 2, 3, 4, 5]
    log.cut_back(3)
    log.append({"step": 4, "loss": 1 / 3})
    assert [line["step"] for line in log.read()] == [1, 2, 3, 4]
    assert log.read()[-1]["loss"] == 1 / 3  # every bit of it
    assert log.path.read_text().count("\n") == 4


def test_a_divergence_is_remembered_until_it_is_forgotten(tmp_path: Path) -> None:
    divergence = Divergence(tmp_path / "diverged")
    assert divergence.step() is None
    divergence.happened(17)
    assert Divergence(tmp_path / "diverged").step() == 17
    divergence.forget()
    divergence.forget()
    assert divergence.step() is None


def test_a_checkpoint_without_its_mark_may_be_read_by_nobody(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    saved(checkpoints, 1, complete=False)
    with pytest.raises(FileNotFoundError, match=COMPLETE):
        checkpoints.facts(1)
