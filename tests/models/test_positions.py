from __future__ import annotations

import math

import pytest
import torch

from cluster.errors import ModelError
from models.positions import Positions, global_positions, rotary_cos_sin

FREQUENCIES = 1.0 / 10000.0 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)


def phases_of(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.atan2(sin, cos)


def test_a_gist_stands_at_its_spans_exact_centre() -> None:
    first = torch.tensor([[0, 32, 64, 65]])
    length = torch.tensor([[32, 32, 1, 2]])
    # Centres 15.5, 47.5, 64 and 65.5 tokens.
    assert global_positions(first, length).half_tokens.tolist() == [[31, 95, 128, 131]]


def test_raw_tokens_are_spans_of_one() -> None:
    index = torch.tensor([[0, 1, 7, 2**40]])
    as_spans = global_positions(index, torch.ones_like(index))
    assert torch.equal(as_spans.half_tokens, Positions.of_tokens(index).half_tokens)


@pytest.mark.parametrize("start", [0, 2**24, 10**9, 2**52])
def test_phases_do_not_depend_on_where_the_window_starts(start: int) -> None:
    half_tokens = torch.arange(0, 4000, 3)[None]
    moved = Positions(half_tokens + 2 * start)
    cos, sin = rotary_cos_sin(moved, FREQUENCIES, torch.tensor([2 * start]), dtype=torch.float64)
    expected = half_tokens.double()[..., None] / 2 * FREQUENCIES.double()
    assert torch.equal(cos[..., :8], expected.cos())
    assert torch.equal(sin[..., 8:], expected.sin())


def test_far_from_the_origin_phases_stay_exact_where_float32_fails() -> None:
    index = torch.tensor([[2**24 - 1, 2**24, 2**24 + 1]])
    cos, sin = rotary_cos_sin(Positions.of_tokens(index), FREQUENCIES, torch.zeros(1, dtype=torch.int64))
    for t in range(3):
        exact = math.fmod(int(index[0, t]) * float(FREQUENCIES[1]), 2 * math.pi)
        difference = float(phases_of(cos, sin)[0, t, 1]) - exact
        assert abs(math.remainder(difference, 2 * math.pi)) < 1e-5
    merged = index.float()
    assert merged[0, 1] == merged[0, 2]  # what a float32 position would have made of the last two


def test_width_blurs_the_phases() -> None:
    half_tokens = torch.tensor([[0, 20]])
    sigma = torch.tensor([[0.0, 3.0]])
    origin = torch.zeros(1, dtype=torch.int64)
    cos, sin = rotary_cos_sin(Positions(half_tokens, sigma), FREQUENCIES, origin, dtype=torch.float64)
    length = (cos.square() + sin.square()).sqrt()[0, :, :8]
    assert torch.allclose(length[0], torch.ones(8, dtype=torch.float64))
    assert torch.allclose(length[1], torch.exp(-0.5 * (3.0 * FREQUENCIES.double()) ** 2))
    # The blur is the mean over the span: check the fastest frequency by sampling.
    samples = 10.0 + 3.0 * torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert abs(float(cos[0, 1, 0]) - float((samples * FREQUENCIES[0].double()).cos().mean())) < 5e-3


@pytest.mark.parametrize("bad", [torch.zeros(3, dtype=torch.int64), torch.zeros(1, 3), torch.zeros(1, 3).int()])
def test_positions_are_int64_of_two_dimensions(bad: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="int64"):
        Positions(bad)


def test_widths_have_the_shape_of_the_positions() -> None:
    with pytest.raises(ModelError, match="sigma_tokens"):
        Positions(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2))
