"""Causal attention in bfloat16 by tiles of plain products and by PyTorch's fused kernel: the one that models take on
this CPU against the other."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.assembly import one_thread
from benchmarks.harness import Result, Setting, median_ratio, time_in_turns
from models.tiled_attention import attend_in_tiles, tiles_are_faster

HEADS, GROUPS, WIDTH = 9, 3, 64
"""Of SmolLM2-135M."""
SHAPES = {"short": (1, 576, 576), "piece": (1, 256, 4096), "horizon": (1, 64, 2048), "batch": (8, 64, 576)}
"""Rows, entries of the call, entries in all: a Working Context with its horizon, a piece of a long history, a horizon
behind a cache, and several."""


def attention(setting: Setting) -> Result:
    """Ratio of wall times on one thread, the worst of the shapes."""
    with one_thread(), torch.inference_mode():
        results = {name: _of_shape(*shape, setting.size(40, 5)) for name, shape in SHAPES.items()}
    worst = max(results.values(), key=lambda result: result.value)
    detail = {name: {"ratio": round(result.value, 3), **result.detail} for name, result in results.items()}
    return Result(worst.value, worst.spread, worst.repeats, detail)


def _of_shape(rows: int, entries: int, seen: int, rounds: int) -> Result:
    generator = torch.Generator().manual_seed(seen)
    query, key, value = (
        torch.randn(rows, heads, size, WIDTH, generator=generator).to(torch.bfloat16)
        for heads, size in ((HEADS, entries), (GROUPS, seen), (GROUPS, seen))
    )
    whole = entries == seen
    mask = None if whole else torch.ones(entries, seen, dtype=torch.bool).tril(seen - entries)

    def fused(dtype: torch.dtype) -> torch.Tensor:
        parts = (part.to(dtype) for part in (query, key, value))
        return F.scaled_dot_product_attention(*parts, attn_mask=mask, is_causal=whole, enable_gqa=True)

    def tiled() -> torch.Tensor:
        return attend_in_tiles(nn.Identity(), query, key, value, None, WIDTH**-0.5)[0].transpose(1, 2)

    exact = fused(torch.float32)
    errors = [
        float((found.float() - exact).abs().mean() / exact.abs().mean()) for found in (tiled(), fused(torch.bfloat16))
    ]
    calls = {"tiled": lambda _: tiled(), "fused": lambda _: fused(torch.bfloat16)}
    seconds = time_in_turns(calls, rounds, warm_up=2)
    taken, other = ("tiled", "fused") if tiles_are_faster() else ("fused", "tiled")
    detail = {"taken": taken, "error_tiled": round(errors[0], 5), "error_fused": round(errors[1], 5)}
    return median_ratio(seconds[taken], seconds[other], "calls, in turns", detail)
