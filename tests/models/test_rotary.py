from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from cluster.errors import ModelError
from models.positions import Positions
from models.rotary import RotaryOverride, install_rotary_override


class Stack(nn.Module):
    """What a decoder stack needs to have here."""

    def __init__(self, rotary_emb: nn.Module | None) -> None:
        super().__init__()
        if rotary_emb is not None:
            self.rotary_emb = rotary_emb


class Interleaved(LlamaRotaryEmbedding):
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        phases = (position_ids[..., None] * self.inv_freq).repeat_interleave(2, dim=-1)
        return phases.cos(), phases.sin()


def rotary(rope_type: str = "default", **extra: float) -> LlamaRotaryEmbedding:
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **extra}
    return LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=parameters))


@pytest.mark.parametrize(
    "stock", [rotary(), rotary("linear", factor=4.0), rotary("yarn", factor=4.0)], ids=["default", "linear", "yarn"]
)
def test_overridden_phases_equal_the_stock_ones(stock: LlamaRotaryEmbedding) -> None:
    stack = Stack(stock)
    override = install_rotary_override(stack, "test")
    assert isinstance(override, RotaryOverride)
    assert stack.rotary_emb is override
    index = torch.arange(0, 2000, 7)[None]
    x = torch.zeros(1, index.shape[1], 64)
    expected = override(x, position_ids=index)
    cos, sin = override.phases(Positions.of_tokens(index), torch.zeros(1, dtype=torch.int64), torch.float32)
    with override.using(cos, sin):
        assert override(x, position_ids=index * 0)[0] is cos
    assert (cos - expected[0]).abs().max() < 1e-3
    assert (sin - expected[1]).abs().max() < 1e-3
    assert torch.equal(override(x, position_ids=index)[0], expected[0])


def test_an_error_inside_ends_the_override() -> None:
    override = RotaryOverride(rotary())
    with pytest.raises(KeyError), override.using(torch.zeros(1), torch.zeros(1)):
        raise KeyError
    assert override(torch.zeros(1, 3, 64), torch.arange(3)[None])[0].shape == (1, 3, 16)


@pytest.mark.parametrize(
    ("stock", "reason"),
    [
        (None, "no rotary_emb"),
        (nn.Identity(), "one set of rotary frequencies"),
        (rotary("dynamic", factor=2.0), "change with the input's length"),
        (Interleaved(LlamaConfig(hidden_size=64, num_attention_heads=4)), "layout is not Llama's"),
    ],
)
def test_other_architectures_are_left_alone_and_say_why(stock: nn.Module | None, reason: str) -> None:
    stack = Stack(stock)
    refusal = install_rotary_override(stack, "test")
    assert isinstance(refusal, ModelError)
    assert reason in str(refusal)
    assert getattr(stack, "rotary_emb", None) is stock
