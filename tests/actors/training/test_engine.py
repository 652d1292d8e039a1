"""From our configuration to DeepSpeed's and torch's."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from torch import nn

from actors.training.engine import FINAL_SHARE, deepspeed_config, learning_rate_share, parameter_groups
from actors.training.fit import worker_resources
from cluster.config import GistNetConfig
from cluster.errors import ConfigError
from cluster.training_config import TrainingConfig
from models.gistnet import build_gistnet
from tests.models.gistnet.nets import Shape

CONFIG = TrainingConfig(num_steps=100, warmup_steps=9, windows_per_step=8, windows_per_pass=2)


def test_the_learning_rate_rises_then_falls() -> None:
    shares = [learning_rate_share(step, CONFIG) for step in range(101)]
    assert shares[:10] == pytest.approx([0.1 * (step + 1) for step in range(9)] + [1.0])
    assert all(later <= sooner for sooner, later in pairwise(shares[9:]))
    assert shares[-1] == pytest.approx(FINAL_SHARE)
    assert learning_rate_share(500, CONFIG) == pytest.approx(FINAL_SHARE)


def test_passes_are_what_is_left_to_each_worker() -> None:
    for num_workers, passes in ((1, 4), (2, 2), (4, 1)):
        assert deepspeed_config(CONFIG, num_workers)["gradient_accumulation_steps"] == passes
    with pytest.raises(ConfigError, match="multiple"):
        deepspeed_config(CONFIG, 3)


def test_matrices_decay_and_wide_layers_learn_slower() -> None:
    net = build_gistnet(GistNetConfig(lm_layers=3), Shape())
    config = replace(CONFIG, weight_decay=0.5, learning_rate=0.1, base_width=16)
    found = {id(p): group for group in parameter_groups(net, config) for p in group["params"]}
    assert len(found) == len(list(net.parameters()))
    for name, parameter in net.named_parameters():
        group = found[id(parameter)]
        assert group["weight_decay"] == (0.5 if parameter.dim() >= 2 and min(parameter.shape) > 1 else 0.0)
        layer = net.get_submodule(name.rpartition(".")[0])
        share = 16 / layer.weight.shape[1] if isinstance(layer, nn.Linear) and parameter is layer.weight else 1.0
        assert group["lr"] == pytest.approx(0.1 * share)
    adapter = net.get_submodule("block_head.adapter")
    assert found[id(adapter.get_parameter("linear.weight"))]["lr"] == pytest.approx(
        0.1 * 16 / (5 * 2 * Shape.hidden_size)
    )
    assert {group["lr"] for group in parameter_groups(net, replace(config, base_width=0))} == {0.1}


def test_what_is_frozen_is_in_no_group() -> None:
    frozen = nn.Linear(2, 2)
    frozen.weight.requires_grad_(False)
    (only,) = parameter_groups(frozen, CONFIG)
    assert only["weight_decay"] == 0.0
    assert only["params"][0] is frozen.bias


def test_cpus_are_shared_out_and_some_left_to_the_feeds() -> None:
    assert worker_resources(1, 0.0, 2.0)["CPU"] == pytest.approx(1.9)
    assert worker_resources(2, 0.0, 2.0)["CPU"] == pytest.approx(0.9)
    assert worker_resources(8, 1.0, 64.0) == {"CPU": pytest.approx(7.9), "GPU": 1.0}
