"""Gists descend by themselves, and the net learns where they come to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.errors import ConfigError
from cluster.training_config import ObjectiveConfig
from models.base_lm import BaseLM
from models.training.dense_pass import Gists
from models.training.distillation import Distillation
from models.training.inner_steps import apart, descended, distance
from tests.models.training.test_distillation import descended as losses_of
from tests.models.training.test_distillation import objective, seeds, some_ids

ASKED = [
    {},
    {"kl_share": 0.0},
    {"kl_share": 0.5, "scored_share": 0.5, "spread_floor": 0.9},
    {"repeat_share": 0.5},
    {"repeat_share": 1.0},
    {"states_share": 1.0, "states_layers": [2]},
]
"""Kinds of loss behind gists."""


def read(goal: Distillation, ids: Tensor) -> tuple[Any, Gists]:
    windows = goal.dense.read(ids, teacher=goal.config.distils, match=goal.config.states_layers)
    return windows, goal.dense.gists(windows)


def targets_of(goal: Distillation, ids: Tensor, num_rows: int = 3) -> tuple[Any, Gists, Gists]:
    """The windows, the net's gists, and where inner steps bring these."""
    windows, gists = read(goal, ids)
    moved, size = gists, windows.embeddings.square().mean().sqrt()
    for _ in range(goal.config.inner_steps):
        moved = apart(moved)
        loss = goal._asked(windows, moved, seeds(4, num_rows)).loss
        moved = descended(moved, loss, goal.config.inner_rate, size)
    return windows, gists, moved


@pytest.mark.parametrize("fields", ASKED)
def test_inner_steps_lower_the_loss_behind_gists(tiny_lm: BaseLM, fields: dict[str, Any]) -> None:
    goal = objective(tiny_lm, inner_steps=3, inner_rate=0.2, **fields)
    windows, gists, moved = targets_of(goal, some_ids(tiny_lm))
    with torch.no_grad():
        before, after = (float(goal._asked(windows, shown, seeds(4)).loss) for shown in (gists, moved))
    assert after < before - 1e-3


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_a_step_goes_down_the_gradient_by_a_share_of_each_gist(num_vectors: int) -> None:
    torch.manual_seed(0)
    size = torch.tensor([0.01, 1.0, 100.0, 0.0])
    slopes = torch.randn(2, 4, num_vectors, 6) * torch.tensor([1e-9, 1.0, 1e3, 1.0])[:, None, None]
    slopes[1, 2] = 0.0  # nobody sees it
    gists = apart(Gists(torch.randn(2, 4, num_vectors, 6) * size[:, None, None], torch.randn(2, 1, num_vectors, 6)))
    moved = descended(gists, (gists.blocks * slopes).sum(), 0.25, torch.tensor(3.0))
    assert not moved.blocks.requires_grad
    went = (moved.blocks - gists.blocks).detach()
    for row in range(2):
        for block in range(4):
            own = gists.blocks[row, block].detach().square().mean().sqrt() if block < 3 else torch.tensor(3.0)
            slope = F.normalize(slopes[row, block].flatten(), dim=0, eps=1e-20)
            if (row, block) == (1, 2):
                assert not went[row, block].any()
                continue
            cosine = torch.cosine_similarity(went[row, block].flatten(), -slope, dim=0)
            assert float(cosine) == pytest.approx(1, abs=1e-3)
            assert float(went[row, block].square().mean().sqrt()) == pytest.approx(0.25 * float(own), rel=1e-3)
    # What the loss does not know of stays.
    assert gists.nodes is not None
    assert moved.nodes is not None
    assert torch.equal(moved.nodes, gists.nodes)


def test_the_distance_is_a_share_of_each_gists_mean_square() -> None:
    blocks, node = torch.randn(2, 4, 2, 6), torch.randn(2, 1, 2, 6)
    target = Gists(blocks * torch.tensor([1.0, 10.0, 0.1, 5.0])[:, None, None], node)
    off = Gists(1.5 * target.blocks, 1.5 * node)
    assert float(distance(off, target)) == pytest.approx(0.25, rel=1e-4)
    assert float(distance(Gists(off.blocks, node), target)) == pytest.approx(0.25 * 4 / 5, rel=1e-4)
    assert float(distance(target, target)) == 0


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("fields", [{}, {"repeat_share": 0.5, "kl_share": 0.3}])
def test_the_distance_to_the_targets_is_weighed_against_the_loss(
    tiny_lm: BaseLM, share: float, fields: dict[str, Any]
) -> None:
    ids = some_ids(tiny_lm)
    goal = objective(tiny_lm, inner_steps=2, inner_share=share, **fields)
    found, plain = goal(ids, seeds(4)), objective(tiny_lm, **fields)(ids, seeds(4))
    _, gists, moved = targets_of(goal, ids)
    expected = float(distance(gists, moved).detach())
    assert float(found.inner) == pytest.approx(expected, rel=1e-3)
    loss = share * expected + (1 - share) * float(plain.loss.detach())
    assert float(found.loss.detach()) == pytest.approx(loss, rel=1e-4)
    # What is said of the step is of the net's own gists.
    for name in ("kl", "nll", "repeat", "spread"):
        own, others = getattr(found, name), getattr(plain, name)
        assert own == others if own is None else float(own) == pytest.approx(float(others), abs=1e-5)


