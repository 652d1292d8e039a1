"""What LensNet is asked for: checked against losses worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from models.training.lens_losses import HUBER_NATS, LensBatch, LensWeights, lens_losses


def batch() -> LensBatch:
    """Two sets of three; the second has one candidate that was not measured and one that is not there."""
    return LensBatch(
        features=torch.zeros(2, 3, 1),
        keys=torch.zeros(2, 3, 1),
        query=torch.zeros(2, 1),
        there=torch.tensor([[True, True, True], [True, True, False]]),
        worth=torch.tensor([[0.02, -0.04, 0.0], [0.3, 0.0, 0.0]]),
        measured=torch.tensor([[True, True, True], [True, False, False]]),
        edit_set=torch.tensor([0]),
        edit_signs=torch.tensor([[1.0, 1.0, -1.0]]),
        edit_gain=torch.tensor([0.05]),
    )


def test_losses_by_hand() -> None:
    scores = torch.tensor([[0.05, 0.01, 0.03], [0.1, 9.0, 9.0]])
    losses = lens_losses(scores, batch(), LensWeights(temperature=0.05))
    singles = [0.03**2 / 2, 0.05**2 / 2, 0.03**2 / 2, HUBER_NATS * (0.2 - HUBER_NATS / 2)]
    together = (0.05 + 0.01 - 0.03 - 0.05) ** 2 / 2
    assert float(losses["regression"]) == pytest.approx((sum(singles) + together) / 5 / HUBER_NATS**2, rel=1e-4)

    def nll(better: float, worse: float) -> float:
        return math.log1p(math.exp(-(better - worse) / 0.05))

    pairs = [(0.06, nll(0.05, 0.01)), (0.02, nll(0.05, 0.03)), (0.04, nll(0.03, 0.01))]
    expected = sum(weight * value for weight, value in pairs) / sum(weight for weight, _ in pairs)
    assert float(losses["preference"]) == pytest.approx(expected, rel=1e-4)
    means = [(0.03 + 0.05 + 0.03) / 3, -0.2]
    assert float(losses["balance"]) == pytest.approx(sum(m * m for m in means) / 2 / HUBER_NATS**2, rel=1e-4)


def test_parts_are_weighed() -> None:
    scores = torch.tensor([[0.05, 0.01, 0.03], [0.1, 0.0, 0.0]])
    whole = lens_losses(scores, batch(), LensWeights(2.0, 3.0, 0.5))
    expected = 2 * whole["regression"] + 3 * whole["preference"] + 0.5 * whole["balance"]
    torch.testing.assert_close(whole["loss"], expected)


def test_what_was_not_measured_has_no_gradient() -> None:
    scores = torch.zeros(2, 3, requires_grad=True)
    lens_losses(scores, batch(), LensWeights())["loss"].backward()
    assert scores.grad is not None
    assert scores.grad[0].all()
    assert scores.grad[1, 0] != 0
    assert not scores.grad[1, 1:].any()


def test_what_was_measured_costs_nothing_but_preferences() -> None:
    given = replace(batch(), edit_gain=torch.tensor([-0.02]))
    losses = lens_losses(given.worth, given, LensWeights())
    assert float(losses["regression"]) == pytest.approx(0, abs=1e-9)
    assert float(losses["balance"]) == pytest.approx(0, abs=1e-9)
    assert 0 < float(losses["preference"]) < math.log(2)


def test_a_batch_without_edits_of_several_blocks() -> None:
    alone = replace(
        batch(), edit_set=torch.zeros(0, dtype=torch.int64), edit_signs=torch.zeros(0, 3), edit_gain=torch.zeros(0)
    )
    assert lens_losses(torch.zeros(2, 3), alone, LensWeights())["loss"].isfinite()
