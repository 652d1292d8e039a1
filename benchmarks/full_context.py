"""Answering behind new text: a session with its Working Context against the model that reads and keeps all of it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from actors.evaluation.latency import QUESTION_TOKENS, Latency, crossing, measure_latency
from actors.plan import plan_models
from benchmarks.assembly import one_thread
from benchmarks.harness import Result, Setting, say
from benchmarks.text_contexts import corpus_windows
from cluster.config import GistNetConfig, StoreConfig
from cluster.session_config import SessionConfig
from models.base_lm import BaseLM

DECODED_TOKENS = 64


def full_context(setting: Setting) -> Result:
    """Ratio of the wall time of a decoded token at the longest length that the model can hold, refocuses included."""
    lengths = setting.size([512, 1024, 2048, 4096, 7936], [256, 512])
    repeats, decoded = setting.size(5, 2), setting.size(DECODED_TOKENS, 8)
    net = GistNetConfig(lm_layers=2) if setting.quick else GistNetConfig()
    with setting.scratch() as root, one_thread():
        plan = plan_models(setting.base_lm, net, StoreConfig(root=root))
        size = max(lengths) + QUESTION_TOKENS + decoded
        ids = np.concatenate([window.tokens for window in corpus_windows(setting, plan, size, lambda _: {})])[:size]
        lm = BaseLM.load(plan.base_lm)
        number = itertools.count(1)
        (root / "sessions").mkdir()
        measured = measure_latency(
            plan,
            lm,
            ids,
            lengths,
            root / "sessions",
            SessionConfig(),
            num_decoded=decoded,
            repeats=repeats,
            on_measured=lambda: say(f"  measured {next(number)} of {2 * repeats * len(lengths)}"),
        )
    detail = {"decoded": decoded, **latency_detail(measured, lengths)}
    longest = [of for of in measured if of.tokens == max(lengths)]
    ratios = [
        mine.decode_s / theirs.decode_s
        for mine, theirs in zip(
            [of for of in longest if of.focused], [of for of in longest if not of.focused], strict=True
        )
    ]
    return Result.of_repeats(ratios, f"{repeats} sessions of {max(lengths):,} tokens", detail)


def latency_detail(measured: list[Latency], lengths: list[int]) -> dict[str, Any]:
    """Medians by length, and from where on the session costs less."""

    def medians(name: str, focused: bool) -> list[float]:
        return [
            float(np.median([getattr(of, name) for of in measured if of.tokens == n and of.focused == focused]))
            for n in lengths
        ]

    detail: dict[str, Any] = {}
    for name in ("answered_s", "decode_s", "cache_bytes"):
        full, focused = medians(name, False), medians(name, True)
        detail[name] = {
            n: {"full": f"{a:.4g}", "focused": f"{b:.4g}"} for n, a, b in zip(lengths, full, focused, strict=True)
        }
        at = crossing(lengths, full, focused)
        detail[f"{name}_crossing_tokens"] = None if at is None else round(at)
    return detail
