"""The one class that knows DeepSpeed: from our configuration to its own, steps, checkpoints, weights.

The module that is trained holds a GistNet, perhaps an adapter, and no LM (`Distillation`), so that optimiser, shards
and checkpoints are of what is trained alone.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from actors.training.optimiser_state import OptimiserState, gather, restore
from actors.training.order import num_passes
from cluster.training_config import TrainingConfig

FINAL_SHARE = 0.1
"""Of the highest learning rate, what is left at the end."""


class DeepSpeedEngine:
    """A module under DeepSpeed, on every worker of an initialised process group."""

    def __init__(self, module: nn.Module, config: TrainingConfig, state: OptimiserState | None = None) -> None:
        """Wrap a module with the weights it begins with, and go on from what an optimiser knew when it had them.

        Raises:
            ModelError: the state is of another net.
        """
        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed
        from deepspeed.ops import __compatible_ops__

        # Compiled for a minute at the first start, for collectives a little faster than gloo's on one machine.
        __compatible_ops__["deepspeed_shm_comm"] = False
        self.module = module
        self.config = config
        self.gradient_norm = 0.0
        """Of the last step, before it was shortened."""
        self.num_steps = 0 if state is None else state.step
        """Steps taken since the run's beginning."""
        first = self.num_steps
        optimiser = AdamW(parameter_groups(module, config), config.learning_rate, (0.9, config.beta2))
        # DeepSpeed's own annotation knows torch's schedulers by a name they have no longer.
        scheduler: Any = LambdaLR(optimiser, lambda step: learning_rate_share(first + step, config))
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimiser,
            lr_scheduler=scheduler,
            config=deepspeed_config(config, dist.get_world_size()),
            dist_init_required=False,
        )
        restore(self._engine, module, state or OptimiserState(0, {}))

    def __call__(self, *inputs: Any) -> Any:
        """The module's output."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Gradients of one forward pass; averaged over the passes and workers of a step."""
        self._engine.backward(loss)

    def step(self) -> bool:
        """After every pass; whether it was a step's last, and the weights have moved."""
        is_last = bool(self._engine.is_gradient_accumulation_boundary())
        if is_last and self.config.zero_stage == 0:
            # Without ZeRO DeepSpeed shortens gradients and does not say from where.
            self.gradient_norm = float(get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))
        self._engine.step()
        self.num_steps += is_last
        if is_last and self.config.zero_stage > 0:
            self.gradient_norm = float(self._engine.get_global_grad_norm() or 0.0)
        return is_last

    @property
    def learning_rate(self) -> float:
        """Of the next step, the highest of any weight."""
        return float(max(self._engine.get_lr()))

    def state(self) -> OptimiserState | None:
        """What the optimiser knows, on worker 0; None on the others. All workers must come."""
        return gather(self._engine, self.module, self.num_steps)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside, every worker's module has its weights whole, also under ZeRO-3. All workers must come."""
        import deepspeed

        sharded = self.config.zero_stage == 3
        with deepspeed.zero.GatheredParameters(list(self.module.parameters()), enabled=sharded):
            yield


def deepspeed_config(config: TrainingConfig, num_workers: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. The net computes in float32 whatever the LM does: see `GistNet`."""
    return {
        "train_micro_batch_size_per_gpu": config.windows_per_pass,
        "gradient_accumulation_steps": num_passes(config.windows_per_step, num_workers, config.windows_per_pass),
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "steps_per_print": 2**31,
    }


def parameter_groups(module: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """What AdamW is to do with which weights. Matrices decay; gains, constants and biases do not.

    AdamW moves every weight by about the learning rate, so that what a linear layer puts out moves by that times its
    inputs: thousands in an adapter of pooled features, which at one rate for all would be far off after the first step.
    So layers of more than `base_width` inputs learn slower by as much (Yang et al. 2022, "Tensor Programs V: Tuning
    Large Neural Networks via Zero-Shot Hyperparameter Transfer", table 3: Adam, hidden weights). No group is empty:
    DeepSpeed drops those, schedulers do not.
    """
    inputs = {id(layer.weight): layer.in_features for layer in module.modules() if isinstance(layer, nn.Linear)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.dim() >= 2 and min(parameter.shape) > 1
        share = min(1.0, config.base_width / inputs.get(id(parameter), 1)) if config.base_width else 1.0
        groups.setdefault((share, config.weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": share * config.learning_rate, "weight_decay": decay}
        for (share, decay), parameters in groups.items()
    ]


def learning_rate_share(step: int, config: TrainingConfig) -> float:
    """Of the highest rate at a step: a linear rise, then a cosine (Loshchilov and Hutter 2017, SGDR, eq. 5)."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(config.num_steps - config.warmup_steps, 1)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
