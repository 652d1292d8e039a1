"""The count of a step's multiplications, against what torch counts; and what is measured beside it."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import GistNetConfig, GistNetKind
from cluster.training_config import ObjectiveConfig
from models.base_lm import BaseLM
from models.gistnet import build_gistnet
from models.training.dense_pass import DensePass
from models.training.distillation import Distillation
from models.training.flops import flops_per_window, peak_flops
from models.training.stage_clock import StageClock


@pytest.mark.parametrize(
    ("kl_share", "repeat_share", "kind", "num_vectors", "num_tokens"),
    [
        (1.0, 0.0, "windowed", 1, 256),
        (0.0, 0.0, "windowed", 1, 256),
        (1.0, 0.5, "windowed", 2, 256),
        (1.0, 1.0, "windowed", 1, 256),
        (1.0, 0.0, "block", 1, 256),
        (1.0, 0.0, "windowed", 1, 2048),
        (1.0, 1.0, "windowed", 1, 2048),
    ],
)
def test_the_count_is_torchs_but_for_attention(
    tiny_lm: BaseLM, kl_share: float, repeat_share: float, kind: GistNetKind, num_vectors: int, num_tokens: int
) -> None:
    config = ObjectiveConfig(kl_share=kl_share, repeat_share=repeat_share)
    net = build_gistnet(GistNetConfig(kind=kind, lm_layers=2, key_layer=1, num_vectors=num_vectors), tiny_lm).train()
    with FlopCounterMode(display=False) as counter:  # knows no attention kernels of CPUs
        ids = torch.randint(0, 100, (1, num_tokens))
        Distillation(DensePass(tiny_lm, net), config)(ids, [[0]]).loss.backward()
    num_blocks, num_nodes = num_tokens // K, num_tokens // 1024 if num_tokens > 1024 else 0
    entries = (num_blocks + num_nodes) * num_vectors + num_tokens - K
    lower = (net.lm_layer or 0) / tiny_lm.num_layers
    attended = max(1, num_nodes) * min(num_tokens, 1024) ** 2 * lower if num_nodes or repeat_share == 1 else 0.0
    if repeat_share < 1:
        attended += num_tokens**2 if kl_share else num_tokens**2 * lower
        attended += 0 if num_tokens > 256 else 3 * entries**2  # products within a band torch does count
    if repeat_share:
        attended += 3 * num_blocks * (num_vectors + K - 1) ** 2
    attention = 2 * tiny_lm.num_layers * tiny_lm.attention_width * attended
    counted = flops_per_window(tiny_lm, net, num_tokens, config) - attention
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_passes_end_with_the_last_layer_that_is_matched(tiny_lm: BaseLM, share: float) -> None:
    net = build_gistnet(GistNetConfig(lm_layers=2, key_layer=1), tiny_lm).train()
    config = ObjectiveConfig(states_share=share, states_layers=[1, 3])
    with FlopCounterMode(display=False) as counter:
        Distillation(DensePass(tiny_lm, net), config)(torch.randint(0, 100, (1, 256)), [[0]]).loss.backward()
    layers = tiny_lm.num_layers if share < 1 else 3
    attended = (256**2 + 3 * (8 + 256 - K) ** 2) * layers / tiny_lm.num_layers
    attention = 2 * tiny_lm.num_layers * tiny_lm.attention_width * attended
    assert counter.get_total_flops() == pytest.approx(flops_per_window(tiny_lm, net, 256, config) - attention, rel=0.02)


@pytest.mark.parametrize(("share", "num_readings"), [(0.5, 3), (1.0, 2)])
@pytest.mark.parametrize("repeat_share", [0.5, 1.0])
def test_inner_steps_read_what_is_behind_gists_again(
    tiny_lm: BaseLM, share: float, num_readings: int, repeat_share: float
) -> None:
    net = build_gistnet(GistNetConfig(lm_layers=2, key_layer=1), tiny_lm).train()

    def both(config: ObjectiveConfig) -> tuple[float, int]:
        with FlopCounterMode(display=False) as counter:
            Distillation(DensePass(tiny_lm, net), config)(torch.randint(0, 100, (1, 256)), [[0]]).loss.backward()
        return flops_per_window(tiny_lm, net, 256, config), counter.get_total_flops()

    plain_needed, plain_counted = both(ObjectiveConfig(repeat_share=repeat_share))
    needed, counted = both(ObjectiveConfig(repeat_share=repeat_share, inner_steps=2, inner_share=share))
    attended = 3 * 8 * K**2 + (3 * (8 + 256 - K) ** 2 if repeat_share < 1 else 0)
    attention = 2 * tiny_lm.num_layers * tiny_lm.attention_width * attended * (num_readings - 1)
    assert needed - plain_needed - attention == pytest.approx(counted - plain_counted, rel=0.02)


def test_tokens_that_do_not_count_need_no_head(tiny_lm: BaseLM) -> None:
    net = build_gistnet(GistNetConfig(lm_layers=2, key_layer=1), tiny_lm).train()

    def both(share: float) -> tuple[float, int]:
        config = ObjectiveConfig(scored_share=share)
        with FlopCounterMode(display=False) as counter:
            Distillation(DensePass(tiny_lm, net), config)(torch.randint(0, 100, (1, 256)), [[0]])
        return flops_per_window(tiny_lm, net, 256, config), counter.get_total_flops()

    (all_needed, all_counted), (some_needed, some_counted) = both(1.0), both(0.5)
    assert all_needed - some_needed == pytest.approx(all_counted - some_counted, rel=0.02)
    assert some_needed < all_needed


def test_the_peak_is_no_less_than_a_products_own_speed() -> None:
    left = torch.randn(512, 512)
    torch.mm(left, left)
    started = time.perf_counter()
    torch.mm(left, left)
    own = 2 * 512**3 / (time.perf_counter() - started)
    assert own < 3 * peak_flops(torch.device("cpu"), torch.float32)


def test_laps_add_up_and_begin_anew() -> None:
    clock = StageClock(torch.device("cpu"))
    for stage, seconds in (("a", 0.02), ("b", 0.04), ("a", 0.02)):
        time.sleep(seconds)
        clock.lap(stage)
    found = clock.seconds()
    assert list(found) == ["a", "b"]
    assert found["a"] >= 0.04
    assert found["b"] >= 0.04
    clock.restart()
    assert clock.seconds() == {}
