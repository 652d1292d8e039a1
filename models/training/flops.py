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
    An adapter is in the student's passes, and its weights do get a gradient. Element-wise work counts nothing.

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
    matched = max(objective.states_layers, default=0) if objective.repeat_share < 1 else 0
    of_net, of_teacher = net.lm_layer or 0, lm.num_layers if objective.distils else matched
    if num_nodes:  # gists are made of each 1,024 tokens apart
        found += num_nodes * _forward(lm, WINDOW_TOKENS, of_net) + _forward(lm, window_tokens, of_teacher)
    else:
        found += _forward(lm, window_tokens, max(of_net, of_teacher))
    # What is asked behind gists is asked once at each inner step, besides behind the net's own.
    found += (objective.inner_steps + objective.reads_own) * _asked(lm, net, window_tokens, objective, num_nodes)
    return found


def _asked(lm: BaseLM, net: GistNet, window_tokens: int, objective: ObjectiveConfig, num_nodes: int) -> float:
    """What is asked for behind some gists, with the gradient to them."""
    found = 0.0
    num_blocks = window_tokens // K
    if objective.repeat_share < 1:
        summaries, raw = (num_nodes + num_blocks) * net.num_vectors, window_tokens - K
        share = 1.0 if objective.predicts else max(objective.states_layers) / lm.num_layers
        found += (4.0 * lm.num_layer_weights + _of_adapter(lm)) * (summaries + raw) * share
        found += 3 * _student_attention(lm, summaries, raw, objective) * share
    if objective.predicts:
        found += _head(lm, objective.scored_share * (window_tokens - K), 3 if objective.distils else 2)
    if objective.repeat_share > 0:
        entries = net.num_vectors + K - 1
        found += num_blocks * (_forward_and_backward(lm, entries) + _of_adapter(lm) * entries)
        found += _head(lm, window_tokens, 2)
    return found


def _of_adapter(lm: BaseLM) -> float:
    """Of an entry, forward and backward; as much of them in every layer."""
    return 0.0 if lm.adapter is None else 6.0 * lm.adapter.num_weights


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


def _forward(lm: BaseLM, length: int, num_layers: int) -> float:
    return (2.0 * lm.num_layer_weights * length + _attention(lm, length)) * num_layers / lm.num_layers


def _forward_and_backward(lm: BaseLM, length: int) -> float:
    return 4.0 * lm.num_layer_weights * length + 3 * _attention(lm, length)


def _attention(lm: BaseLM, length: int) -> float:
    return 2.0 * lm.num_layers * lm.attention_width * length * length


def _student_attention(lm: BaseLM, summaries: int, raw: int, objective: ObjectiveConfig) -> float:
    band = summaries + objective.max_tail_blocks * K
    if objective.shown_share or not is_banded(lm, band, raw + K):
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
