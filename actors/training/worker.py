"""What every Ray Train worker does: read, step, write down, save; and go on where the run stood.

One worker's death ends the others; Ray Train starts all of them anew, and they begin at the newest checkpoint. Losses
of the steps in between come out the same again, because everything they depend on is a function of the step.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist

from actors.training.checkpoints import Checkpoints, Divergence, LossLog
from actors.training.engine import DeepSpeedEngine
from actors.training.feed import DATASET, fed_batches
from actors.training.fidelity import FidelityTable, best_step
from actors.training.optimiser_state import OptimiserState
from cluster.config import BaseLMConfig
from cluster.errors import ModelError
from cluster.heap import keep_freed_memory
from cluster.training_config import ObjectiveConfig, TrainingConfig
from models.adapter import SavedAdapter
from models.base_lm import BaseLM
from models.gistnet import GistNet
from models.training.corpus_statistics import (
    COUNTED_TOKENS,
    KEY_TOKENS,
    MEAN_TOKENS,
    measure_keys,
    measure_keywords,
    measure_means,
)
from models.training.dense_pass import DensePass
from models.training.distillation import Distillation, StepLosses
from models.training.flops import flops_per_window, peak_flops
from storage.token_windows import TokenWindows

TRAINED_MODULE = "gistnet"
"""Attribute of `Distillation` that holds the net."""

TRAINED_ADAPTER = "adapter"
"""The one that holds the weights of the reader's adapter, where there is one."""

GISTNET = "gistnet"
"""Folder of a checkpoint that holds the net alone, as safetensors."""

ADAPTER = "adapter"
"""Folder of a checkpoint that holds the reader's adapter alone, in peft's format."""
LOSS_LOG, FIDELITY, PAIRS = "losses.jsonl", "fidelity.jsonl", "fidelity_pairs.jsonl"
"""Files of a run: a line a step, a line a validation, and the same pair of windows by pair."""

STAGES = ("wait", "teacher", "gists", "student", "head", "backward", "optimiser")
"""Of a step, in order; losses.jsonl has the seconds of each. `wait`: for data."""

LOSSES = ("loss", "kl", "nll", "states", "repeat", "spread", "inner")
"""Of `StepLosses`, those that are in losses.jsonl where the objective asks for them."""


@dataclass(frozen=True)
class TrainerSpec:
    """Everything a worker needs."""

    base_lm: BaseLMConfig
    """With an explicit dtype."""
    objective: ObjectiveConfig
    training: TrainingConfig
    window_tokens: int
    windows: Path
    """Folder of the windows that are trained on."""
    validation: Path | None
    """Folder of the validation windows."""
    num_validation: int
    folder: Path
    """Of the run."""
    num_threads: int

    @property
    def checkpoints(self) -> Checkpoints:
        """Of the run."""
        return Checkpoints(self.folder / "checkpoints")

    @property
    def loss_log(self) -> LossLog:
        """Of the run."""
        return LossLog(self.folder / LOSS_LOG)

    @property
    def divergence(self) -> Divergence:
        """Of the run."""
        return Divergence(self.folder / "diverged")

    def best_step(self) -> int | None:
        """The checkpoint that is best by what the run asks for; None before any was measured."""
        return best_step(self.checkpoints, by_repeating=self.objective.repeat_share == 1)

    @property
    def fidelity_log(self) -> LossLog:
        """What was measured on the validation windows."""
        return LossLog(self.folder / FIDELITY)

    @property
    def pairs_log(self) -> LossLog:
        """The same, pair of windows by pair: lists of as many rows."""
        return LossLog(self.folder / PAIRS)


def train(config: dict[str, Any]) -> None:
    """Ray Train's function: `config` holds a `TrainerSpec`, and the net and the adapter to begin with."""
    gistnet, adapter = ray.get(config["begun_ref"])
    Trainer(config["spec"], gistnet, adapter).run(ray.train.get_dataset_shard(DATASET))


