"""Moments of AdamW, whole: between numbers of workers, ZeRO stages and files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from actors.training.optimiser_state import FILE, OptimiserState
from cluster.environment import PROJECT_ROOT
from cluster.errors import ModelError

STAGES = (0, 1, 2, 3)
HALF, WHOLE = 4, 8


def in_workers(num_workers: int, folder: Path, runs: list[str]) -> None:
    """`sharded_steps` on several workers."""
    command = [sys.executable, "-m", "tests.actors.training.sharded_steps"]
    arguments = [str(num_workers), str(folder / f"rendezvous-{num_workers}-{len(runs)}"), *runs]
    workers = [
        subprocess.Popen([*command, str(rank), *arguments], cwd=PROJECT_ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(num_workers)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every stage on one and two workers, each begun fresh, each gone on from half of one-worker stage 0;
    of every stage on one worker gone on from its own half; and of stage 0 from half of two-worker stage 3."""
    folder = tmp_path_factory.mktemp("moments")
    for workers in (1, 2):
        runs = [f"0,,{HALF},{folder}/half", f"0,,{WHOLE},{folder}/whole"] if workers == 1 else []
        for stage in STAGES:
            runs.append(f"{stage},,{WHOLE},{folder}/fresh-{workers}-{stage}")
            runs.append(f"{stage},{folder}/half,{WHOLE},{folder}/resumed-{workers}-{stage}")
            if workers == 1:
                runs.append(f"{stage},,{HALF},{folder}/half-1-{stage}")
                runs.append(f"{stage},{folder}/half-1-{stage},{WHOLE},{folder}/same-1-{stage}")
        if workers == 2:
            runs.append(f"3,,{HALF},{folder}/half-2-3")
        in_workers(workers, folder, runs)
    in_workers(1, folder, [f"0,{folder}/half-2-3,{WHOLE},{folder}/back-1-0"])
    return folder


def everything(folder: Path) -> dict[str, Tensor]:
    """Weights and moments."""
    return load_file(folder / "weights.safetensors") | dict(OptimiserState.load(folder).moments)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("begun", ["fresh", "resumed"])
def test_every_stage_and_number_of_workers_comes_to_the_same(
    folder: Path, begun: str, workers: int, stage: int
) -> None:
    expected, found = everything(folder / "whole"), everything(folder / f"{begun}-{workers}-{stage}")
    assert set(found) == set(expected)
    assert len(expected) == 3 * 5  # five weights, two moments each
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert OptimiserState.load(folder / f"{begun}-{workers}-{stage}").step == WHOLE


def test_shards_of_two_workers_go_on_as_one(folder: Path) -> None:
    expected, found = everything(folder / "whole"), everything(folder / "back-1-0")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("stage", STAGES)
def test_going_on_is_bit_for_bit_on_one_worker(folder: Path, stage: int) -> None:
    fresh, resumed = (everything(folder / f"{begun}-1-{stage}") for begun in ("fresh", "same"))
    assert all(torch.equal(resumed[name], fresh[name]) for name in fresh)


def test_the_steps_did_something(folder: Path) -> None:
    half, whole = everything(folder / "half"), everything(folder / "whole")
    assert all((half[name] - whole[name]).abs().max() > 1e-3 * whole[name].abs().max() for name in whole)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    OptimiserState(3, {"w/exp_avg": torch.ones(2)}).save(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=rf"{FILE} cannot be read .*; delete the folder"):
        OptimiserState.load(tmp_path)
    with pytest.raises(ModelError, match="cannot be read"):
        OptimiserState.load(tmp_path / "nothing-here")
