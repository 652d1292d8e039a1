"""The corpus means that a GistNet takes off what it reads.

Token vectors of a language model share a large common direction, which would drown what tells blocks apart.
"""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from models.base_lm import BaseLM
from models.gistnet import GistNet
from models.gistnet.base import rms_normalised
from models.window_encoder import WINDOW_TOKENS


@torch.no_grad()
def measure_means(lm: BaseLM, net: GistNet, ids: Int64[Tensor, "B T"]) -> None:
    """Set a net's means to those of these windows: of their embeddings, and of the states it reads.

    Windows longer than 1,024 tokens are read as several, as the net reads them.
    """
    embeddings = lm.embed(ids.reshape(-1, min(ids.shape[1], WINDOW_TOKENS)))
    net.embedding_mean.copy_(_mean(embeddings))
    if net.lm_layer is None:
        return
    states = lm.hidden_states(embeddings, net.lm_layers)
    net.hidden_mean.copy_(_mean(states[net.lm_layer]))
    if net.spec.key_layer is not None:
        net.own_key_mean.copy_(_mean(states[net.spec.key_layer]))


def _mean(vectors: Tensor) -> Tensor:
    return rms_normalised(vectors.float()).mean(dim=(0, 1))
