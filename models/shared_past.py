"""Many short rows that share a long past: attention to one copy of it instead of one a row.

A batch whose rows differ in their last entries only would otherwise hold, and copy on every call, the whole past for
each row: at 600 cached entries that took as long as the forward pass itself. One softmax runs over the shared past,
each row's own past, and the entries of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cluster.errors import ModelError
from models.kv_cache import KVCache

ATTENTION_NAME = "megacontext_shared_past"


@dataclass(frozen=True)
class SharedPast:
    """What every row of a call has read, and what each has read besides. Neither is extended by the call.

    Raises:
        ModelError: caches with different origins, or a shared one of several rows.
    """

    shared: KVCache
    """One row, seen by all."""
    own: KVCache | None = None
    """One row each; None where the rows differ in nothing."""

    def __post_init__(self) -> None:
        if self.shared.num_rows != 1:
            raise ModelError(f"the shared past must have one row, not {self.shared.num_rows}")
        if self.own is not None and self.own.settled_origin != self.shared.settled_origin:
            raise ModelError("shared and own past must be made with one explicit origin")

    def origin(self, num_rows: int, device: torch.device) -> Tensor:
        """The zero point of every row's positions, (B,) int64 in half tokens.

        Raises:
            ModelError: the past was made without an explicit origin, or for another number of rows.
        """
        if self.shared.settled_origin is None:
            raise ModelError("a shared past must be made with an explicit origin")
        if self.own is not None and self.own.num_rows != num_rows:
            raise ModelError(f"the rows' own past has {self.own.num_rows} rows, the call {num_rows}")
        return torch.full((num_rows,), self.shared.settled_origin, dtype=torch.int64, device=device)


def attend_to_shared_past(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    shared_past: SharedPast | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function: (B, heads, T, d) queries and the call's own keys and values, causal among themselves.

    Returns the (B, T, heads, d) output, as transformers expects it.
    """
    del attention_mask, dropout
    assert shared_past is not None  # only `BaseLM` chooses this function, and gives it
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    num_rows, num_heads, num_entries, width = query.shape
    groups = key.shape[1]
    per_group = num_heads // groups * num_entries
    rows = query.reshape(num_rows, groups, per_group, width)

    parts: list[Tensor] = []  # scores, (B, groups, per_group, S) each
    read: list[Callable[[Tensor], Tensor]] = []  # and how the weights on each become an output
    if shared_past.shared.num_entries:
        keys, values = shared_past.shared.layer(layer)
        # All rows' queries meet the shared keys in one product a group.
        folded = rows.transpose(0, 1).reshape(groups, num_rows * per_group, width)
        scores = (folded @ keys[0].transpose(1, 2)).view(groups, num_rows, per_group, -1)
        parts.append(scores.transpose(0, 1))

        def read_shared(weights: Tensor) -> Tensor:
            flat = weights.transpose(0, 1).reshape(groups, num_rows * per_group, -1)
            return (flat @ values[0]).view(groups, num_rows, per_group, width).transpose(0, 1)

        read.append(read_shared)
    if shared_past.own is not None:
        own_keys, own_values = shared_past.own.layer(layer)
        parts.append(rows @ own_keys.transpose(2, 3))
        read.append(lambda weights: weights @ own_values)
    order = torch.arange(num_entries, device=query.device)
    later = (order[None] > order[:, None]).repeat(num_heads // groups, 1)  # (per_group, T)
    parts.append((rows @ key.transpose(2, 3)).masked_fill(later, float("-inf")))

    read.append(lambda weights: weights @ value)

    weights = torch.cat(parts, dim=-1).mul_(scaling).softmax(dim=-1)  # sums in float32 whatever it is given
    split = weights.split([part.shape[-1] for part in parts], dim=-1)
    output = torch.stack([call(part) for call, part in zip(read, split, strict=True)]).sum(dim=0)
    return output.reshape(num_rows, num_heads, num_entries, width).transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, attend_to_shared_past)
