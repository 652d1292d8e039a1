"""Attention by tiles is causal attention: whatever the rows, the past, and where tiles end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

import models.tiled_attention
from cluster.config import BaseLMConfig
from models.base_lm import BaseLM
from models.tiled_attention import ATTENTION_NAME, TILE_ENTRIES, attend_in_tiles, is_plainly_causal, tiles_are_faster

IDS = torch.randint(0, 256, (2, 150), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tile_scores", [1, 2**14, 2**30])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize(
    ("num_rows", "entries", "past"), [(1, 1, 9), (2, 40, 0), (1, 2 * TILE_ENTRIES, 7), (3, 150, 33)]
)
def test_is_causal_attention(
    monkeypatch: pytest.MonkeyPatch, tile_scores: int, heads: int, groups: int, num_rows: int, entries: int, past: int
) -> None:
    monkeypatch.setattr(models.tiled_attention, "TILE_SCORES", tile_scores)
    torch.manual_seed(entries)
    query = torch.randn(num_rows, heads, entries, 8)
    key, value = torch.randn(2, num_rows, groups, past + entries, 8)
    seen = torch.ones(entries, past + entries, dtype=torch.bool).tril(past)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True)
    found, _ = attend_in_tiles(nn.Identity(), query, key, value, None, 0.3)
    torch.testing.assert_close(found.transpose(1, 2), expected)


def test_values_may_have_another_width_than_keys() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 70, 24), torch.randn(2, 2, 80, 24)
    value = torch.randn(2, 2, 80, 16)
    seen = torch.ones(70, 80, dtype=torch.bool).tril(10)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True)
    found, _ = attend_in_tiles(nn.Identity(), query, key, value, None, 0.3)
    torch.testing.assert_close(found.transpose(1, 2), expected)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Entries of every call that attends by tiles, on a CPU without AMX."""
    seen: list[int] = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False}, raising=False)

    def counting(module: nn.Module, query: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, None]:
        seen.append(query.shape[2])
        return attend_in_tiles(module, query, *rest, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION_NAME, counting)
    return seen


def test_a_bfloat16_model_reads_by_tiles_as_exactly_as_otherwise(
    tiny_lm: BaseLM, tiny_bf16_config: BaseLMConfig, calls: list[int]
) -> None:
    lm = BaseLM.load(tiny_bf16_config)
    with torch.inference_mode():
        exact = tiny_lm.logits(tiny_lm.embed(IDS))
        embeds = lm.embed(IDS)
        tiled = lm.logits(embeds)
        assert calls == [150] * lm.num_layers
        cache = lm.new_cache()
        pieces = torch.cat([lm.logits(embeds[:, first : first + 60], cache=cache) for first in (0, 60, 120)], dim=1)
        calls.clear()
        masked = lm.logits(embeds, attention_mask=torch.ones(2, 1, 150, 150, dtype=torch.bool).tril())
    assert not calls

    def error(logits: torch.Tensor) -> float:
        return float((logits.float() - exact).abs().mean())

    assert error(tiled) < 1.2 * error(masked)
    assert error(pieces) < 1.2 * error(masked)


@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        ({}, True),
        ({"sliding_window": 16}, False),
        ({"sliding_window": 16, "use_sliding_window": False}, True),
        ({"layer_types": ["full_attention", "sliding_attention"]}, False),
        ({"sliding_window": 16, "layer_types": ["full_attention", "full_attention"]}, True),
        ({"attn_logit_softcapping": 50.0}, False),
    ],
)
def test_models_that_attend_otherwise_keep_their_attention(changes: dict[str, object], plain: bool) -> None:
    assert is_plainly_causal(SimpleNamespace(**changes)) == plain


def test_a_model_whose_keys_have_biases_keeps_its_attention(tiny_bf16_config: BaseLMConfig, calls: list[int]) -> None:
    lm = BaseLM.load(tiny_bf16_config)
    layer: Any = lm._layers[0]
    keys = layer.self_attn.k_proj
    keys.bias = nn.Parameter(torch.zeros(keys.out_features, dtype=torch.bfloat16))
    biased = BaseLM(lm._model, lm.files, has_head=True)
    with torch.inference_mode():
        biased.logits(biased.embed(IDS))
    assert not calls


def test_a_cpu_with_amx_attends_by_the_fused_kernel(
    monkeypatch: pytest.MonkeyPatch, tiny_bf16_config: BaseLMConfig, calls: list[int]
) -> None:
    assert tiles_are_faster()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert not tiles_are_faster()
    lm = BaseLM.load(tiny_bf16_config)
    lm.logits(lm.embed(IDS))
    assert not calls


def test_a_pytorch_that_does_not_tell_attends_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert tiles_are_faster()


def test_nothing_else_is_read_by_tiles(tiny_lm: BaseLM, tiny_bf16_config: BaseLMConfig, calls: list[int]) -> None:
    tiny_lm.logits(tiny_lm.embed(IDS))
    lm = BaseLM.load(tiny_bf16_config)
    embeds = lm.embed(IDS).requires_grad_()
    lm.logits(embeds).float().sum().backward()
    assert embeds.grad is not None
    lm.logits(lm.embed(IDS[:, :1]))  # a token decoded
    assert not calls
