"""What both trainable nets promise: a sane start, and that all of them can learn."""

from __future__ import annotations

import pytest
import torch

from cluster.config import GistNetKind
from models.gistnet.residual import NUM_LOD_EMBEDDINGS, ResidualGistNet
from tests.models.gistnet.nets import NUM_VECTORS, TRAINABLE, blocks, children, make

LENGTHS = torch.tensor([32, 13, 4, 3, 1])
every_net = pytest.mark.parametrize("num_vectors", NUM_VECTORS)
every_kind = pytest.mark.parametrize("kind", TRAINABLE)


@every_net
@every_kind
def test_untrained_blocks_are_exactly_the_residual(kind: GistNetKind, num_vectors: int) -> None:
    net = make(kind, num_vectors)
    assert isinstance(net, ResidualGistNet)
    constant = torch.randn(num_vectors, net.dim)
    with torch.no_grad():
        net.block_constant.copy_(constant)
    embeddings, hidden = blocks(5)
    gists = net.forward_tokens(embeddings, LENGTHS, hidden).gists
    for g, length in enumerate(LENGTHS.tolist()):
        for j in range(num_vectors):
            last = -(-(j + 1) * length // num_vectors) - 1  # ceil
            assert torch.equal(gists[g, j], 0.8 * embeddings[g, last] + constant[j])


@every_net
@every_kind
def test_untrained_nodes_are_exactly_the_last_child(kind: GistNetKind, num_vectors: int) -> None:
    net = make(kind, num_vectors)
    assert isinstance(net, ResidualGistNet)
    constant = torch.randn(num_vectors, net.dim)
    with torch.no_grad():
        net.node_constant.copy_(constant)
    child_gists, keys = children(num_vectors)
    last_children = [(j + 1) * 32 // num_vectors - 1 for j in range(num_vectors)]
    for lod in (2, 5):
        gists = net.forward_nodes(child_gists, keys, lod).gists
        assert torch.equal(gists, child_gists[:, last_children, -1] + constant)
        assert torch.equal(gists[:, -1], child_gists[:, 31, -1] + constant[-1])


@every_kind
def test_a_new_net_adds_nothing_to_its_residual(kind: GistNetKind) -> None:
    embeddings, hidden = blocks(2)
    gists = make(kind).forward_tokens(embeddings, torch.tensor([32, 5]), hidden).gists
    assert torch.equal(gists[:, 0], 0.8 * torch.stack((embeddings[0, 31], embeddings[1, 4])))


@every_net
@every_kind
def test_with_keywords_a_gist_is_the_mean_token_and_how_weighted_words_differ_from_it(
    kind: GistNetKind, num_vectors: int
) -> None:
    net = make(kind, num_vectors, num_keywords=3)
    assert isinstance(net, ResidualGistNet)
    assert net.keywords is not None
    net.keywords.token_mean.normal_()
    embeddings, hidden = blocks(5)
    gists = net.forward_tokens(embeddings, LENGTHS, hidden).gists
    # Untrained nets know their means as zero.
    parts = (embeddings, hidden) if kind == "windowed" else (embeddings,)
    features = torch.cat([part / part.square().mean(-1, keepdim=True).sqrt() for part in parts], dim=-1)
    pool = net.keywords.pool
    for g, length in enumerate(LENGTHS.tolist()):
        words = embeddings[g, :length]
        scores = features[g, :length] @ pool.queries.T * features.shape[-1] ** -0.5 + pool.anchors[:, :length].T
        mean_words = scores.softmax(dim=0).T @ words  # (3 m, D)
        for j in range(num_vectors):
            own = mean_words[3 * j : 3 * j + 3] - net.keywords.token_mean
            expected = net.keywords.token_mean + 2.0 / 3 * own.sum(dim=0)
            assert torch.allclose(gists[g, j], expected, atol=1e-4)


@every_kind
def test_a_net_without_keywords_is_the_same_as_before_there_were_any(kind: GistNetKind) -> None:
    without, with_keywords = make(kind).state_dict(), make(kind, num_keywords=2).state_dict()
    assert with_keywords.keys() > without.keys()
    assert all(torch.equal(weight, with_keywords[name]) for name, weight in without.items())


@pytest.mark.parametrize("num_keywords", [0, 2])
@every_net
@every_kind
def test_gradients_reach_every_parameter(kind: GistNetKind, num_vectors: int, num_keywords: int) -> None:
    net = make(kind, num_vectors, perturbed=True, num_keywords=num_keywords)
    embeddings, hidden = blocks(5)
    loss = net.forward_tokens(embeddings, LENGTHS, hidden).gists.square().sum()
    for lod in range(2, 2 + NUM_LOD_EMBEDDINGS):
        loss = loss + net.forward_nodes(*children(num_vectors), lod).gists.square().sum()
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        rows = parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[None]
        assert bool((rows != 0).any(dim=1).all()), name


@every_kind
def test_levels_are_told_apart_up_to_a_depth_and_never_fail(kind: GistNetKind) -> None:
    net = make(kind, perturbed=True)
    child_gists, keys = children(1)
    at = {lod: net.forward_nodes(child_gists, keys, lod).gists for lod in (2, 3, 9, 10, 100)}
    assert not torch.equal(at[2], at[3])
    assert not torch.equal(at[3], at[9])
    assert torch.equal(at[9], at[10])
    assert torch.equal(at[10], at[100])


@every_kind
def test_a_step_of_training_moves_gists_by_about_their_own_size(kind: GistNetKind) -> None:
    net = make(kind)
    embeddings, hidden = blocks(8)
    lengths = torch.full((8,), 32)
    target = embeddings[:, 3:4]
    before = net.forward_tokens(embeddings, lengths, hidden).gists.detach()
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = (net.forward_tokens(embeddings, lengths, hidden).gists - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    moved = (net.forward_tokens(embeddings, lengths, hidden).gists.detach() - before).norm(dim=-1)
    assert float(moved.max()) < 10 * float(before.norm(dim=-1).mean())
