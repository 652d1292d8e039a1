from __future__ import annotations

import pytest
import torch

from cluster.config import GistNetConfig
from cluster.errors import ModelError
from models.gistnet import build_gistnet
from tests.models.gistnet.nets import Shape, blocks, make


def test_the_order_of_tokens_matters() -> None:
    net = make("block", perturbed=True)
    embeddings, _ = blocks(1)
    swapped = embeddings.clone()
    swapped[:, [2, 9]] = swapped[:, [9, 2]]
    lengths = torch.tensor([32])
    difference = net.forward_tokens(embeddings, lengths).gists - net.forward_tokens(swapped, lengths).gists
    assert difference.abs().max() > 1e-4


def test_it_needs_no_lm_pass() -> None:
    net = make("block", perturbed=True)
    assert net.lm_layer is None
    embeddings, hidden = blocks(2)
    lengths = torch.tensor([32, 3])
    with_states = net.forward_tokens(embeddings, lengths, hidden)
    assert torch.equal(with_states.gists, net.forward_tokens(embeddings, lengths).gists)


def test_a_short_block_equals_attention_over_its_tokens_alone() -> None:
    net = make("block", perturbed=True)
    embeddings, _ = blocks(2)
    embeddings[1, :9] = embeddings[0, :9]
    gists = net.forward_tokens(embeddings, torch.tensor([9, 9])).gists
    assert torch.allclose(gists[0], gists[1], atol=1e-6)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ModelError, match=r"24 must be divisible by its 5 attention heads.*gistnet\.num_heads"):
        build_gistnet(GistNetConfig(kind="block", num_heads=5), Shape())
