"""Means, which words are rare, and how keys differ."""

from __future__ import annotations

import torch

from cluster.config import GistNetConfig
from models.base_lm import BaseLM
from models.gistnet import build_gistnet
from models.gistnet.base import rms_normalised
from models.gistnet.residual import ResidualGistNet
from models.training.corpus_statistics import measure_keys, measure_keywords, measure_means


def keyword_net(lm: BaseLM) -> ResidualGistNet:
    net = build_gistnet(GistNetConfig(lm_layers=2, num_keywords=2, key_layer=1), lm)
    assert isinstance(net, ResidualGistNet)
    return net


def test_means_are_those_of_the_windows(tiny_lm: BaseLM) -> None:
    net = keyword_net(tiny_lm)
    ids = torch.randint(tiny_lm.vocab_size, (2, 2048), generator=torch.Generator().manual_seed(0))
    measure_means(tiny_lm, net, ids)
    embeddings = tiny_lm.embed(ids)
    states = tiny_lm.hidden_states(embeddings.reshape(4, 1024, -1), [1, 2])  # longer ones are read as several
    for mean, vectors in (
        (net.embedding_mean, embeddings),
        (net.hidden_mean, states[2]),
        (net.own_key_mean, states[1]),
    ):
        assert torch.allclose(mean, rms_normalised(vectors.detach()).mean(dim=(0, 1)), atol=1e-5)


def test_keywords_weigh_tokens_by_how_rare_they_are(tiny_lm: BaseLM) -> None:
    net = keyword_net(tiny_lm)
    generator = torch.Generator().manual_seed(0)
    vocabulary = torch.arange(tiny_lm.vocab_size)
    measure_means(tiny_lm, net, vocabulary[: tiny_lm.vocab_size // 32 * 32].reshape(-1, 32))
    embeddings = tiny_lm.embed(vocabulary).detach()
    # Tokens whose surprisal is a linear map of their embedding, as that of an LM nearly is.
    surprisal = rms_normalised(embeddings) @ torch.randn(net.dim, generator=generator) * net.dim**-0.5
    counts = (1e12 * (-surprisal).softmax(dim=0).double()).long()
    assert net.keywords is not None
    with torch.no_grad():
        net.keywords.pool.queries.zero_()
        net.keywords.pool.anchors.zero_()
    measure_keywords(tiny_lm, net, counts)
    shares = (counts + 1) / (counts.sum() + len(counts))
    assert torch.allclose(net.keywords.token_mean, shares @ embeddings, atol=1e-5)
    tokens = vocabulary[3:35]
    features = torch.cat((rms_normalised(embeddings[tokens]) - net.embedding_mean, torch.zeros(32, net.dim)), dim=-1)
    weights = net.keywords.pool.weights(features[None], torch.ones(1, 32, dtype=torch.bool))
    rarity = 1 / shares[tokens]
    assert torch.allclose(weights, (rarity / rarity.sum()).expand(1, 2, 32), rtol=0.1, atol=1e-4)


def test_a_net_without_keywords_is_left_alone(tiny_lm: BaseLM) -> None:
    net = build_gistnet(GistNetConfig(lm_layers=2), tiny_lm)
    before = net.digest()
    measure_keywords(tiny_lm, net, torch.ones(tiny_lm.vocab_size, dtype=torch.int64))
    assert net.digest() == before


def test_keys_are_projected_to_where_they_differ_and_spread_evenly(tiny_lm: BaseLM) -> None:
    wide, net = (build_gistnet(GistNetConfig(lm_layers=2, key_layer=1, key_dim=d), tiny_lm) for d in (0, 12))
    ids = torch.randint(tiny_lm.vocab_size, (4, 1024), generator=torch.Generator().manual_seed(0))
    for each in (wide, net):
        measure_means(tiny_lm, each, ids)
    measure_keys(tiny_lm, net, ids)
    assert net.key_head is not None
    with torch.no_grad():
        states = tiny_lm.hidden_states(tiny_lm.embed(ids), [1])[1].unflatten(1, (32, 32)).flatten(0, 1)
        rows = wide.key_rows(states, torch.ones(states.shape[:2], dtype=torch.bool)).mean(dim=1)
        keys = torch.nn.functional.normalize(rows, dim=-1).double()
        placed = (keys - keys.mean(dim=0)) @ net.key_head.projection.double()
    variances = torch.linalg.eigvalsh(torch.cov(keys.T, correction=0)).flip(0)
    shrunk = variances / (variances + 0.1 * variances.mean())
    covariance = torch.cov(placed.T, correction=0)
    assert torch.allclose(covariance, torch.diag(shrunk[:12]), atol=1e-3)
