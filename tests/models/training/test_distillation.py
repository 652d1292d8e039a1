"""The objective: its parts are what they are called, and following it makes gists say something."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import GistNetConfig
from cluster.training_config import ObjectiveConfig
from models.base_lm import BaseLM
from models.gistnet import build_gistnet
from models.training.dense_pass import DensePass
from models.training.distillation import Distillation
from models.training.sight import Sight, random_sight

NUM_BLOCKS = 5


def objective(lm: BaseLM, kind: str = "windowed", **fields: object) -> Distillation:
    net = build_gistnet(GistNetConfig(kind=kind, lm_layers=2, key_layer=1), lm).train()  # type: ignore[arg-type]
    return Distillation(DensePass(lm, net), ObjectiveConfig(**fields))  # type: ignore[arg-type]


def some_ids(lm: BaseLM, num_rows: int = 3, seed: int = 1) -> Tensor:
    return torch.randint(0, lm.vocab_size, (num_rows, NUM_BLOCKS * K), generator=torch.Generator().manual_seed(seed))


def seeds(seed: int, num_rows: int = 3) -> list[tuple[int, int]]:
    return [(seed, row) for row in range(num_rows)]


def test_a_curriculum_shows_ever_more_gists(tiny_lm: BaseLM) -> None:
    goal, plain = (objective(tiny_lm, curriculum_share=share, max_tail_blocks=1) for share in (0.5, 0.0))
    ids = some_ids(tiny_lm)
    found = {}
    for progress in (0.0, 0.1, 0.25, 0.39, 0.5, 1.0):
        goal.progress = progress
        found[progress] = float(goal(ids, seeds(3)).kl)
    everything = float(plain(ids, seeds(3)).kl)
    assert found[0.5] == found[1.0] == everything
    assert found[0.0] == found[0.1] != found[0.25] != found[0.39] != everything  # 1, 2 and 3 of 4
    # What is measured is not the curriculum's.
    goal.progress = 0.0
    assert goal.fidelity(ids, seeds(3)).own == plain.fidelity(ids, seeds(3)).own


def test_gists_that_are_alike_cost_something(tiny_lm: BaseLM) -> None:
    ids = some_ids(tiny_lm)
    plain = objective(tiny_lm)(ids, seeds(0))
    spread = float(plain.spread)
    for floor, expected in ((0.5 * spread, 0.0), (min(0.99, 2 * spread), 1 - spread / min(0.99, 2 * spread))):
        goal = objective(tiny_lm, spread_floor=floor)
        found = goal(ids, seeds(0))
        assert float(found.loss.detach() - plain.loss.detach()) == pytest.approx(expected, abs=1e-5)
    # Going down it makes gists differ more.
    goal = objective(tiny_lm, spread_floor=0.99, repeat_share=0.0)
    found = goal(ids, seeds(0))
    found.loss.backward()
    with torch.no_grad():
        for name, parameter in goal.gistnet.named_parameters():
            if parameter.grad is not None and "linear" in name:
                parameter -= 0.1 * parameter.grad / parameter.grad.norm()
    assert float(goal(ids, seeds(0)).spread) > spread


@pytest.mark.parametrize("kl_share", [1.0, 0.25, 0.0])
def test_losses_are_means_over_all_tokens_but_the_last(tiny_lm: BaseLM, kl_share: float) -> None:
    goal = objective(tiny_lm, kl_share=kl_share, max_tail_blocks=2, shown_share=0.4)
    ids = some_ids(tiny_lm)
    found = goal(ids, seeds(4))
    cuts = [np.random.default_rng(seed) for seed in seeds(4)]
    sight = Sight.stacked([random_sight(1, NUM_BLOCKS, rng, max_tail_blocks=2, shown_share=0.4) for rng in cuts])
    windows = goal.dense.read(ids)
    with torch.no_grad():
        hidden = goal.dense.student(windows, goal.dense.gists(windows), sight)
    student = (hidden @ tiny_lm.head_weight.T).log_softmax(-1)[:, :-1]
    assert windows.teacher is not None
    teacher = (windows.teacher @ tiny_lm.head_weight.T).log_softmax(-1)[:, :-1]
    nll = float(F.nll_loss(student.flatten(0, 1), ids[:, K + 1 :].flatten()))
    kl = float(F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean())
    assert float(found.nll) == pytest.approx(nll, abs=1e-4)
    assert found.repeat is None
    if kl_share:
        assert float(found.kl) == pytest.approx(kl, abs=1e-4)
    else:
        assert found.kl is None
    assert float(found.loss.detach()) == pytest.approx(kl_share * kl + (1 - kl_share) * nll, abs=1e-4)


def test_a_share_of_the_tokens_counts_where_gists_do_least(tiny_lm: BaseLM) -> None:
    ids = some_ids(tiny_lm)
    found = objective(tiny_lm, max_tail_blocks=2, scored_share=0.25)(ids, seeds(4))
    goal = objective(tiny_lm, max_tail_blocks=2)
    windows = goal.dense.read(ids)
    assert windows.teacher is not None
    with torch.no_grad():
        hidden = goal.dense.student(windows, goal.dense.gists(windows), goal._cut(windows, seeds(4)))[:, :-1]
    teacher = windows.teacher[:, :-1]
    farthest = (hidden - teacher).square().sum(-1)
    least = farthest.sort(dim=1, descending=True).values[:, round(0.25 * farthest.shape[1]) - 1]
    chosen = (farthest >= least[:, None]).flatten()
    student, taught = (
        (states @ tiny_lm.head_weight.T).log_softmax(-1).flatten(0, 1)[chosen] for states in (hidden, teacher)
    )
    kl = float(F.kl_div(student, taught, log_target=True, reduction="none").sum(-1).mean())
    assert float(found.kl) == pytest.approx(kl, abs=1e-4)
    assert kl > float(goal(ids, seeds(4)).kl)
    found.loss.backward()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_states_are_matched_after_some_layers(tiny_lm: BaseLM, share: float) -> None:
    ids = some_ids(tiny_lm)
    goal = objective(tiny_lm, states_share=share, states_layers=[1, 3])
    found = goal(ids, seeds(4))
    with torch.no_grad():
        windows = goal.dense.read(ids, match=[1, 3])
        states = tiny_lm.hidden_states(windows.embeddings, [1, 3])
        sight = goal._cut(windows, seeds(4))
        _, student = goal.dense.student_states(windows, goal.dense.gists(windows), sight, [1, 3], whole=False)
    missed = []
    for layer in (1, 3):
        teacher = states[layer][:, K:]
        torch.testing.assert_close(windows.matched[layer], teacher)
        missed.append(float(((student[layer] - teacher).square().mean(dim=1) / teacher.var(dim=1)).mean()))
    assert float(found.states) == pytest.approx(np.mean(missed), rel=1e-3)
    kl = 0.0 if found.kl is None else float(found.kl)
    assert (found.kl is None, found.nll is None) == (share == 1, share == 1)
    assert float(found.loss.detach()) == pytest.approx(share * np.mean(missed) + (1 - share) * kl, rel=1e-3)
    found.loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in goal.gistnet.parameters())


@pytest.mark.parametrize("fields", [{"scored_share": 0.25}, {"states_share": 1.0, "states_layers": [2]}])
def test_it_does_not_matter_which_windows_share_a_pass(tiny_lm: BaseLM, fields: dict[str, object]) -> None:
    goal, ids = objective(tiny_lm, **fields), some_ids(tiny_lm)  # type: ignore[arg-type]
    alone = [float(goal(ids[row : row + 1], seeds(4)[row : row + 1]).loss.detach()) for row in range(3)]
    assert float(goal(ids, seeds(4)).loss.detach()) == pytest.approx(np.mean(alone), rel=1e-4)


def test_states_of_long_windows_are_the_whole_windows(tiny_lm: BaseLM) -> None:
    """The net reads 1,024 tokens at a time, the teacher all of them."""
    dense = objective(tiny_lm).dense
    ids = torch.randint(0, tiny_lm.vocab_size, (1, 2048), generator=torch.Generator().manual_seed(1))
    windows = dense.read(ids, teacher=False, match=[2])
    whole = tiny_lm.hidden_states(windows.embeddings, [2])[2]
    torch.testing.assert_close(windows.matched[2], whole[:, K:], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(windows.states[2][:, :1024], whole[:, :1024], rtol=1e-3, atol=1e-4)
    assert (windows.states[2][:, 1024:] - whole[:, 1024:]).abs().max() > 1e-3


def test_the_same_cuts_give_the_same_losses(tiny_lm: BaseLM) -> None:
    goal, ids = objective(tiny_lm), some_ids(tiny_lm)
    first, again, other = (goal(ids, seeds(seed)) for seed in (7, 7, 8))
    assert (first.loss.detach(), first.nll) == (again.loss.detach(), again.nll)
    assert first.nll != other.nll


def test_fidelity_is_by_raw_tokens_of_tail(tiny_lm: BaseLM) -> None:
    goal = objective(tiny_lm, max_tail_blocks=3)
    found = goal.fidelity(some_ids(tiny_lm), seeds(0))
    assert sum(found.num_tokens) == 3 * ((NUM_BLOCKS - 1) * K - 1)
    assert len(found.own) == len(found.full) == 3
    assert found.own != found.shuffled
    assert all(math.isfinite(value) for value in (*found.own, *found.mean_gist))
    windows = goal.dense.read(some_ids(tiny_lm))
    assert windows.teacher is not None
    logits = windows.teacher[:, :-1] @ tiny_lm.head_weight.T
    whole = float(F.cross_entropy(logits.flatten(0, 1), windows.targets[:, :-1].flatten()))
    assert np.average(found.full, weights=found.num_tokens) == pytest.approx(whole, abs=1e-4)


def test_a_net_that_says_the_same_of_everything_is_found_out(tiny_lm: BaseLM) -> None:
    goal = objective(tiny_lm, kind="constant")
    with torch.no_grad():
        goal.dense.gistnet.get_parameter("block_constant").normal_()
    found = goal.fidelity(some_ids(tiny_lm), seeds(0))
    assert found.own == pytest.approx(found.shuffled, abs=1e-5)
    assert found.own == pytest.approx(found.mean_gist, abs=1e-5)
    assert float(goal(some_ids(tiny_lm), seeds(0)).spread) == pytest.approx(0, abs=1e-10)
    assert objective(tiny_lm)(some_ids(tiny_lm), seeds(0)).spread > 0.1
    assert objective(tiny_lm, kind="constant")(some_ids(tiny_lm), seeds(0)).spread == 0  # untrained: zero everywhere


def descended(goal: Distillation, ids: Tensor, name: str) -> list[float]:
    """A loss before each of twelve steps."""
    optimiser = torch.optim.Adam(goal.dense.gistnet.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        found = goal(ids, seeds(3))
        found.loss.backward()
        optimiser.step()
        losses.append(float(getattr(found, name)))
    return losses


def test_descending_brings_the_student_nearer_to_the_teacher(tiny_lm: BaseLM) -> None:
    losses = descended(objective(tiny_lm), some_ids(tiny_lm), "kl")
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_repeating_is_weighed_against_what_is_behind(tiny_lm: BaseLM, share: float) -> None:
    goal, ids = objective(tiny_lm, repeat_share=share), some_ids(tiny_lm)
    found = goal(ids, seeds(2))
    windows = goal.dense.read(ids)
    logits = goal.dense.repeat(windows, goal.dense.gists(windows)).detach() @ tiny_lm.head_weight.T
    again = float(F.cross_entropy(logits.flatten(0, 1), ids.flatten()))
    behind = float(objective(tiny_lm)(ids, seeds(2)).loss.detach())
    assert float(found.repeat) == pytest.approx(again, abs=1e-4)
    assert float(found.loss.detach()) == pytest.approx(share * again + (1 - share) * behind, abs=1e-4)
    assert (found.nll is None) == (share == 1)
    measured = goal.fidelity(ids, seeds(2))
    assert measured.repeat_own == pytest.approx(again, abs=1e-4)
    assert measured.repeat_shuffled != measured.repeat_own


def test_repeating_can_be_learned(tiny_lm: BaseLM) -> None:
    goal, ids = objective(tiny_lm, repeat_share=1.0), some_ids(tiny_lm)
    losses = descended(goal, ids, "repeat")
    assert losses[-1] < losses[0] - 0.02
    measured = goal.fidelity(ids, seeds(0))
    assert measured.repeat_own < measured.repeat_shuffled


def test_nodes_are_learned_and_measured_where_they_are_seen(tiny_lm: BaseLM) -> None:
    goal = objective(tiny_lm)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, tiny_lm.vocab_size, (2, 2048), generator=generator)
    goal(ids, seeds(1, 2)).loss.backward()
    gradient = goal.dense.gistnet.get_parameter("node_constant").grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    found = goal.fidelity(ids, seeds(1, 2))
    assert 0 < found.num_behind_nodes < 2 * 1024
    assert found.node_content != 0
    short = goal.fidelity(ids[:, :1024], seeds(1, 2))
    assert short.num_behind_nodes == 0
    assert math.isnan(short.node_content)
