"""The training of a LensNet over measured edits: a small net, minutes of one core."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from torch.optim import AdamW

from actors.training.lens_data import MeasuredSet, batch_of
from cluster.errors import ModelError
from cluster.lens_training_config import LensNetConfig
from cluster.ray_calls import check_resources
from models.lensnet.net import LensNet, LensNetSpec, untrained_lensnet
from models.training.lens_losses import LensWeights, lens_losses

WARM_UP_SHARE = 0.05
"""Of the steps, those over which the learning rate rises."""
FINAL_SHARE = 0.02
"""Of the learning rate, what is left at the end."""
CLIP_NORM = 1.0


@dataclass(frozen=True)
class LensTrainerSpec:
    """What is trained, how."""

    net: LensNetSpec
    config: LensNetConfig
    num_threads: int = 1


class LensTrainer:
    """A net, its optimiser and its data. Plain class; `start_lens_trainer` hosts it in an actor."""

    def __init__(self, spec: LensTrainerSpec, sets: Sequence[MeasuredSet]) -> None:
        torch.set_num_threads(spec.num_threads)
        self.spec = spec
        self._sets = list(sets)
        self.net = untrained_lensnet(spec.net, spec.config.seed)
        self.net.measure(np.concatenate([found.candidates.features for found in self._sets]))
        decaying = [p for p in self.net.parameters() if p.dim() >= 2]
        others = [p for p in self.net.parameters() if p.dim() < 2]
        groups = [{"params": decaying, "weight_decay": spec.config.weight_decay}, {"params": others, "weight_decay": 0}]
        self._optimiser = AdamW(groups, spec.config.learning_rate)
        config = spec.config
        self._weights = LensWeights(
            config.regression_weight, config.preference_weight, config.balance_weight, config.temperature
        )
        self._steps_an_epoch = -(-len(self._sets) // config.contexts_per_step)
        self._step = 0

    def epoch(self) -> list[dict[str, float]]:
        """One pass over the sets in an order of its own: the losses of each step.

        Raises:
            ModelError: the loss is no longer finite.
        """
        order = np.random.default_rng((self.spec.config.seed, self._step)).permutation(len(self._sets))
        size = self.spec.config.contexts_per_step
        self.net.train()
        # Dropout is drawn from a generator of the step, so that a run is the same however it was interrupted.
        lines = [self._train([self._sets[i] for i in order[at : at + size]]) for at in range(0, len(order), size)]
        self.net.eval()
        return lines

    def _train(self, sets: Sequence[MeasuredSet]) -> dict[str, float]:
        torch.manual_seed(1_000_003 * self.spec.config.seed + self._step)
        rate = self.spec.config.learning_rate * self._rate_share()
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        batch = batch_of(sets, self.spec.net.max_score)
        scores = self.net(batch.features, batch.keys, batch.query, batch.there)
        losses = lens_losses(scores, batch, self._weights)
        self._optimiser.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP_NORM)
        self._optimiser.step()
        self._step += 1
        line = {name: float(value.detach()) for name, value in losses.items()}
        if not math.isfinite(line["loss"]):
            raise ModelError(f"the loss is no longer finite at step {self._step}; lower lensnet.learning_rate")
        return {"step": self._step, **line}

    def _rate_share(self) -> float:
        total = self._steps_an_epoch * self.spec.config.num_epochs
        warm = max(1, int(WARM_UP_SHARE * total))
        if self._step < warm:
            return (self._step + 1) / (warm + 1)
        done = (self._step - warm) / max(total - warm, 1)
        return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def trained(self) -> LensNet:
        """The net as it is now."""
        return self.net


def start_lens_trainer(spec: LensTrainerSpec, sets: Sequence[MeasuredSet]) -> Any:
    """A `LensTrainer` in an actor of its own.

    Raises:
        ResourceError: the cluster cannot hold it.
    """
    request = {"CPU": float(spec.num_threads)}
    check_resources([request], "training LensNet")
    remote: Any = ray.remote(LensTrainer)
    return remote.options(num_cpus=spec.num_threads).remote(spec, list(sets))