class Trainer:
    """One worker's part of a run."""

    def __init__(self, spec: TrainerSpec, gistnet: GistNet, adapter: SavedAdapter | None) -> None:
        torch.set_num_threads(spec.num_threads)
        keep_freed_memory()
        self.spec = spec
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self.rank = dist.get_rank()
        self.lm = BaseLM.load(spec.base_lm)
        self.first_step = spec.checkpoints.newest_step()
        state = None
        if self.first_step:
            gistnet, adapter, state = resumed(spec.checkpoints.path(self.first_step), gistnet, adapter)
        net = gistnet.to(self.lm.device).train()
        if state is None and not any(mean.any() for mean in net.buffers()):
            windows = TokenWindows(spec.windows)
            measure_means(self.lm, net, self._ids(windows.sample(MEAN_TOKENS)))
            measure_keys(self.lm, net, self._ids(windows.sample(KEY_TOKENS)))
            counts = np.bincount(windows.sample(COUNTED_TOKENS).ravel(), minlength=self.lm.vocab_size)
            measure_keywords(self.lm, net, torch.from_numpy(counts))
        if adapter is not None:
            self.lm.adapt(adapter, trained=True)
        self.objective = Distillation(DensePass(self.lm, net), spec.objective)
        self._window_flops = flops_per_window(self.lm, net, spec.window_tokens, spec.objective)
        self.engine = DeepSpeedEngine(self.objective, spec.training, state)
        dist.barrier()  # all workers measure at the same time, as they compute
        self._peak_flops = peak_flops(self.lm.device, self.lm.dtype)
        if self.rank == 0:
            spec.loss_log.cut_back(self.first_step)
            spec.fidelity_log.cut_back(self.first_step)
            spec.pairs_log.cut_back(self.first_step)
        self._validation = None if spec.validation is None else TokenWindows(spec.validation)

    def run(self, iterator: Any) -> None:
        """From the newest checkpoint to the run's end."""
        config = self.spec.training
        clock = self.objective.clock
        losses: list[StepLosses] = []
        done = self.first_step
        started = time.perf_counter()
        clock.restart()
        for batch in fed_batches(iterator, self.spec.window_tokens):
            clock.lap("wait")
            if batch.step != done:
                raise ModelError(f"worker {self.rank} was fed step {batch.step}, the run is at {done}")
            self.objective.progress = batch.step / config.num_steps
            found: StepLosses = self.engine(self._ids(batch.tokens), self._seeds(batch.samples))
            self.engine.backward(found.loss)
            clock.lap("backward")
            losses.append(replace(found, loss=found.loss.detach()))
            is_last = self.engine.step()
            clock.lap("optimiser")
            if not is_last:
                continue
            done = batch.step + 1
            line = self._reduced(done, losses, clock.seconds(), time.perf_counter() - started)
            # DeepSpeed calls the length of a gradient that is not finite -1.
            if not math.isfinite(line["loss"]) or not 0 <= line["gradient_norm"] < math.inf:
                # No error of this worker's, or Ray Train would try the same again.
                if self.rank == 0:
                    self.spec.divergence.happened(done)
                return
            if self.rank == 0:
                self.spec.loss_log.append(line)
            if self._due(done, config.validate_every_steps) or done == config.num_steps:
                self._validate(done)
            if self._due(done, config.checkpoint_every_steps) or done == config.num_steps:
                self._save(done)
            losses, started = [], time.perf_counter()
            clock.restart()

    def _ids(self, tokens: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(tokens.astype(np.int64))
        if self.lm.device.type == "cuda":
            return ids.pin_memory().to(self.lm.device, non_blocking=True)
        return ids

    def _seeds(self, samples: Sequence[int] | np.ndarray) -> list[tuple[int, int]]:
        return [(self.spec.training.seed, int(sample)) for sample in samples]

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return bool(every) and step % every == 0

    def _reduced(
        self, step: int, found: Sequence[StepLosses], stages: Mapping[str, float], step_s: float
    ) -> dict[str, float]:
        """A step's line: means over all workers, and the most memory of any."""
        # What the objective does not ask for is in no step's losses.
        names = [name for name in LOSSES if getattr(found[0], name) is not None]
        own = [sum(float(getattr(losses, name)) for losses in found) / len(found) for name in names]
        own += [step_s, *(stages.get(stage, 0.0) for stage in STAGES)]
        values = torch.tensor(own, dtype=torch.float64, device=self.lm.device)
        dist.all_reduce(values)
        memory = torch.tensor(peak_memory(self.lm.device), dtype=torch.float64, device=self.lm.device)
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        means = (values / dist.get_world_size()).tolist()
        tokens_s = self.spec.training.windows_per_step * self.spec.window_tokens / step_s
        return {
            "step": step,
            **dict(zip((*names, "step_s", *(f"{stage}_s" for stage in STAGES)), means, strict=True)),
            "tokens_s": tokens_s,
            "mfu": tokens_s / self.spec.window_tokens * self._window_flops / (self._peak_flops * dist.get_world_size()),
            "memory_gib": memory.item() / 2**30,
            "gradient_norm": self.engine.gradient_norm,
            "learning_rate": self.engine.learning_rate,
        }

    def _validate(self, step: int) -> None:
        """Every worker measures its share; worker 0 writes down the mean, and the parts of it."""
        if self._validation is None:
            return
        spec = self.spec
        count = min(spec.num_validation, len(self._validation))
        chosen = np.unique(np.linspace(0, len(self._validation) - 1, count).astype(np.int64))
        # Pairs, because a window's shuffled gists are its partner's.
        pairs = [chosen[first : first + 2] for first in range(0, len(chosen) - 1, 2)]
        self.objective.eval()
        table = FidelityTable(len(pairs), spec.objective.max_tail_blocks, self.lm.device)
        workers = dist.get_world_size()
        for first in range(0, len(pairs), workers):
            # All come equally often: under ZeRO 3 every pass gathers weights from all. Who is left over does one again.
            own = first + self.rank
            pair = pairs[own % len(pairs)]
            seeds = [(spec.training.seed, int(window)) for window in pair]
            found = self.objective.fidelity(self._ids(self._validation.read(pair)), seeds)
            if own < len(pairs):
                table.add(own, found)
        self.objective.train()
        table.gather()
        if self.rank == 0:
            spec.fidelity_log.append({"step": step, **table.means()})
            spec.pairs_log.append({"step": step, "windows": [pair.tolist() for pair in pairs], **table.rows()})

    def _save(self, step: int) -> None:
        spec = self.spec
        path = spec.checkpoints.path(step)
        state = self.engine.state()
        with self.engine.whole_weights():
            if self.rank == 0:
                self.objective.gistnet.save(path / GISTNET)
                if self.lm.adapter is not None:
                    self.lm.adapter.saved().save(path / ADAPTER)
        if state is not None:
            state.save(path)
            spec.loss_log.sync()
            spec.fidelity_log.sync()
            spec.pairs_log.sync()
            measured = spec.fidelity_log.read()
            spec.checkpoints.complete(step, {"step": step, "fidelity": measured[-1] if measured else None})
            spec.checkpoints.drop_old(spec.training.keep_checkpoints, spec.best_step())
        dist.barrier()


def resumed(
    path: Path, begun: GistNet, begun_adapter: SavedAdapter | None
) -> tuple[GistNet, SavedAdapter | None, OptimiserState]:
    """The net, the reader's adapter where the run was begun with one, and the optimiser of a checkpoint.

    Raises:
        ModelError: it is damaged, or of another net or adapter than the run was begun with.
    """
    try:
        net, state = GistNet.load(path / GISTNET), OptimiserState.load(path)
        adapter = None if begun_adapter is None else SavedAdapter.load(path / ADAPTER)
    except ModelError as error:
        raise ModelError(f"{error}; delete {path} to go on from an older checkpoint") from error
    if net.spec != begun.spec:
        raise ModelError(
            f"the checkpoint {path} is of {net.spec}, this run of {begun.spec}; give it another --run.name"
        )
    shapes = {f"{TRAINED_MODULE}.{name}": tuple(weight.shape) for name, weight in net.named_parameters()}
    if adapter is not None and begun_adapter is not None:
        if not adapter.is_like(begun_adapter):
            raise ModelError(
                f"the adapter of the checkpoint {path} is of another run; delete it to go on from an older one"
            )
        shapes |= {f"{TRAINED_ADAPTER}.{name}": shape for name, shape in adapter.shapes.items()}
    try:
        state.check(shapes)
    except ModelError as error:
        raise ModelError(
            f"the checkpoint {path} does not fit this run: {error}; delete it to go on from an older one"
        ) from error
    return net, adapter, state


def peak_memory(device: torch.device) -> float:
    """Bytes: the most this process has held on its GPU, or, on a CPU, in memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts KiB
