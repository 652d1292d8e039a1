"""AdamW's moments as a checkpoint keeps them: whole, by the name of their weight, whatever ZeRO makes of them.

    optimiser.safetensors   <weight>/exp_avg and <weight>/exp_avg_sq, float32, shaped as the weight; `step` beside them

So a checkpoint belongs to a net, and not to a number of workers or a ZeRO stage, and nothing in it is a pickle. A
GistNet is small: its moments pass through every worker whole, one weight at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster.errors import ModelError

FILE = "optimiser.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimiserState:
    """What an optimiser knows besides the weights."""

    step: int
    """Steps taken."""
    moments: Mapping[str, Tensor]
    """`<weight>/<moment>`, float32, shaped as the weight; one that is missing is zero."""

    def save(self, folder: Path) -> None:
        """Write the file; it appears whole."""
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{FILE}.tmp"
        save_file(dict(self.moments), unfinished, {"step": str(self.step)})
        os.replace(unfinished, folder / FILE)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare with a module's weights, by name.

        Raises:
            ModelError: moments of a weight that is not among them, or is of another shape.
        """
        for name, moment in self.moments.items():
            shape = shapes.get(name.rpartition("/")[0])
            if shape is None:
                raise ModelError(f"it knows weights that this net does not have, {name!r} among them")
            if tuple(moment.shape) != shape:
                raise ModelError(f"{name!r} is of a weight of shape {tuple(moment.shape)}, this net's is {shape}")

    @classmethod
    def load(cls, folder: Path) -> OptimiserState:
        """Read what `save` wrote.

        Raises:
            ModelError: it is missing or damaged.
        """
        path = folder / FILE
        try:
            with safe_open(path, framework="pt") as file:
                step = int((file.metadata() or {})["step"])
                return cls(step, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ModelError(
                f"{path} cannot be read ({error}); delete the folder to go on from an older one"
            ) from error


def gather(engine: Any, module: nn.Module, step: int) -> OptimiserState | None:
    """What all workers' shards come to: on worker 0; None on the others. All workers must come.

    Args:
        engine: DeepSpeed's, with AdamW.
        module: what it trains.
        step: steps taken.
    """
    moments = {f"{name}/{key}": whole for name, key, whole in _gathered(engine, module)}
    return OptimiserState(step, moments) if dist.get_rank() == 0 else None


def restore(engine: Any, module: nn.Module, state: OptimiserState) -> None:
    """Hand every worker its shard; weights are the module's before it was given to DeepSpeed.

    Raises:
        ModelError: moments of weights of other names or shapes.
    """
    state.check({name: tuple(_shape(parameter)) for name, parameter in _trained(module)})
    optimiser = engine.basic_optimizer
    for flat in _own_shards(engine):
        optimiser.state[flat] = {
            "step": torch.tensor(float(state.step)),
            **{key: torch.zeros_like(flat) for key in MOMENTS},
        }
    if engine.zero_optimization_stage() in {1, 2}:
        # Until now no weight knows where its moments are. DeepSpeed would tell all of them when the first of its groups
        # has taken a step, and the moments of the others are not there yet: so a fresh run comes here, too.
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in _trained(module):
        for key in MOMENTS:
            moment = state.moments.get(f"{name}/{key}")
            if moment is not None:
                _set(engine, parameter, key, moment.to(parameter.device))


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole weight; where ZeRO 3 keeps it elsewhere, the parameter itself is empty."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _own_shards(engine: Any) -> list[Tensor]:
    """The tensors that this worker's AdamW steps."""
    match engine.zero_optimization_stage():
        case 0:
            return [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]
        case 3:
            return list(engine.optimizer.fp32_partitioned_groups_flat)
        case _:
            return list(engine.optimizer.single_partition_of_fp32_groups)


def _gathered(engine: Any, module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    from deepspeed.utils import safe_get_full_optimizer_state

    sharded = engine.zero_optimization_stage() > 0
    for name, parameter in _trained(module):
        for key in MOMENTS:
            if sharded:
                whole: Any = safe_get_full_optimizer_state(parameter, key)  # None only of what is not trained
            else:
                whole = engine.basic_optimizer.state[parameter][key]
            # Only worker 0 keeps what passes.
            if dist.get_rank() == 0:
                yield name, key, whole.detach().to("cpu", torch.float32).clone()


def _set(engine: Any, parameter: Any, key: str, whole: Tensor) -> None:
    """One moment of a weight."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    stage = engine.zero_optimization_stage()
    if stage == 3:
        # DeepSpeed's own way for whole values does not know that the last shard is padded.
        size = parameter.ds_tensor.numel()
        padded = torch.zeros(size * dist.get_world_size(), device=whole.device)
        padded[: whole.numel()] = whole.flatten()
        safe_set_local_optimizer_state(parameter, padded[size * dist.get_rank() :][:size], key)
    elif stage == 0:
        engine.basic_optimizer.state[parameter][key].copy_(whole)
    else:
        safe_set_full_optimizer_state(parameter, whole, key)
