"""Key heads: what they leave alone, and that the objective finds what can be found."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import GistNetConfig
from cluster.errors import ModelError
from models.base_lm import BaseLM
from models.focus.dense import query_states
from models.gistnet import GistNet, build_gistnet
from models.training.corpus_statistics import measure_means
from models.training.key_contrast import begin, block_keys, contrast, question_keys, ranks, with_key_head
from models.window_encoder import WindowEncoder


def one_each(answers: Sequence[int], num_blocks: int) -> Tensor:
    return F.one_hot(torch.tensor(answers), num_blocks).bool()


@pytest.fixture
def net(tiny_lm: BaseLM) -> GistNet:
    net = build_gistnet(GistNetConfig(lm_layers=2, key_layer=1), tiny_lm)
    ids = torch.randint(tiny_lm.vocab_size, (4, 256), generator=torch.Generator().manual_seed(0))
    measure_means(tiny_lm, net, ids)
    return net


def test_a_new_head_changes_keys_and_no_gist(net: GistNet, tiny_lm: BaseLM) -> None:
    changed = with_key_head(net, key_dim=16, key_layer=None)
    ids = torch.randint(tiny_lm.vocab_size, (3, K), generator=torch.Generator().manual_seed(1))
    states = tiny_lm.hidden_states(tiny_lm.embed(ids), [1, 2])
    lengths = torch.full((3,), K)
    before = net.forward_tokens(tiny_lm.embed(ids), lengths, states[2], states[1])
    after = changed.forward_tokens(tiny_lm.embed(ids), lengths, states[2])
    assert torch.equal(before.gists, after.gists)
    assert after.keys.shape == (3, 16)
    assert changed.spec.key_metric == "cosine"
    assert changed.key_layer == 2
    assert net.key_layer == 1
    assert torch.allclose(block_keys(changed, states[2]), after.keys, atol=1e-6)


@pytest.mark.parametrize("reach", [0, 5, K])
def test_keys_are_those_of_compaction(net: GistNet, tiny_lm: BaseLM, reach: int) -> None:
    changed = with_key_head(net, key_dim=16, key_layer=None, key_reach=reach)
    assert changed.key_head is not None
    with torch.no_grad():
        changed.key_head.query.normal_(std=5)
    ids = torch.randint(tiny_lm.vocab_size, (2, 4 * K), generator=torch.Generator().manual_seed(1))
    windows = [row.numpy().astype(np.uint32) for row in ids]
    compacted = WindowEncoder(tiny_lm, changed, window_batch=2).encode_windows(windows)
    states = tiny_lm.hidden_states(tiny_lm.embed(ids), [2])[2]
    made = block_keys(changed, states)
    assert torch.allclose(made, torch.from_numpy(np.concatenate([w.keys for w in compacted])), atol=1e-4)


def test_a_layer_above_what_the_net_reads_is_refused(net: GistNet) -> None:
    with pytest.raises(ModelError, match="up to layer 2"):
        with_key_head(net, key_dim=16, key_layer=2)


def test_questions_weigh_tokens_by_their_own_vector(net: GistNet, tiny_lm: BaseLM) -> None:
    changed = with_key_head(net, key_dim=16, key_layer=None)
    assert changed.key_head is not None
    tokens = torch.arange(3, 11).numpy()
    plain = query_states(tiny_lm, changed, tokens)
    with torch.no_grad():
        changed.key_head.query.normal_(std=5)
    assert torch.equal(query_states(tiny_lm, changed, tokens), plain)
    with torch.no_grad():
        changed.key_head.question.normal_(std=5)
    asked = query_states(tiny_lm, changed, tokens)
    assert not torch.allclose(asked, plain)
    states = tiny_lm.hidden_states(tiny_lm.embed(torch.from_numpy(tokens)[None]), [2])[2]
    key = question_keys(changed, states, torch.ones(1, len(tokens), dtype=torch.bool))
    assert torch.allclose(F.normalize(asked.mean(dim=0), dim=0), key[0], atol=1e-6)


def test_the_likelihood_of_an_answer_among_blocks() -> None:
    blocks = torch.eye(4)
    asked = torch.eye(4)[:2]
    nobody = torch.zeros(2, 4, dtype=torch.bool)
    answers = one_each([0, 2], 4)
    nll = contrast(asked, blocks, answers, nobody, temperature=0.5)
    right = -math.log(math.exp(2) / (math.exp(2) + 3))
    assert torch.allclose(nll, torch.tensor([right, right + 2.0]), atol=1e-6)
    excluded = nobody.clone()
    excluded[1, 1] = True  # what the second question is nearest to
    assert torch.allclose(contrast(asked, blocks, answers, excluded, 0.5)[1], torch.tensor(math.log(3)), atol=1e-6)
    assert [placed.tolist() for placed in ranks(asked, blocks, answers, nobody)] == [[0, 1], [0, 1]]
    assert [placed.tolist() for placed in ranks(asked, blocks, answers, excluded)] == [[0, 0], [0, 0]]


def test_blocks_of_one_answer_do_not_compete() -> None:
    blocks = torch.eye(4)
    asked = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    both = torch.tensor([[True, True, False, False]])
    nobody = torch.zeros_like(both)

    def nll(score: float) -> float:
        return math.log(1 + (math.exp(2) + 1) / math.exp(score))

    assert contrast(asked, blocks, both, nobody, 1.0).tolist() == pytest.approx([(nll(3) + nll(1)) / 2])
    assert [placed.tolist() for placed in ranks(asked, blocks, both, nobody)] == [[0], [2]]
    # An answer counts, whatever else it is a part of.
    assert torch.equal(contrast(asked, blocks, both, both, 1.0), contrast(asked, blocks, both, nobody, 1.0))
    assert [placed.tolist() for placed in ranks(asked, blocks, both, both)] == [[0], [2]]


def test_training_finds_the_direction_that_tells_answers(net: GistNet) -> None:
    """Blocks hold the answer's mark in one token of 32, questions in one of 8, beside much that says nothing."""
    changed = with_key_head(net, key_dim=8, key_layer=None)
    generator = torch.Generator().manual_seed(0)
    marks = torch.randn(24, changed.dim, generator=generator) * 3
    noise = torch.randn(1, changed.dim, generator=generator) * 10
    blocks = noise + torch.randn(24, K, changed.dim, generator=generator)
    asked = noise + torch.randn(24, 8, changed.dim, generator=generator)
    blocks[torch.arange(24), torch.randint(K, (24,), generator=generator)] += marks
    asked[:, 3] += marks
    groups = [{**group, "lr": 0.01 * group.pop("share")} for group in begin(changed)]
    optimiser = torch.optim.AdamW(groups)
    mask, nobody = torch.ones(24, 8, dtype=torch.bool), torch.zeros(24, 24, dtype=torch.bool)
    answers = one_each(range(24), 24)
    losses = []
    for _ in range(60):
        nll = contrast(question_keys(changed, asked, mask), block_keys(changed, blocks), answers, nobody, 0.1)
        losses.append(float(nll.detach().mean()))
        optimiser.zero_grad()
        nll.mean().backward()
        optimiser.step()
    found, _ = ranks(question_keys(changed, asked, mask), block_keys(changed, blocks), answers, nobody)
    assert losses[0] > 1.5 > 0.3 > losses[-1]
    assert (found == 0).float().mean() > 0.9
    assert all(weight.grad is None for name, weight in changed.named_parameters() if not name.startswith("key_head."))
