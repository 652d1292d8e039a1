"""Runs of `train gistnet` on the tiny model, and what of their losses is compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.training.checkpoints import LossLog
from cluster.config import BaseLMConfig, CorpusConfig, GistNetConfig, RunConfig, TrackingConfig
from cluster.training_config import ObjectiveConfig, TrainGistNetJob, TrainingConfig, WindowsConfig
from tests.actors.helpers import make_text

NUM_STEPS = 30
COMPARED = ("step", "loss", "kl", "nll", "spread", "gradient_norm", "learning_rate")

JobFactory = Callable[..., TrainGistNetJob]


def write_corpus(folder: Path) -> Path:
    """Two dozen documents in `corpus`."""
    (folder / "corpus").mkdir()
    for index in range(24):
        (folder / "corpus" / f"doc{index}.txt").write_text(make_text(index, 250))
    return folder


def training_job(root: Path, lm: BaseLMConfig, name: str, **training: Any) -> TrainGistNetJob:
    """A job on that corpus; keyword arguments replace fields of the training section."""
    fields: dict[str, Any] = {
        "num_steps": NUM_STEPS,
        "windows_per_step": 4,
        "threads_per_worker": 1,
        "learning_rate": 0.0025,  # of the wide layers of so small a net 0.001
        "warmup_steps": 3,
        "checkpoint_every_steps": 7,
        "validate_every_steps": 10,
    }
    return TrainGistNetJob(
        run=RunConfig(name=name, dir=root / "runs"),
        tracking=TrackingConfig(enabled=False),
        corpus=CorpusConfig(paths=[str(root / "corpus")], split="train"),
        base_lm=lm,
        gistnet=GistNetConfig(lm_layers=2, key_layer=1),
        windows=WindowsConfig(window_tokens=256, folder=root / "windows", num_validation=4),
        objective=ObjectiveConfig(max_tail_blocks=3),
        training=TrainingConfig(**{**fields, **training}),
    )


def losses(root: Path, name: str) -> list[dict[str, float]]:
    """A line a step."""
    return LossLog(root / "runs" / name / "losses.jsonl").read()


def what_counts(lines: list[dict[str, float]]) -> list[tuple[float, ...]]:
    """Everything but times."""
    return [tuple(line[name] for name in COMPARED) for line in lines]
