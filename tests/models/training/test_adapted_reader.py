"""Distillation with an adapter on the reader: the student's alone, beside the net the only thing that learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, GistNetConfig
from cluster.training_config import AdapterConfig, ObjectiveConfig
from models.adapter import fresh_adapter
from models.base_lm import BaseLM
from models.gistnet import build_gistnet
from models.training.dense_pass import DensePass
from models.training.distillation import Distillation
from models.training.flops import flops_per_window

SEEDS = [(4, row) for row in range(3)]


def objective(config: BaseLMConfig, rank: int, **fields: object) -> Distillation:
    """On a model of its own, as an adapter stays in."""
    lm = BaseLM.load(config)
    modules = ["q_proj", "v_proj", "down_proj"]
    adapter = fresh_adapter(lm.files, AdapterConfig(rank=rank, target_modules=modules))
    if adapter is not None:
        lm.adapt(adapter, trained=True)
    net = build_gistnet(GistNetConfig(lm_layers=2, key_layer=1), lm).train()
    return Distillation(DensePass(lm, net), ObjectiveConfig(**fields))  # type: ignore[arg-type]


def some_ids(num_blocks: int = 5) -> Tensor:
    return torch.randint(0, 250, (3, num_blocks * K), generator=torch.Generator().manual_seed(1))


def adapter_weights(goal: Distillation) -> dict[str, nn.Parameter]:
    return {name: p for name, p in goal.named_parameters() if name.startswith("adapter.")}


def descend(goal: Distillation, num_steps: int) -> list[float]:
    """The loss before each step."""
    optimiser = torch.optim.Adam(goal.parameters(), lr=3e-3)
    losses = []
    for _ in range(num_steps):
        optimiser.zero_grad()
        found = goal(some_ids(), SEEDS)
        found.loss.backward()
        optimiser.step()
        losses.append(float(found.loss.detach()))
    return losses


@pytest.mark.parametrize(
    "fields", [{}, {"repeat_share": 0.5}, {"repeat_share": 1.0}, {"states_share": 1.0, "states_layers": [1, 4]}]
)
def test_gradients_reach_the_adapter_and_the_net_alone(tiny_config: BaseLMConfig, fields: dict[str, object]) -> None:
    plain, goal = objective(tiny_config, 0, **fields), objective(tiny_config, 2, **fields)
    assert not adapter_weights(plain)
    assert set(plain.state_dict()) < set(goal.state_dict())
    without, found = plain(some_ids(), SEEDS), goal(some_ids(), SEEDS)
    assert torch.equal(found.loss, without.loss), "untrained, it changes nothing"
    without.loss.backward()
    found.loss.backward()
    for name, parameter in plain.named_parameters():
        mine, other = parameter.grad, goal.get_parameter(name).grad
        assert (mine is None) == (other is None)
        assert mine is None or other is None or torch.equal(mine, other)
    weights = adapter_weights(goal)
    assert len(weights) == 2 * 3 * goal.dense.lm.num_layers
    for name, weight in weights.items():
        assert weight.grad is not None
        assert bool(weight.grad.any()) == ("lora_B" in name), "A is not felt before B has moved"
    trained = set(goal.parameters())
    for parameter in goal.dense.lm._model.parameters():
        assert parameter in trained or (parameter.grad is None and not parameter.requires_grad)


def test_the_teacher_and_what_the_net_reads_stay_the_stock_models(tiny_config: BaseLMConfig) -> None:
    goal, plain = (objective(tiny_config, rank, kl_share=0.5, max_tail_blocks=2) for rank in (2, 0))
    ids = some_ids()
    before = goal.fidelity(ids, SEEDS)
    begun = {name: weight.detach().clone() for name, weight in adapter_weights(goal).items()}
    descend(goal, 4)
    assert all(not torch.equal(weight, begun[name]) for name, weight in adapter_weights(goal).items())
    read, stock = (one.dense.read(ids, match=[1, 3]) for one in (goal, plain))
    assert torch.equal(read.embeddings, stock.embeddings)
    assert read.teacher is not None
    assert stock.teacher is not None
    assert torch.equal(read.teacher, stock.teacher)
    for mine, its in ((read.states, stock.states), (read.matched, stock.matched)):
        assert all(torch.equal(mine[layer], state) for layer, state in its.items())
    after = goal.fidelity(ids, SEEDS)
    assert after.full == before.full == plain.fidelity(ids, SEEDS).full
    # Another reader of the same gists.
    gists = goal.dense.gists(read)
    sight = goal._cut(read, SEEDS)
    with torch.no_grad():
        adapted, stocks = goal.dense.student(read, gists, sight), plain.dense.student(stock, gists, sight)
        assert not torch.equal(adapted, stocks)
        assert not torch.equal(goal.dense.repeat(read, gists), plain.dense.repeat(stock, gists))


def test_with_an_adapter_the_student_comes_nearer(tiny_config: BaseLMConfig) -> None:
    adapted, plain = (descend(objective(tiny_config, rank), 12) for rank in (4, 0))
    assert adapted[0] == plain[0]
    assert adapted[-1] < plain[-1] - 0.02


def test_a_model_in_bfloat16_trains_an_adapter_in_float32(tiny_config: BaseLMConfig) -> None:
    goal = objective(replace(tiny_config, dtype="bfloat16"), 2)
    goal(some_ids(), SEEDS).loss.backward()
    for name, weight in adapter_weights(goal).items():
        assert weight.dtype == torch.float32
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        assert bool(weight.grad.any()) == ("lora_B" in name)


@pytest.mark.parametrize("fields", [{}, {"repeat_share": 1.0}])
def test_its_multiplications_are_counted_as_its_own(tiny_config: BaseLMConfig, fields: dict[str, object]) -> None:
    needed, counted = [], []
    for rank in (0, 8):
        goal = objective(tiny_config, rank, **fields)
        ids = some_ids(8)[:1]
        with FlopCounterMode(display=False) as counter:
            goal(ids, SEEDS[:1]).loss.backward()
        counted.append(counter.get_total_flops())
        needed.append(flops_per_window(goal.dense.lm, goal.gistnet, ids.shape[1], goal.config))
    assert needed[1] - needed[0] == pytest.approx(counted[1] - counted[0], rel=0.02)
    assert counted[1] > counted[0]
