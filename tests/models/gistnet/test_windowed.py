from __future__ import annotations

import torch

from models.gistnet import WindowedGistNet
from tests.models.gistnet.nets import blocks, make


def test_a_block_is_read_through_the_lms_states() -> None:
    net = make("windowed", perturbed=True)
    embeddings, hidden = blocks(2)
    lengths = torch.tensor([32, 10])
    before = net.forward_tokens(embeddings, lengths, hidden).gists
    hidden[:, 2] += 1.0
    assert not torch.equal(net.forward_tokens(embeddings, lengths, hidden).gists, before)


def test_the_scale_of_the_lms_states_does_not_matter() -> None:
    net = make("windowed", perturbed=True)
    embeddings, hidden = blocks(2)
    lengths = torch.tensor([32, 10])
    before = net.forward_tokens(embeddings, lengths, hidden).gists
    assert torch.allclose(net.forward_tokens(embeddings, lengths, 50 * hidden).gists, before, atol=1e-4)


def test_the_corpus_mean_is_taken_off_and_comes_along() -> None:
    net = make("windowed", perturbed=True)
    assert isinstance(net, WindowedGistNet)
    embeddings, hidden = blocks(2)
    lengths = torch.tensor([32, 10])
    before = net.forward_tokens(embeddings, lengths, hidden).gists
    net.embedding_mean += 0.5
    assert not torch.equal(net.forward_tokens(embeddings, lengths, hidden).gists, before)
    assert {"embedding_mean", "hidden_mean"} <= set(net.state_dict())


def test_the_default_width_is_twice_the_lms() -> None:
    spec = make("windowed").spec
    assert (spec.hidden_dim, spec.lm_layer) == (2 * spec.dim, 3)