def test_off_is_what_it_was(tiny_lm: BaseLM) -> None:
    """To the last bit, whatever the other switches of inner steps say; and nothing is said of them."""
    ids = some_ids(tiny_lm)
    found = []
    switches: list[dict[str, Any]] = [{}, {"inner_rate": 0.7, "inner_share": 0.5}]
    for fields in switches:
        goal = objective(tiny_lm, repeat_share=0.3, scored_share=0.5, spread_floor=0.9, **fields)
        losses = goal(ids, seeds(4))
        losses.loss.backward()
        found.append((losses, {name: p.grad for name, p in goal.gistnet.named_parameters()}))
    (one, gradients), (other, others) = found
    assert one == other
    assert one.inner is None
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]) if gradient is not None else others[name] is None


def test_inner_steps_leave_no_gradient_and_call_the_net_once(tiny_lm: BaseLM) -> None:
    goal = objective(tiny_lm, inner_steps=2, inner_share=0.5)
    calls = []
    goal.gistnet.register_forward_hook(lambda *_: calls.append(1))
    windows, gists = read(goal, some_ids(tiny_lm))
    _, first = goal._inner(windows, gists, seeds(4))
    assert all(p.grad is None for p in (*goal.gistnet.parameters(), *tiny_lm._model.parameters()))
    assert first.predicted is not None
    calls.clear()
    goal(some_ids(tiny_lm), seeds(4)).loss.backward()
    assert len(calls) == 1
    assert all(p.grad is None for p in tiny_lm._model.parameters())


def test_at_share_one_the_gradient_is_that_of_the_distance_alone(tiny_lm: BaseLM) -> None:
    ids = some_ids(tiny_lm)
    goal = objective(tiny_lm, inner_steps=2, inner_share=1.0)
    _, gists, moved = targets_of(goal, ids)
    names, weights = zip(*goal.gistnet.named_parameters(), strict=True)
    expected = torch.autograd.grad(distance(gists, moved), weights, allow_unused=True)
    goal(ids, seeds(4)).loss.backward()
    assert any(gradient is not None and gradient.any() for gradient in expected)
    for name, weight, gradient in zip(names, weights, expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["windowed", "constant"])
def test_regression_alone_brings_the_loss_down(tiny_lm: BaseLM, kind: str) -> None:
    """Also of a constant, which begins at zero."""
    goal = objective(tiny_lm, kind=kind, inner_steps=2, inner_rate=0.3, inner_share=1.0)
    losses = losses_of(goal, some_ids(tiny_lm), "kl")
    assert losses[-1] < (0.95 if kind == "windowed" else 0.999) * losses[0]


def test_it_does_not_matter_which_windows_share_a_pass(tiny_lm: BaseLM) -> None:
    goal, ids = objective(tiny_lm, inner_steps=2, inner_share=0.5), some_ids(tiny_lm)
    alone = [goal(ids[row : row + 1], seeds(4)[row : row + 1]) for row in range(3)]
    together = goal(ids, seeds(4))
    assert float(together.inner) == pytest.approx(sum(float(one.inner) for one in alone) / 3, rel=1e-3)
    assert float(together.loss.detach()) == pytest.approx(sum(float(one.loss.detach()) for one in alone) / 3, rel=1e-4)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_blocks_and_nodes_descend_together(tiny_lm: BaseLM, share: float) -> None:
    goal = objective(tiny_lm, inner_steps=1, inner_share=share)
    ids = torch.randint(0, tiny_lm.vocab_size, (1, 2048), generator=torch.Generator().manual_seed(1))
    _, gists, moved = targets_of(goal, ids, 1)
    assert gists.nodes is not None
    assert moved.nodes is not None
    assert (moved.blocks != gists.blocks).any()
    assert (moved.nodes[:, 0] != gists.nodes[:, 0]).any()
    assert torch.equal(moved.nodes[:, 1], gists.nodes[:, 1])  # nothing comes behind it
    goal(ids, seeds(4, 1)).loss.backward()
    gradient = goal.gistnet.get_parameter("node_constant").grad
    assert gradient is not None
    assert gradient.any()


def test_a_curriculum_holds_for_inner_steps_too(tiny_lm: BaseLM) -> None:
    """Gists that are not shown yet have no target but themselves."""
    goal = objective(tiny_lm, inner_steps=1, curriculum_share=0.5, max_tail_blocks=1)
    goal.progress = 0.0
    _, gists, moved = targets_of(goal, some_ids(tiny_lm))
    with torch.no_grad():
        went = [float((moved.blocks - gists.blocks)[:, block].abs().sum()) for block in range(5)]
    assert went[4] == 0 < went[3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inner_steps": -1}, "inner_steps must be 0 or more"),
        ({"inner_steps": 1, "inner_share": 0.0}, "inner_share must be above 0.* give objective.inner_steps=0"),
        ({"inner_steps": 1, "inner_rate": 0.0}, "inner_rate must be positive"),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**fields).validate()
