"""What a GistNet knows of a corpus before it is trained: the means it takes off, which words are rare, and in which
directions routing keys differ."""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn import functional as F

from cluster.config import TOKENS_PER_BLOCK
from models.base_lm import BaseLM
from models.focus.dense import KeySpace
from models.gistnet import GistNet
from models.gistnet.base import rms_normalised
from models.gistnet.residual import ResidualGistNet
from models.window_encoder import WINDOW_TOKENS

MEAN_TOKENS = 8192
"""Tokens that an untrained net's means are measured on: so many leave 1% of a state's spread in them."""

KEY_TOKENS = 131_072
"""Tokens, 4,096 blocks, from which it is learned how routing keys differ."""

COUNTED_TOKENS = 2_000_000
"""Tokens that are counted to know which are rare."""

RIDGE = 1e-3
"""Added to the variance of each of the features, whose mean square is 1."""


@torch.no_grad()
def measure_means(lm: BaseLM, net: GistNet, ids: Int64[Tensor, "B T"]) -> None:
    """Set a net's means to those of these windows: of their embeddings, and of the states it reads.

    Token vectors of a language model share a large common direction, which would drown what tells blocks apart. Windows
    longer than 1,024 tokens are read as several, as the net reads them.
    """
    embeddings = lm.embed(ids.reshape(-1, min(ids.shape[1], WINDOW_TOKENS)))
    net.embedding_mean.copy_(_mean(embeddings))
    if net.lm_layer is None:
        return
    states = lm.hidden_states(embeddings, net.lm_layers)
    net.hidden_mean.copy_(_mean(states[net.lm_layer]))
    if net.spec.key_layer is not None:
        net.own_key_mean.copy_(_mean(states[net.spec.key_layer]))


@torch.no_grad()
def measure_key_mean(lm: BaseLM, net: GistNet, ids: Int64[Tensor, "B T"]) -> None:
    """Set the mean of the states that a net's routing keys are made of, where it has one of their own; gists do not
    depend on it."""
    if net.spec.key_layer is not None:
        embeddings = lm.embed(ids.reshape(-1, min(ids.shape[1], WINDOW_TOKENS)))
        net.own_key_mean.copy_(_mean(lm.hidden_states(embeddings, [net.spec.key_layer])[net.spec.key_layer]))


@torch.no_grad()
def measure_keywords(lm: BaseLM, net: GistNet, counts: Int64[Tensor, " V"]) -> None:
    """Let the keyword heads of a net, where it has any, prefer rare words: after `measure_means`, before training.

    How rare a token is (-log of its share of the corpus, its surprisal under a unigram model) is nearly a linear map of
    its embedding, r² = 0.93 in SmolLM2-135M. The map is found by least squares, every token counting as often as it
    comes up, and becomes every head's query, which therefore weighs tokens by exp(surprisal): in inverse proportion to
    their frequency. Where a head begins within the block its anchors say.

    Args:
        lm: the frozen model.
        net: with its means.
        counts: how often each token came up in the corpus.
    """
    if not isinstance(net, ResidualGistNet) or net.keywords is None:
        return
    device = lm.device
    embeddings = lm.embed(torch.arange(lm.vocab_size, device=device)[None])[0].float()
    shares = (counts.to(device).float() + 1) / (counts.sum() + len(counts))
    net.keywords.token_mean.copy_(shares @ embeddings)
    features = rms_normalised(embeddings) - net.embedding_mean
    queries = net.keywords.pool.queries
    queries[:, : net.dim] += _least_squares(features, -shares.log(), shares) * queries.shape[1] ** 0.5


@torch.no_grad()
def measure_keys(lm: BaseLM, net: GistNet, ids: Int64[Tensor, "B T"]) -> None:
    """Let a net's key head, where it has one, project to the directions in which the keys of these windows' blocks
    differ most, each scaled by how much they do (principal components, whitened): after `measure_means`.

    Args:
        lm: the frozen model.
        net: with its means.
        ids: windows of whole blocks; a few blocks for every dimension of the LM's states.
    """
    head = net.key_head
    if head is None:
        return
    keys = []
    for row in ids.reshape(-1, min(ids.shape[1], WINDOW_TOKENS)):
        states = lm.embed(row[None])
        if net.key_layer is not None:
            states = lm.hidden_states(states, [net.key_layer])[net.key_layer]
        centred = rms_normalised(states[0].float()) - net.key_mean
        keys.append(F.normalize(centred.unflatten(0, (-1, TOKENS_PER_BLOCK)).mean(dim=1), dim=-1))
    whitening = KeySpace.of(torch.cat(keys)).whitening
    if whitening is not None:  # keys differ
        head.projection.copy_(whitening[:, -net.spec.key_dim :].flip(1))


def _least_squares(
    features: Float32[Tensor, "V D"], values: Float32[Tensor, " V"], weights: Float32[Tensor, " V"]
) -> Float32[Tensor, " D"]:
    """The linear map of features, up to a constant, that comes closest to the values."""
    # The features' own mean by these weights: the net's is of other tokens.
    centred = (features - weights @ features).double()
    weighted = centred * weights[:, None]
    ridge = RIDGE * torch.eye(features.shape[1], dtype=torch.float64, device=features.device)
    target = weighted.T @ (values - weights @ values).double()
    return torch.linalg.solve(weighted.T @ centred + ridge, target).float()


def _mean(vectors: Tensor) -> Tensor:
    return rms_normalised(vectors.float()).mean(dim=(0, 1))
