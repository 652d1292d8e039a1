from __future__ import annotations

import pytest
import torch

from tests.models.gistnet.nets import NUM_VECTORS, blocks, children, make

LENGTHS = torch.tensor([32, 13, 4, 3, 1])


@pytest.mark.parametrize("num_vectors", NUM_VECTORS)
def test_constant_says_the_same_of_everything(num_vectors: int) -> None:
    untrained = make("constant", num_vectors)
    embeddings, _ = blocks(5)
    assert torch.equal(untrained.forward_tokens(embeddings, LENGTHS).gists, torch.zeros(5, num_vectors, 24))
    net = make("constant", num_vectors, perturbed=True)
    gists = net.forward_tokens(embeddings, LENGTHS).gists
    assert torch.equal(gists, gists[:1].expand(5, -1, -1))
    nodes = net.forward_nodes(*children(num_vectors), 2).gists
    assert torch.equal(nodes, nodes[:1].expand(3, -1, -1))
    assert not torch.equal(nodes[0], gists[0])


def test_last_token_is_the_last_real_token() -> None:
    embeddings, _ = blocks(5)
    gists = make("last_token").forward_tokens(embeddings, LENGTHS).gists
    for g, length in enumerate(LENGTHS.tolist()):
        assert torch.equal(gists[g, 0], embeddings[g, length - 1])
    child_gists, keys = children(1)
    assert torch.equal(make("last_token").forward_nodes(child_gists, keys, 2).gists, child_gists[:, -1])


def test_last_token_of_each_sub_span() -> None:
    embeddings, _ = blocks(5)
    gists = make("last_token", 4).forward_tokens(embeddings, LENGTHS).gists
    ends = [[7, 15, 23, 31], [3, 6, 9, 12], [0, 1, 2, 3], [0, 1, 2, 2], [0, 0, 0, 0]]
    for g, places in enumerate(ends):
        assert torch.equal(gists[g], embeddings[g, places])
    child_gists, keys = children(4)
    nodes = make("last_token", 4).forward_nodes(child_gists, keys, 3).gists
    assert torch.equal(nodes, child_gists[:, [7, 15, 23, 31], -1])


@pytest.mark.parametrize("num_vectors", NUM_VECTORS)
def test_mean_is_the_mean_of_each_sub_span(num_vectors: int) -> None:
    embeddings, _ = blocks(2)
    gists = make("mean", num_vectors).forward_tokens(embeddings, torch.tensor([32, 12])).gists
    for g, length in enumerate((32, 12)):
        expected = embeddings[g, :length].unflatten(0, (num_vectors, -1)).mean(1)
        assert torch.allclose(gists[g], expected, atol=1e-6)
    child_gists, keys = children(num_vectors)
    nodes = make("mean", num_vectors).forward_nodes(child_gists, keys, 2).gists
    assert torch.allclose(nodes, child_gists.flatten(1, 2).unflatten(1, (num_vectors, 32)).mean(2), atol=1e-6)


def test_mean_of_fewer_tokens_than_vectors() -> None:
    embeddings, _ = blocks(1)
    gists = make("mean", 4).forward_tokens(embeddings, torch.tensor([2])).gists
    assert torch.allclose(gists[0], embeddings[0, [0, 0, 1, 1]])


def test_a_rescaled_mean_is_as_long_as_what_it_is_a_mean_of() -> None:
    embeddings, _ = blocks(5)
    mean, rescaled = (make(kind, 2).forward_tokens(embeddings, LENGTHS).gists for kind in ("mean", "rescaled_mean"))
    assert torch.allclose(torch.cosine_similarity(mean, rescaled, dim=-1), torch.ones(5, 2), atol=1e-5)
    for g, length in enumerate(LENGTHS.tolist()):
        expected = embeddings[g, :length].norm(dim=-1).mean()
        assert torch.allclose(rescaled[g].norm(dim=-1), expected.expand(2), atol=1e-5)
    child_gists, keys = children(1)
    nodes = make("rescaled_mean").forward_nodes(child_gists, keys, 2).gists
    assert torch.allclose(nodes[:, 0].norm(dim=-1), child_gists.norm(dim=-1).mean(dim=(1, 2)), atol=1e-5)
