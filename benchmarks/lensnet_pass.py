"""One pass of LensNet over 8,192 candidates, against one prefill of 8,192 tokens by SmolLM2; and over as many as a
refocus has, against decoding the tokens until the next one."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.assembly import one_thread
from benchmarks.harness import Result, Setting, median_ratio, time_in_turns
from cluster.session_config import SessionConfig
from models.base_lm import BaseLM
from models.lensnet import FEATURES, CandidateSet, LensNetSpec
from models.lensnet.net import untrained_lensnet

KEY_DIM = 128
OF_A_REFOCUS = 48
"""Candidates that words, keys and the newest blocks bring."""


def lensnet_pass(setting: Setting) -> Result:
    """Ratio of wall time: all entries of a large Working Context scored, and the Working Context read."""
    size, rounds = setting.size(8192, 512), setting.size(5, 2)
    with one_thread():
        lm = BaseLM.load(setting.base_lm)
        net = untrained_lensnet(LensNetSpec(key_dim=KEY_DIM))
        entries, few = _candidates(size), _candidates(OF_A_REFOCUS)
        ids = torch.from_numpy(np.random.default_rng(0).integers(0, lm.vocab_size, (1, size)))
        cache = lm.new_cache()

        def prefill(_: int) -> None:
            cache.truncate(0)
            with torch.inference_mode():
                lm.logits(lm.embed(ids), cache=cache, last_only=True)

        def decode(_: int) -> None:
            kept = cache.num_entries
            with torch.inference_mode():
                lm.logits(lm.embed(ids[:, :1]), cache=cache, last_only=True)
            cache.truncate(kept)

        calls = {"net": lambda _: net.scores(entries), "prefill": prefill}
        seconds = time_in_turns(calls, rounds, warm_up=1)
        cache.truncate(min(size, SessionConfig().budget))
        often = time_in_turns({"few": lambda _: net.scores(few), "decode": decode}, 4 * rounds, warm_up=2)
    num_decoded = SessionConfig().refocus_tokens
    detail = {
        "candidates": size,
        "net_ms": round(1e3 * float(np.median(seconds["net"])), 2),
        "prefill_ms": round(1e3 * float(np.median(seconds["prefill"])), 1),
        "of_a_refocus": OF_A_REFOCUS,
        "of_a_refocus_ms": round(1e3 * float(np.median(often["few"])), 3),
        f"share_of_decoding_{num_decoded}_tokens": round(
            float(np.median(often["few"]) / np.median(often["decode"])) / num_decoded, 6
        ),
    }
    return median_ratio(seconds["net"], seconds["prefill"], "rounds", detail)


def _candidates(n: int) -> CandidateSet:
    rng = np.random.default_rng(n)
    keys = rng.standard_normal((n + 1, KEY_DIM)).astype(np.float32)
    return CandidateSet(np.arange(n), rng.random((n, len(FEATURES)), np.float32), keys[:-1], keys[-1])
