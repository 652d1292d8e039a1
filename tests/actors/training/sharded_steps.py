"""A few optimiser steps of a small module on several workers: a program, as every worker is a process."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from actors.training.engine import DeepSpeedEngine
from actors.training.optimiser_state import OptimiserState
from cluster.training_config import TrainingConfig

WIDTH, HIDDEN, ROWS_PER_STEP = 5, 330, 8
"""5: so that shards are padded. 330: the square is more than the 100,000 elements that ZeRO 3 keeps whole."""


class Model(nn.Module):
    """Matrices, gains and a weight of odd size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, HIDDEN)
        self.middle = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.second = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.gain = nn.Parameter(torch.full((1, 1), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * self.second(self.middle(self.first(x).tanh()).tanh())


def batch(step: int) -> torch.Tensor:
    """What a step reads, over all workers."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS_PER_STEP, WIDTH, generator=generator)


def config(stage: int, num_workers: int) -> TrainingConfig:
    """Large steps and decay, so that one too many shows."""
    return TrainingConfig(
        num_steps=20,
        warmup_steps=2,
        windows_per_step=ROWS_PER_STEP,
        windows_per_pass=ROWS_PER_STEP // num_workers // 2,  # two passes a step
        num_workers=num_workers,
        learning_rate=0.01,
        weight_decay=0.5,
        zero_stage=stage,  # type: ignore[arg-type]
    )


def run(stage: int, begin: Path | None, num_steps: int, end: Path) -> None:
    """Steps up to `num_steps`, from a folder that another run left, into a folder."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    model, state = Model(), None
    if begin is not None:
        model.load_state_dict(load_file(begin / "weights.safetensors"))
        state = OptimiserState.load(begin)
    engine = DeepSpeedEngine(model, config(stage, workers), state)
    rows = ROWS_PER_STEP // workers // 2
    for step in range(engine.num_steps, num_steps):
        passes = batch(step).view(2, workers, rows, WIDTH)[:, rank]
        for own in passes:
            engine.backward((engine(own) - own.roll(1, dims=1)).square().mean())
            engine.step()
        assert engine.num_steps == step + 1
    found = engine.state()
    with engine.whole_weights():
        if found is not None:
            found.save(end)
            save_file({name: w.detach().clone() for name, w in model.state_dict().items()}, end / "weights.safetensors")
    dist.barrier()


def main() -> None:
    """`RANK WORKERS RENDEZVOUS STAGE,BEGIN,STEPS,END ...`; an empty BEGIN is a fresh run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rank", type=int)
    parser.add_argument("num_workers", type=int)
    parser.add_argument("rendezvous", type=Path)
    parser.add_argument("runs", nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(given.rank)  # as a launcher would
    logging.disable(logging.WARNING)
    method = f"file://{given.rendezvous}"
    dist.init_process_group("gloo", init_method=method, rank=given.rank, world_size=given.num_workers)
    for described in given.runs:
        stage, begin, num_steps, end = described.split(",")
        run(int(stage), Path(begin) if begin else None, int(num_steps), Path(end))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
