"""Nets and inputs for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.config import GistNetConfig, GistNetKind
from models.gistnet import GistNet, build_gistnet

DIM = 24
KINDS: tuple[GistNetKind, ...] = ("windowed", "block", "constant", "last_token", "mean", "rescaled_mean")
TRAINABLE: tuple[GistNetKind, ...] = ("windowed", "block")
NUM_VECTORS = (1, 2, 4)


@dataclass(frozen=True)
class Shape:
    """An LM as far as a GistNet cares."""

    model_id: str = "shape"
    hidden_size: int = DIM
    num_layers: int = 6


def make(
    kind: GistNetKind,
    num_vectors: int = 1,
    *,
    seed: int = 0,
    perturbed: bool = False,
    key_layer: int = 3,
    num_keywords: int = 0,
    key_dim: int = 0,
) -> GistNet:
    """An untrained net, or one whose every weight and mean has moved a little, as training would."""
    config = GistNetConfig(
        kind=kind,
        num_vectors=num_vectors,
        lm_layers=3,
        key_layer=key_layer,
        key_dim=key_dim,
        num_heads=4,
        num_keywords=num_keywords,
        seed=seed,
    )
    net = build_gistnet(config, Shape())
    return perturb(net, 0.1) if perturbed else net


def perturb(net: GistNet, std: float) -> GistNet:
    """Move every weight and mean a little, the same way each time."""
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor += std * torch.randn(tensor.shape, generator=generator)
    return net


def blocks(num_blocks: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and states of blocks, each (num_blocks, 32, DIM)."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = 0.13 * torch.randn(num_blocks, 32, DIM, generator=generator)
    return embeddings, 4.0 * torch.randn(num_blocks, 32, DIM, generator=generator)


def children(num_vectors: int, num_nodes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Child gists (num_nodes, 32, m, DIM) and keys (num_nodes, 32, DIM) of length 1."""
    generator = torch.Generator().manual_seed(seed)
    gists = 0.13 * torch.randn(num_nodes, 32, num_vectors, DIM, generator=generator)
    keys = torch.randn(num_nodes, 32, DIM, generator=generator)
    return gists, torch.nn.functional.normalize(keys, dim=-1)
