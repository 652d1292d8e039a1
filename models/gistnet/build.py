"""From a configuration to a GistNet that fits a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from cluster.config import AUTO_GISTNET, GistNetConfig
from cluster.errors import ModelError
from models.gistnet.base import GistNet, GistNetSpec

NUM_BLOCK_LAYERS = 2

PACKAGED = {"smollm2-135m": "gistnet-smollm2-135m"}
"""By model, the folder in `models/packaged` of the net that was trained for it."""


class LMShape(Protocol):
    """What a GistNet must know of its LM; `ModelFiles` (nothing loaded) and `BaseLM` both have it."""

    @property
    def model_id(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...


def build_gistnet(config: GistNetConfig, lm: LMShape) -> GistNet:
    """The net at `config.path`, or an untrained one of `config.kind`; the same weights in every process.

    `auto` is an untrained one here: what it means for a context, `actors.plan.plan_models` knows.

    Raises:
        ModelError: the net cannot be read, or does not fit the LM's hidden size or number of layers.
    """
    net = GistNet.load(config.path) if config.path not in {"", AUTO_GISTNET} else _untrained(config, lm)
    check_fits(net, lm)
    return net


def packaged_gistnet(lm: LMShape) -> Path | None:
    """Folder of the net that comes along for a model; None where there is none."""
    name = PACKAGED.get(lm.model_id)
    return None if name is None else Path(__file__).parents[1] / "packaged" / name


def check_fits(net: GistNet, lm: LMShape) -> None:
    """Refuse a net that was made for an LM of another shape.

    Raises:
        ModelError: naming both sizes.
    """
    if net.dim != lm.hidden_size:
        raise ModelError(
            f"GistNet {net.net_id} makes vectors of size {net.dim}, but {lm.model_id} has a hidden size of "
            f"{lm.hidden_size}; take the base LM it was trained for, or another net"
        )
    if net.lm_layer is not None and net.lm_layer > lm.num_layers:
        raise ModelError(
            f"GistNet {net.net_id} reads the LM's state after {net.lm_layer} layers, but {lm.model_id} has "
            f"{lm.num_layers}; set gistnet.lm_layers to at most that"
        )


def _untrained(config: GistNetConfig, lm: LMShape) -> GistNet:
    dim = lm.hidden_size
    trainable = config.kind in {"windowed", "block"}
    windowed = config.kind == "windowed"
    default_width = 2 * dim if windowed else dim
    spec = GistNetSpec(
        kind=config.kind,
        dim=dim,
        num_vectors=config.num_vectors,
        lm_layer=config.lm_layers if windowed else None,
        key_layer=config.key_layer if windowed and config.key_layer < config.lm_layers else None,
        num_heads=config.num_heads if trainable else 0,
        hidden_dim=(config.hidden_dim or default_width) if trainable else 0,
        num_encoder_layers=NUM_BLOCK_LAYERS if config.kind == "block" else 0,
        num_keywords=config.num_keywords if trainable else 0,
        key_dim=config.key_dim,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return GistNet.kinds[config.kind](spec).eval()
