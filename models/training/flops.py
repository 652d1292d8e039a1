"""Multiplications of a training step, and how many of them this machine can do.

Model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", appendix B) is what a step needs over what the hardware could
have done in its time. Here the hardware's part is the fastest large matrix product measured on the same threads or
device in the same run, not a data sheet's.
"""

from __future__ import annotations

import time

import torch

from cluster.config import TOKENS_PER_BLOCK as K
from models.base_lm import BaseLM
from models.gistnet import GistNet

PEAK_SIZE, PEAK_REPEATS = 1536, 6


def flops_per_window(lm: BaseLM, net: GistNet, window_tokens: int, *, distilled: bool) -> float:
    """Floating-point operations of a dense pass over one window and its backward pass; a multiply-add counts two.

    The frozen model's weights get no gradient, so its backward pass costs what its forward pass does. Attention is
    counted as causal, half of all pairs, and its backward pass as twice that. Element-wise work counts nothing.

    Args:
        lm: the frozen model.
        net: the trained net.
        window_tokens: T.
        distilled: whether the teacher's logits are needed.
    """
    num_blocks = window_tokens // K
    entries = num_blocks * net.num_vectors + window_tokens - K
    attended = 4 * lm.num_layers * lm.attention_width

    def attention(length: int) -> float:
        return attended * length * length / 2

    layers = 2.0 * lm.num_layer_weights
    teacher = layers * window_tokens + attention(window_tokens)
    student = 2 * layers * entries + 3 * attention(entries)
    head = 2.0 * lm.head_weight.numel() * (window_tokens - K) * (3 if distilled else 2)
    matrices = sum(parameter.numel() for parameter in net.parameters() if parameter.dim() >= 2)
    return teacher + student + head + 6.0 * matrices * num_blocks


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The most floating-point operations a second of a square matrix product, on this process's threads."""
    left = torch.randn(PEAK_SIZE, PEAK_SIZE, device=device).to(dtype)
    best_s = float("inf")
    for _ in range(PEAK_REPEATS):
        started = _now(device)
        torch.mm(left, left)
        best_s = min(best_s, _now(device) - started)
    return 2.0 * PEAK_SIZE**3 / best_s


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
