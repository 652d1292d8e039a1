"""A model's rotary module that lets one call bring its own positions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import ModelError
from models.positions import Positions, rotary_cos_sin

# Variants whose frequencies depend on the length of the input have no fixed phases to override.
_STATIC_ROPE_TYPES = {"default", "linear", "llama3", "yarn"}
_PROBE_TOKENS = 4


class RotaryOverride(nn.Module):
    """Stands in for `rotary_emb`: the stock phases, or those of `using` while it is active.

    transformers hands (cos, sin) of this one module to every layer. Explicit positions never go through
    `position_ids`: transformers computes phases from them in float32 and reads a jump in them as the border
    between two packed sequences, which it would then hide from each other.

    One call at a time: the override is an attribute of the module.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock
        self._phases: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._phases is None:
            return self.stock(x, *args, **kwargs)
        return self._phases

    @contextlib.contextmanager
    def using(self, cos: Tensor, sin: Tensor) -> Iterator[None]:
        """Give these (B, T, R) phases to every layer inside the block."""
        self._phases = (cos, sin)
        try:
            yield
        finally:
            self._phases = None

    def phases(self, positions: Positions, origin_half_tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of shape (B, T, R) at `positions`, with the stock module's frequencies."""
        inverse_frequencies: Any = self.stock.inv_freq
        scaling = float(getattr(self.stock, "attention_scaling", 1.0))
        return rotary_cos_sin(positions, inverse_frequencies, origin_half_tokens, scaling=scaling, dtype=dtype)


def install_rotary_override(stack: Any, model_id: str) -> RotaryOverride | ModelError:
    """Replace `stack.rotary_emb`, or say why this architecture does not allow it and leave it alone."""

    def refusal(reason: str) -> ModelError:
        return ModelError(
            f"{model_id} ({type(stack).__name__}) cannot take explicit positions: {reason}. "
            "Use a Llama-like model, or its default positions"
        )

    stock = getattr(stack, "rotary_emb", None)
    if not isinstance(stock, nn.Module):
        return refusal("it has no rotary_emb module")
    frequencies = getattr(stock, "inv_freq", None)
    rope_type = getattr(stock, "rope_type", "default")
    if not isinstance(frequencies, Tensor) or frequencies.dim() != 1:
        return refusal("its layers do not share one set of rotary frequencies")
    if rope_type not in _STATIC_ROPE_TYPES:
        return refusal(f"its rotary frequencies change with the input's length (rope_type={rope_type!r})")
    override = RotaryOverride(stock)
    # Interleaved layouts (GPT-J, Cohere) order the frequencies otherwise; nothing in a config says so.
    index = torch.arange(_PROBE_TOKENS, device=frequencies.device)[None]
    probe = torch.zeros(1, _PROBE_TOKENS, 1, device=frequencies.device)
    with torch.no_grad():
        expected = stock(probe, index)
        ours = override.phases(Positions.of_tokens(index), index.new_zeros(1), torch.float32)
    if any(a.shape != b.shape or not torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, ours, strict=True)):
        return refusal("its rotary layout is not Llama's")
    stack.rotary_emb = override
    return override
