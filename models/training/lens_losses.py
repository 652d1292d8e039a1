"""What LensNet is to learn from measured edits: what each block is worth, which of two is worth more, and what several
are worth together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor
from torch.nn import functional as F

HUBER_NATS = 0.1
"""Beyond this a residual counts in proportion, not squared: a few horizons repeat what a block says word by word."""


@dataclass(frozen=True, eq=False)
class LensBatch:
    """Working Contexts, their candidates, and what was measured."""

    features: Float32[Tensor, "sets n F"]
    keys: Float32[Tensor, "sets n D_key"]
    query: Float32[Tensor, "sets D_key"]
    there: Bool[Tensor, "sets n"]
    worth: Float32[Tensor, "sets n"]
    """What showing a candidate is worth where that was measured alone, nats a token."""
    measured: Bool[Tensor, "sets n"]
    edit_set: Int64[Tensor, " edits"]
    """Of edits of more than one block: which set they are of,"""
    edit_signs: Float32[Tensor, "edits n"]
    """which candidates they show (1) and give up (-1),"""
    edit_gain: Float32[Tensor, " edits"]
    """and what that was worth."""


@dataclass(frozen=True)
class LensWeights:
    """Of the parts of the loss."""

    regression: float = 1.0
    preference: float = 1.0
    balance: float = 0.1
    temperature: float = 0.05
    """Of preferences, nats a token: a difference of so much is preferred e : 1."""


def lens_losses(scores: Float32[Tensor, "sets n"], batch: LensBatch, weights: LensWeights) -> dict[str, Tensor]:
    """`loss`, and its parts before they are weighed.

    - `regression`: Huber distance of scores to what was measured, over `HUBER_NATS` squared; an edit of several blocks
      is to be worth the sum of its scores.
    - `preference`: of each two candidates of a set, NLL of the one that was worth more (Bradley and Terry 1952),
      weighed by how much more.
    - `balance`: square of what a set's scores are off on average, over `HUBER_NATS` squared: who asks for detail
      everywhere is not believed anywhere, and a threshold at 0 means nothing.
    """
    measured = batch.measured.float()
    count = measured.sum().clamp(min=1)
    residual = (scores - batch.worth) * measured
    single = F.huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=HUBER_NATS).sum()
    several = (scores[batch.edit_set] * batch.edit_signs).sum(dim=1)
    together = F.huber_loss(several, batch.edit_gain, reduction="none", delta=HUBER_NATS).sum()
    regression = (single + together) / (count + len(batch.edit_set)) / HUBER_NATS**2

    pairs = (batch.measured[:, :, None] & batch.measured[:, None, :]).float()
    more = batch.worth[:, :, None] - batch.worth[:, None, :]
    weight = pairs * more.clamp(min=0)
    asked = (scores[:, :, None] - scores[:, None, :]) / weights.temperature
    preference = (weight * F.softplus(-asked)).sum() / weight.sum().clamp(min=1e-6)

    means = residual.sum(dim=1) / measured.sum(dim=1).clamp(min=1)
    balance = means.square().mean() / HUBER_NATS**2
    loss = weights.regression * regression + weights.preference * preference + weights.balance * balance
    return {"loss": loss, "regression": regression, "preference": preference, "balance": balance}
