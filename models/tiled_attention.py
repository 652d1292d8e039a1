"""Causal attention in bfloat16 on CPUs without AMX, by plain matrix products over tiles that fit the cache.

Without AMX, PyTorch's fused kernel reaches a fifth of a CPU's bfloat16 matmul peak, so that attention took 40% of a
forward pass at 600 entries and most of one at 4,096. Here every step is a matrix product or a softmax over a tile of
scores. With AMX the fused kernel is the faster one: `make bench ONLY=attention` compares the two. Scores are rounded to
bfloat16, as keys, queries and everything else is. Models whose keys have biases keep the fused kernel: what all keys
have in common makes scores large, and rounding them then loses what tells entries apart.

Shapes: B rows, T entries of the call after P cached ones, S = P + T.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "megacontext_tiled"

TILE_ENTRIES = 64
"""Queries of a tile: fewer make thin products, more compute scores above the diagonal."""

TILE_SCORES = 2**20
"""Scores that exist at one time, 2 MB: several groups of heads together where the past is short."""


def attend_in_tiles(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function: (B, heads, T, d) queries, (B, groups, S, d) keys and values; no gradients.

    Args:
        module: the layer; not used.
        query: of the call's entries, the last T of S.
        key, value: of all entries.
        attention_mask: not used: causal.
        scaling: of the scores.
        dropout: not used; the model is frozen.

    Returns:
        The (B, T, heads, d) output, as transformers expects it.
    """
    del module, attention_mask, dropout
    num_rows, num_heads, num_entries, width = query.shape
    groups, num_seen = key.shape[1:3]
    per_group = num_heads // groups
    past = num_seen - num_entries
    # Queries of the heads of a group meet its keys in one product.
    queries = (query * scaling).reshape(num_rows * groups, per_group, num_entries, width)
    keys = key.reshape(num_rows * groups, num_seen, width).transpose(1, 2)
    values = value.reshape(num_rows * groups, num_seen, value.shape[-1])
    output = value.new_empty(num_rows * groups, per_group, num_entries, value.shape[-1])
    tile = min(TILE_ENTRIES, num_entries)
    later = torch.ones(tile, tile, dtype=torch.bool, device=query.device).triu(1)
    together = max(1, TILE_SCORES // (per_group * tile * num_seen))
    for group in range(0, num_rows * groups, together):
        some = slice(group, group + together)
        for start in range(0, num_entries, tile):
            stop = min(start + tile, num_entries)
            size, seen = stop - start, past + stop
            scores = torch.bmm(queries[some, :, start:stop].flatten(1, 2), keys[some, :, :seen])
            scores = scores.unflatten(1, (per_group, size))
            scores[..., past + start :].masked_fill_(later[:size, :size], float("-inf"))
            weights = scores.softmax(dim=-1).flatten(1, 2)
            output[some, :, start:stop] = torch.bmm(weights, values[some, :seen]).unflatten(1, (per_group, size))
    return output.view(num_rows, num_heads, num_entries, -1).transpose(1, 2), None


def tiles_are_faster() -> bool:
    """Whether this CPU attends faster by tiles than by PyTorch's fused kernel.

    By what the CPU is and not by a measurement: one machine gives the same numbers every time. In the worst of four
    shapes tiles take 0.39 of the fused kernel's time on AVX512-bf16 without AMX, and the fused kernel 0.74 of that of
    tiles with AMX (`benchmarks/attention.py`).
    """
    # Older PyTorch does not tell.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return not capabilities.get("amx_bf16", False)


def takes_tiles(config: Any, layers: Iterable[nn.Module]) -> bool:
    """Whether a model's attention may go by tiles, and should: plainly causal, by keys without biases, on a CPU that
    gains from it."""
    if not tiles_are_faster():
        return False
    attention = (getattr(layer, "self_attn", None) for layer in layers)
    biases = (getattr(getattr(part, "k_proj", None), "bias", None) for part in attention)
    return is_plainly_causal(config) and all(bias is None for bias in biases)


def is_plainly_causal(config: Any) -> bool:
    """Whether every layer of a model attends to all entries before it, by scores that nothing but a scale changes."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        all_see_all = set(kinds) == {"full_attention"}
    else:
        all_see_all = not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))
    return all_see_all and not getattr(config, "attn_logit_softcapping", None)


AttentionInterface.register(ATTENTION_NAME, attend_in_tiles)
