"""What a session and a full context cost, measured at sizes that show only that it is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors.evaluation.latency import crossing, measure_latency
from actors.plan import plan_models
from cluster.config import BaseLMConfig, GistNetConfig, StoreConfig
from cluster.errors import ConfigError
from cluster.session_config import SessionConfig
from models.base_lm import BaseLM
from tests.actors.helpers import make_text

LENGTHS = [64, 256]


def test_both_ways_are_measured_at_every_length(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = plan_models(
        tiny_lm_config, GistNetConfig(kind="windowed", lm_layers=2), StoreConfig(root=tmp_path, context="latency")
    )
    lm = BaseLM.load(plan.base_lm)
    ids = plan.tokenizer.encode(make_text(1, 400)).astype(np.int64)
    seen: list[int] = []
    measured = measure_latency(
        plan,
        lm,
        ids,
        LENGTHS,
        tmp_path,
        SessionConfig(budget=320, compact_tokens=64, tail_tokens=64),
        num_decoded=4,
        repeats=2,
        on_measured=lambda: seen.append(1),
    )
    assert len(seen) == len(measured) == 8
    assert {(of.tokens, of.focused) for of in measured} == {(n, way) for n in LENGTHS for way in (False, True)}
    for of in measured:
        assert min(of.read_s, of.first_token_s, of.decode_s) > 0
        assert of.answered_s == of.read_s + of.first_token_s
    full = {of.tokens: of.cache_bytes for of in measured if not of.focused}
    rows = {n: n + 24 + 4 for n in LENGTHS}
    assert full[256] / full[64] == pytest.approx(rows[256] / rows[64]), "keys and values of every token"
    with pytest.raises(ConfigError, match="take shorter lengths"):
        measure_latency(plan, lm, ids, [10_000], tmp_path, SessionConfig())


def test_the_crossing_lies_where_differences_change_sign() -> None:
    lengths = [100, 200, 300]
    assert crossing(lengths, full=[1, 2, 3], focused=[2, 2.5, 2.5]) == pytest.approx(250)
    assert crossing(lengths, full=[1, 2, 3], focused=[2, 1, 3.5]) is None, "not for good"
    assert crossing(lengths, full=[1, 2, 3], focused=[0, 1, 1]) == 100
