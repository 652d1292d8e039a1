"""From our configuration to DeepSpeed's and torch's."""

from __future__ import annotations

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


def test_matrices_decay_and_nothing_else() -> None:
    net = build_gistnet(GistNetConfig(lm_layers=3), Shape())
    decaying, others = parameter_groups(net, 0.5)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert {p.shape for p in others["params"]} >= {net.get_parameter("block_constant").shape}
    assert all(p.dim() >= 2 for p in decaying["params"])
    names = {id(p): name for name, p in net.named_parameters()}
    assert "block_head.adapter.linear.weight" in {names[id(p)] for p in decaying["params"]}
    assert len(decaying["params"]) + len(others["params"]) == len(names)
    frozen = nn.Linear(2, 2)
    frozen.weight.requires_grad_(False)
    (only,) = parameter_groups(frozen, 0.5)
    assert only["weight_decay"] == 0.0
    assert only["params"][0] is frozen.bias


def test_cpus_are_shared_out_and_some_left_to_the_feeds() -> None:
    assert worker_resources(1, 0.0, 2.0)["CPU"] == pytest.approx(1.9)
    assert worker_resources(2, 0.0, 2.0)["CPU"] == pytest.approx(0.9)
    assert worker_resources(8, 1.0, 64.0) == {"CPU": pytest.approx(7.9), "GPU": 1.0}
