from __future__ import annotations

from typing import Any

import pytest
import torch

from cluster.config import BaseLMConfig
from models import dtype_choice
from models.base_lm import BaseLM
from models.dtype_choice import DtypeChoice, measure_dtypes

PROBE = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(5))


def measure(
    config: BaseLMConfig, monkeypatch: pytest.MonkeyPatch, *, speedup: float, num_layers: int | None = None
) -> DtypeChoice:
    """The measurement on the tiny model with a clock that says bfloat16 is `speedup` times as fast."""
    lm = BaseLM.load(config, num_layers=num_layers)
    real = dtype_choice._timed

    def timed(lm: BaseLM, *args: Any) -> tuple[float, torch.Tensor]:
        seconds = 1.0 if lm.dtype == torch.float32 else 1.0 / speedup
        return seconds, real(lm, *args)[1]

    monkeypatch.setattr(dtype_choice, "_timed", timed)
    choice = measure_dtypes(lm, PROBE)
    assert lm.dtype == torch.bfloat16
    return choice


def test_fast_and_close_is_taken(tiny_config: BaseLMConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = measure(tiny_config, monkeypatch, speedup=2.0)
    assert (choice.dtype, choice.speedup) == ("bfloat16", 2.0)
    assert choice.kl_nats is not None
    assert 0 < choice.kl_nats < dtype_choice.MAX_KL_NATS


def test_a_small_gain_is_not_worth_it(tiny_config: BaseLMConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(tiny_config, monkeypatch, speedup=1.1).dtype == "float32"


@pytest.mark.parametrize("num_layers", [None, 3])
def test_far_off_is_refused(tiny_config: BaseLMConfig, monkeypatch: pytest.MonkeyPatch, num_layers: int | None) -> None:
    assert measure(tiny_config, monkeypatch, speedup=9.0, num_layers=num_layers).dtype == "bfloat16"
    monkeypatch.setattr(dtype_choice, "MAX_KL_NATS", 1e-9)
    monkeypatch.setattr(dtype_choice, "MAX_RELATIVE_ERROR", 1e-9)
    choice = measure(tiny_config, monkeypatch, speedup=9.0, num_layers=num_layers)
    assert choice.dtype == "float32"
    assert (choice.kl_nats is None) == (num_layers is not None)


def test_timing_takes_the_shortest_run(tiny_config: BaseLMConfig) -> None:
    seconds, hidden = dtype_choice._timed(BaseLM.load(tiny_config), PROBE, 2)
    assert 0 < seconds < 5
    assert hidden.shape == (1, 48, 64)


def test_the_choice_reads_as_one_line() -> None:
    with_head = DtypeChoice("bfloat16", 2.5, 0.0019, 0.004)
    assert str(with_head) == "bfloat16: bfloat16 is 2.50x as fast as float32 here, KL 0.0019 nats a token"
    without = DtypeChoice("float32", 0.9, None, 0.004)
    assert str(without) == "float32: bfloat16 is 0.90x as fast as float32 here, hidden states off by 0.40%"
