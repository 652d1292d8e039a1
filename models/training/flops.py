"""Multiplications of a training step, and how many of them this machine can do.

Model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", appendix B) is what a step needs over what the hardware could
have done in its time. Here the hardware's part is the fastest large matrix product measured on the same threads or
device in the same run, not a data sheet's.
"""

from __future__ import annotations

import copy
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.training_config import ObjectiveConfig
from models.base_lm import BaseLM
from models.gistnet import GistNet
from models.training.dense_pass import is_banded
from models.window_encoder import WINDOW_TOKENS

PEAK_REPEATS = 6


def flops_per_window(lm: BaseLM, net: GistNet, window_tokens: int, objective: ObjectiveConfig) -> float:
    """Floating-point operations of one window's forward and backward passes; a multiply-add counts two.

    The frozen model's weights get no gradient, so its backward pass costs what its forward pass does. Attention is
    counted as causal, half of all pairs, or as the pairs within the student's band; its backward pass as twice that.
    Element-wise work counts nothing.

    Args:
        lm: the frozen model.
        net: the trained net.
        window_tokens: T.
        objective: what is asked for.
    """
    num_blocks = window_tokens // K
    num_nodes = window_tokens // WINDOW_TOKENS if window_tokens > WINDOW_TOKENS else 0
    # Behind a net's own forward pass: gradients of its weights and of what they multiply.
    found = 3.0 * (num_blocks * _of_block(net) + num_nodes * _of_node(net))
    lower = _forward(lm, min(window_tokens, WINDOW_TOKENS)) * (net.lm_layer or 0) / lm.num_layers
    distilled = objective.repeat_share < 1 and objective.kl_share > 0
    if distilled:
        # Within a super-block the net's states lie on the teacher's way.
        found += _forward(lm, window_tokens) + num_nodes * lower
    else:
        found += max(1, num_nodes) * lower
    if objective.repeat_share < 1:
        summaries, raw = (num_nodes + num_blocks) * net.num_vectors, window_tokens - K
        found += 4.0 * lm.num_layer_weights * (summaries + raw) + 3 * _student_attention(lm, summaries, raw, objective)
        found += _head(lm, objective.scored_share * raw, 3 if distilled else 2)
    if objective.repeat_share > 0:
        found += num_blocks * _forward_and_backward(lm, net.num_vectors + K - 1) + _head(lm, window_tokens, 2)
    return found


def _of_block(net: GistNet) -> float:
    """Forward pass of one block, counted by torch on a copy without memory."""
    states = torch.empty(1, K, net.dim, device="meta")
    hidden = None if net.lm_layer is None else states
    key_states = None if net.spec.key_layer is None else states
    length = torch.ones(1, dtype=torch.int64, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(net).to("meta").forward_tokens(states, length, hidden, key_states)
    return counter.get_total_flops()


def _of_node(net: GistNet) -> float:
    gists = torch.empty(1, K, net.num_vectors, net.dim, device="meta")
    keys = torch.empty(1, K, net.key_dim, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(net).to("meta").forward_nodes(gists, keys, 2)
    return counter.get_total_flops()


def _forward(lm: BaseLM, length: int) -> float:
    return 2.0 * lm.num_layer_weights * length + _attention(lm, length)


def _forward_and_backward(lm: BaseLM, length: int) -> float:
    return 4.0 * lm.num_layer_weights * length + 3 * _attention(lm, length)


def _attention(lm: BaseLM, length: int) -> float:
    return 2.0 * lm.num_layers * lm.attention_width * length * length


def _student_attention(lm: BaseLM, summaries: int, raw: int, objective: ObjectiveConfig) -> float:
    band = summaries + objective.max_tail_blocks * K
    if objective.shown_share or not is_banded(band, raw + K):
        return _attention(lm, summaries + raw)
    return 4.0 * lm.num_layers * lm.attention_width * (summaries * summaries + raw * band)


def _head(lm: BaseLM, length: float, num_products: int) -> float:
    return 2.0 * lm.head_weight.numel() * length * num_products


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The most floating-point operations a second of a square matrix product, on this process's threads or its GPU."""
    size, at_a_time = (8192, 8) if device.type == "cuda" else (1536, 1)  # enough to fill it, and to hide its start
    left = torch.randn(size, size, device=device).to(dtype)
    best_s = float("inf")
    for _ in range(PEAK_REPEATS):
        started = _now(device)
        for _ in range(at_a_time):
            torch.mm(left, left)
        best_s = min(best_s, _now(device) - started)
    return 2.0 * at_a_time * size**3 / best_s


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
