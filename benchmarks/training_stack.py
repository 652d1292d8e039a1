"""A training step through Ray Data, Ray Train and DeepSpeed against the same step in a bare loop."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from actors.training.engine import learning_rate_share, parameter_groups
from actors.training.order import ReadingOrder
from actors.training.sources import CorpusWindows
from actors.training.windows import windows_folder
from benchmarks.corpus import corpus_files, open_files
from benchmarks.harness import BenchmarkError, Result, Setting, median_ratio, percentiles, say
from cluster.config import CorpusConfig, GistNetConfig, RayConfig, RunConfig, TrackingConfig
from cluster.training_config import TrainGistNetJob, TrainingConfig, WindowsConfig
from models.base_lm import BaseLM, choose_dtype
from models.gistnet import build_gistnet
from models.tokenizer import Tokenizer
from models.training.corpus_statistics import MEAN_TOKENS, measure_means
from models.training.dense_pass import DensePass
from models.training.distillation import Distillation
from pipelines.train_gistnet import run
from storage.token_windows import TokenWindows

WARM_UP_STEPS = 2
SAME_FIRST_LOSS, SAME_LOSS = 1e-4, 0.02
"""Relative; above it the two did different work. Later steps drift apart by rounding: 0.3% after seven."""


def training_stack(setting: Setting) -> Result:
    """Wall time a step in steady state, same windows, cuts, threads and optimiser; losses must agree."""
    with setting.scratch() as folder:
        job = _job(setting, folder)
        say("training_stack: through the stack")
        run(job)
        lines = [json.loads(line) for line in (folder / "runs/stack/losses.jsonl").read_text().splitlines()]
        say("training_stack: in a bare loop")
        bare_s, bare_losses = _bare_loop(job)
    for line, loss in zip(lines, bare_losses, strict=True):
        allowed = SAME_FIRST_LOSS if line["step"] == 1 else SAME_LOSS
        if abs(line["loss"] - loss) > allowed * abs(loss):
            raise BenchmarkError(f"at step {line['step']} the stack's loss is {line['loss']}, the bare loop's {loss}")
    stack_s = np.array([line["step_s"] for line in lines])[WARM_UP_STEPS:]
    wait_s = np.array([line["wait_s"] for line in lines])[WARM_UP_STEPS:]
    tokens = job.windows.window_tokens * job.training.windows_per_step
    detail: dict[str, Any] = {
        "dtype": job.base_lm.dtype,
        "threads": job.training.threads_per_worker,
        "stack": percentiles(stack_s, 1e6 / tokens, "us_per_token"),
        "bare": percentiles(bare_s[WARM_UP_STEPS:], 1e6 / tokens, "us_per_token"),
        "waiting_for_data_share": round(float(wait_s.sum() / stack_s.sum()), 4),
    }
    return median_ratio(stack_s, bare_s[WARM_UP_STEPS:], "steps", detail)


def _job(setting: Setting, folder: Path) -> TrainGistNetJob:
    base_lm = setting.base_lm
    if base_lm.dtype == "auto":
        base_lm = dataclasses.replace(base_lm, dtype=choose_dtype(base_lm).dtype)
    files = corpus_files(setting, 0, setting.size(8, 2))
    return TrainGistNetJob(
        run=RunConfig(name="stack", dir=folder / "runs"),
        ray=RayConfig(address="local"),
        tracking=TrackingConfig(enabled=False),
        corpus=CorpusConfig(paths=[str(path) for path in files]),
        base_lm=base_lm,
        gistnet=GistNetConfig(lm_layers=setting.size(8, 2), key_layer=setting.size(4, 1)),
        windows=WindowsConfig(window_tokens=setting.size(1024, 256), folder=folder / "windows"),
        training=TrainingConfig(
            num_steps=WARM_UP_STEPS + setting.size(20, 5),
            windows_per_step=2,
            threads_per_worker=torch.get_num_threads(),
            warmup_steps=4,
            checkpoint_every_steps=1000,
            validate_every_steps=0,
        ),
    )


def _bare_loop(job: TrainGistNetJob) -> tuple[np.ndarray, list[float]]:
    """Seconds and loss of every step of one process with torch alone."""
    config = job.training
    torch.set_num_threads(config.threads_per_worker)
    lm = BaseLM.load(job.base_lm)
    net = build_gistnet(job.gistnet, lm).train()
    tokenizer = Tokenizer.load(job.base_lm)
    source = CorpusWindows(open_files([Path(path) for path in job.corpus.paths]), job.base_lm)
    windows = TokenWindows(windows_folder(job.windows.folder, source, tokenizer, job.windows.window_tokens))
    measure_means(lm, net, torch.from_numpy(windows.sample(MEAN_TOKENS).astype(np.int64)))
    objective = Distillation(DensePass(lm, net), job.objective)
    optimiser = AdamW(parameter_groups(objective, config), config.learning_rate, (0.9, config.beta2))
    schedule = LambdaLR(optimiser, lambda step: learning_rate_share(step, config))
    order = ReadingOrder(len(windows), config.windows_per_step, config.seed)
    seconds, losses = np.empty(config.num_steps), []
    for step in range(config.num_steps):
        started = time.perf_counter()
        passes = order.micro_batches(step, 0, 1, config.windows_per_pass)
        total = 0.0
        for batch in passes:
            seeds = [(config.seed, int(sample)) for sample in batch.samples]
            loss = objective(_ids(windows, batch.windows), seeds).loss / len(passes)
            loss.backward()
            total += float(loss.detach())
        clip_grad_norm_(objective.parameters(), config.clip_norm)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        seconds[step] = time.perf_counter() - started
        losses.append(total)
    return seconds, losses


def _ids(windows: TokenWindows, which: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(windows.read(which).astype(np.int64))
