"""What stands right before a block, for routing keys that reach there.

Shapes: W windows of n blocks of K = 32 tokens, T = n * K; G = W * n blocks; R = `key_reach` tokens; D the LM's hidden
size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from cluster.config import TOKENS_PER_BLOCK


@dataclass(frozen=True)
class LeadIn:
    """What stands right before each of G blocks in the window it was read in, R = `key_reach` tokens."""

    states: Float[Tensor, "G R D"]
    """Of the net's key layer."""
    mask: Bool[Tensor, "G R"]
    """False before the first block of a window."""

    @classmethod
    def of(cls, windows: Float[Tensor, "W T D"], reach: int) -> Self:
        """The lead-in of the blocks of windows of whole blocks, one window's after another's."""
        states, mask = lead_in(windows.unflatten(1, (-1, TOKENS_PER_BLOCK)), reach)
        return cls(states.flatten(0, 1), mask.flatten(0, 1))


def lead_in(blocks: Shaped[Tensor, "W n K *s"], reach: int) -> tuple[Shaped[Tensor, "W n R *s"], Bool[Tensor, "W n R"]]:
    """The last R tokens of the block before each, and whether there is one: before a window's first there is not."""
    ends = blocks[:, :-1, blocks.shape[2] - reach :]
    first = torch.zeros_like(blocks[:, :1, :reach])
    mask = torch.ones(*blocks.shape[:2], reach, dtype=torch.bool, device=blocks.device)
    mask[:, 0] = False
    return torch.cat([first, ends], dim=1), mask
