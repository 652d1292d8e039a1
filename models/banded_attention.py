"""Attention of long sequences in which nearly every entry sees a few summaries and its neighbours, and nothing else.

A mask over all pairs of entries computes them all and throws most away: at 1,024 entries that see 32 summaries and up
to 160 neighbours, five of six. Here only pairs within the band exist. Plain matrix products, because they train some
times faster than masked SDPA on CPUs.

Shapes: B rows; a sequence of P summaries and then n blocks of K entries, T = P + n·K; a band that reaches back w
blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from cluster.errors import ModelError

ATTENTION_NAME = "megacontext_banded"


@dataclass(frozen=True)
class BandedMask:
    """Who sees whom; within a block always causally, and no summary sees an entry of a block.

    Raises:
        ModelError: parts that do not fit each other, or an entry that may see nothing.
    """

    summaries: Bool[Tensor, "B P P"]
    """True: the row's summary sees the column's."""
    to_summaries: Bool[Tensor, "B n P"]
    """True: all entries of a block see a summary."""
    back: Bool[Tensor, "B n w"]
    """True: all entries of a block see the whole block `w - j` blocks before it; blocks before the first are never
    seen, whatever stands there."""
    block_size: int
    """K."""

    def __post_init__(self) -> None:
        rows, blocks, width = self.to_summaries.shape
        if self.summaries.shape != (rows, width, width) or self.back.shape[:2] != (rows, blocks):
            raise ModelError(
                f"a banded mask of summaries {tuple(self.summaries.shape)}, to_summaries "
                f"{tuple(self.to_summaries.shape)} and back {tuple(self.back.shape)} does not fit together"
            )
        if not bool(self.summaries.any(dim=-1).all()):
            raise ModelError("every summary must see at least itself")

    @property
    def num_summaries(self) -> int:
        """P."""
        return self.summaries.shape[1]

    @property
    def num_blocks(self) -> int:
        """n."""
        return self.to_summaries.shape[1]

    @property
    def num_entries(self) -> int:
        """T."""
        return self.num_summaries + self.num_blocks * self.block_size

    def to(self, device: torch.device) -> BandedMask:
        """The same on a device."""
        parts = (self.summaries.to(device), self.to_summaries.to(device), self.back.to(device))
        return BandedMask(*parts, self.block_size)

    def of_blocks(self) -> Bool[Tensor, "B n K P+(w+1)*K"]:
        """What each entry of each block sees: of all summaries, and of the blocks of its band, the oldest first."""
        size, reach = self.block_size, self.back.shape[2]
        block = torch.arange(self.num_blocks, device=self.back.device)[:, None]
        exists = block >= torch.arange(reach, 0, -1, device=self.back.device)
        far = torch.cat((self.to_summaries, (self.back & exists).repeat_interleave(size, dim=2)), dim=2)
        far = far[:, :, None].expand(-1, -1, size, -1)
        own = torch.ones(size, size, dtype=torch.bool, device=far.device).tril()
        return torch.cat((far, own.expand(*far.shape[:2], size, size)), dim=3)


def attend_within_bands(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    bands: tuple[BandedMask, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function: (B, heads, T, d) queries, (B, groups, T, d) keys and values.

    Args:
        module: the layer; not used.
        query, key, value: of all entries.
        attention_mask: not used; `bands` stand for it.
        scaling: of the scores.
        dropout: not used; the model is frozen.
        bands: a mask, and what `of_blocks` made of it, once for all layers.

    Returns:
        The (B, T, heads, d) output, as transformers expects it.
    """
    del module, attention_mask, dropout
    assert bands is not None  # only `BaseLM` chooses this function, and gives them
    mask, of_blocks = bands
    num_rows, num_heads, num_entries, width = query.shape
    groups = key.shape[1]
    per_group = num_heads // groups
    # (B, groups, heads of a group, T, d): the queries of a group meet its keys in one product.
    queries = query.reshape(num_rows, groups, per_group, num_entries, width)
    p, n, size = mask.num_summaries, mask.num_blocks, mask.block_size
    keys, values = key[:, :, :p], value[:, :, :p]

    of_summaries = queries[:, :, :, :p] @ keys[:, :, None].transpose(-1, -2)
    seen = _weights(of_summaries, mask.summaries[:, None, None], scaling)
    summaries_out = seen @ values[:, :, None]  # (B, groups, heads, P, d)

    # (B, groups, n, heads · K, d)
    raw = queries[:, :, :, p:].unflatten(3, (n, size)).transpose(2, 3).flatten(3, 4)
    near_keys, near_values = (_bands(part[:, :, p:], n, size, mask.back.shape[2]) for part in (key, value))
    far = (raw.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, (n, -1))
    scores = torch.cat((far, raw @ near_keys.transpose(-1, -2)), dim=-1)
    weights = _weights(scores.unflatten(3, (per_group, size)), of_blocks[:, None, :, None], scaling).flatten(3, 4)
    near = weights[..., p:] @ near_values
    out = near + (weights[..., :p].flatten(2, 3) @ values).unflatten(2, (n, -1))
    blocks_out = out.unflatten(3, (per_group, size)).transpose(2, 3).flatten(3, 4)  # (B, groups, heads, n · K, d)
    output = torch.cat((summaries_out, blocks_out), dim=3).flatten(1, 2)
    return output.transpose(1, 2), None


def _weights(scores: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """Softmax in float32 over what is seen, as SDPA does it whatever the model computes in."""
    return (scores.float() * scaling).masked_fill(~seen, float("-inf")).softmax(dim=-1).to(scores.dtype)


def _bands(entries: Tensor, num_blocks: int, size: int, reach: int) -> Tensor:
    """(B, groups, n·K, d) to (B, groups, n, (w+1)·K, d): every block with those before it, zeros before the first."""
    blocks = F.pad(entries.unflatten(2, (num_blocks, size)), (0, 0, 0, 0, reach, 0))
    return torch.cat([blocks[:, :, first : first + num_blocks] for first in range(reach + 1)], dim=3)


AttentionInterface.register(ATTENTION_NAME, attend_within_bands)
