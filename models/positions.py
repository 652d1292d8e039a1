"""Where entries stand on the timeline, and the rotary phases that follow from it.

Shapes: B rows, T entries, R rotary dimensions of a head (the phases are computed for R/2 frequencies).

Positions are int64 in half tokens: the token with index t stands at 2t, and a gist of the tokens a … b-1
stands at a + b - 1, its span's exact centre. Phases are computed in float64 from the int64 distance to an
origin: float32 phases are wrong by up to 1 rad at position 2^24, and by anything at 1e9.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from cluster.errors import ModelError


@dataclass(frozen=True)
class Positions:
    """The place of every entry of a batch.

    Raises:
        ModelError: not int64 of shape (B, T), or two fields of different shapes.
    """

    half_tokens: Int64[Tensor, "B T"]
    """Centre of each entry's span, in half tokens."""

    sigma_tokens: Float32[Tensor, "B T"] | None = None
    """Width (standard deviation) of each entry's span in tokens. None: a point. A wide span's phases are
    blurred: the mean of exp(iωx) over x ~ N(μ, σ²) is exp(iωμ)·exp(-(ωσ)²/2)."""

    def __post_init__(self) -> None:
        if self.half_tokens.dtype != torch.int64 or self.half_tokens.dim() != 2:
            raise ModelError(
                f"positions must be int64 of shape (B, T), not {self.half_tokens.dtype} {tuple(self.half_tokens.shape)}"
            )
        if self.sigma_tokens is not None and self.sigma_tokens.shape != self.half_tokens.shape:
            raise ModelError("sigma_tokens must have the shape of half_tokens")

    def to(self, device: torch.device) -> Positions:
        """The same positions on a device."""
        sigma = None if self.sigma_tokens is None else self.sigma_tokens.to(device)
        return Positions(self.half_tokens.to(device), sigma)

    @staticmethod
    def of_tokens(indices: Int64[Tensor, "B T"]) -> Positions:
        """Positions of single tokens, from their indices."""
        return Positions(indices * 2)


def global_positions(first_tokens: Int64[Tensor, "B T"], num_tokens: Int64[Tensor, "B T"]) -> Positions:
    """The `global` policy: every entry at the centre of its span's true token indices.

    Args:
        first_tokens: index of each entry's first real token on the timeline.
        num_tokens: real tokens of each entry's span; 1 for a raw token.
    """
    return Positions(2 * first_tokens + num_tokens - 1)


def rotary_cos_sin(
    positions: Positions,
    inverse_frequencies: Float[Tensor, " R_half"],
    origin_half_tokens: Int64[Tensor, " B"],
    *,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B T R"]]:
    """Rotary cos and sin (RoFormer, Su et al. 2021, eq. 34), in Llama's layout: the frequencies, twice.

    Only distances matter to attention, so any origin gives the same result as long as all entries that attend
    to each other share it; one near the entries keeps the float64 phases exact.

    Args:
        inverse_frequencies: radians per token of each frequency.
        origin_half_tokens: the zero point of each row, in half tokens.
        scaling: factor on cos and sin that some RoPE variants (YaRN) ask for.
        dtype: of the result; everything before is float64.
    """
    distance = positions.half_tokens - origin_half_tokens[:, None]  # exact in int64
    tokens = distance.to(torch.float64) * 0.5
    frequencies = inverse_frequencies.to(torch.float64)
    phases = tokens[..., None] * frequencies  # (B, T, R/2) radians
    amplitude: Tensor | float = scaling
    if positions.sigma_tokens is not None:
        spread = positions.sigma_tokens.to(torch.float64)[..., None] * frequencies
        amplitude = scaling * torch.exp(-0.5 * spread**2)
    cos, sin = phases.cos() * amplitude, phases.sin() * amplitude
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((sin, sin), dim=-1).to(dtype)
