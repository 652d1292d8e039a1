"""Multiplications of a training step, and how many of them this machine can do.

Model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", appendix B) is what a step needs over what the hardware could
have done in its time. Here the hardware's part is the fastest large matrix product measured on the same threads or
device in the same run, not a data sheet's.
"""

from __future__ import annotations

import time

import torch

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.training_config import ObjectiveConfig
from models.base_lm import BaseLM
from models.gistnet import GistNet
from models.window_encoder import WINDOW_TOKENS

PEAK_SIZE, PEAK_REPEATS = 1536, 6


def flops_per_window(lm: BaseLM, net: GistNet, window_tokens: int, objective: ObjectiveConfig) -> float:
    """Floating-point operations of one window's forward and backward passes; a multiply-add counts two.

    The frozen model's weights get no gradient, so its backward pass costs what its forward pass does. Attention is
    counted as causal, half of all pairs, and its backward pass as twice that. Element-wise work counts nothing.

    Args:
        lm: the frozen model.
        net: the trained net.
        window_tokens: T.
        objective: what is asked for.
    """
    num_blocks = window_tokens // K
    matrices = sum(parameter.numel() for parameter in net.parameters() if parameter.dim() >= 2)
    found = 6.0 * matrices * num_blocks
    num_nodes = window_tokens // WINDOW_TOKENS if window_tokens > WINDOW_TOKENS else 0
    lower = _forward(lm, min(window_tokens, WINDOW_TOKENS)) * (net.lm_layer or 0) / lm.num_layers
    if objective.repeat_share < 1:
        entries = (num_nodes + num_blocks) * net.num_vectors + window_tokens - K
        # Beyond a super-block the net's states are not on the teacher's way.
        found += _forward(lm, window_tokens) + num_nodes * lower + _forward_and_backward(lm, entries)
        found += _head(lm, window_tokens - K, 3 if objective.kl_share else 2)
    else:
        found += max(1, num_nodes) * lower
    if objective.repeat_share > 0:
        found += num_blocks * _forward_and_backward(lm, net.num_vectors + K - 1) + _head(lm, window_tokens, 2)
    return found


def _forward(lm: BaseLM, length: int) -> float:
    return 2.0 * lm.num_layer_weights * length + _attention(lm, length)


def _forward_and_backward(lm: BaseLM, length: int) -> float:
    return 4.0 * lm.num_layer_weights * length + 3 * _attention(lm, length)


def _attention(lm: BaseLM, length: int) -> float:
    return 2.0 * lm.num_layers * lm.attention_width * length * length


def _head(lm: BaseLM, length: int, num_products: int) -> float:
    return 2.0 * lm.head_weight.numel() * length * num_products


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
