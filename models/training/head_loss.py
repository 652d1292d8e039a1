"""Distillation and likelihood through a large vocabulary, without ever holding all logits.

Shapes: N entries, D hidden size, V vocabulary.

Logits of 1,024 entries of a vocabulary of 49,152 take 200 MB, student, teacher and gradient three times that. Here they
exist for `CHUNK_ENTRIES` at a time. The gradient to the student's states is made in the same sweep, when both are at
hand, so that the backward pass needs no logits again: three products with the head an entry instead of five.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from cluster.errors import ModelError

CHUNK_ENTRIES = 256
"""Entries whose logits exist at one time: 50 MB in float32 at a vocabulary of 49,152, three times."""


@dataclass(frozen=True)
class HeadLoss:
    """What a student predicted."""

    loss: Float32[Tensor, ""]
    """Weighted sum, to be minimised; the only part that has a gradient."""
    nll: Float32[Tensor, " N"]
    """Of each target, nats."""
    kl: Float32[Tensor, " N"]
    """KL(teacher || student), nats; zero without a teacher."""


def head_loss(
    hidden: Float[Tensor, "N D"],
    targets: Int64[Tensor, " N"],
    weights: Float32[Tensor, " N"],
    head_weight: Float[Tensor, "V D"],
    teacher: Float[Tensor, "N D"] | None = None,
    kl_share: float = 1.0,
) -> HeadLoss:
    """Sum over entries of `weight * (kl_share * KL + (1 - kl_share) * NLL)`.

    Args:
        hidden: the student's states before the head.
        targets: the id that really came next.
        weights: what each entry counts; 0 leaves it out of the loss, not of `nll` and `kl`.
        head_weight: of a head that is one linear map without bias; frozen.
        teacher: another reader's states at the same entries, through the same head; no gradient flows there.
        kl_share: 0 … 1; with a teacher. Without one the loss is NLL alone.

    Raises:
        ModelError: shapes that do not match.
    """
    shapes = {tuple(targets.shape), tuple(weights.shape), tuple(hidden.shape[:1])}
    if len(shapes) != 1 or hidden.shape[1:] != head_weight.shape[1:]:
        raise ModelError(
            f"hidden {tuple(hidden.shape)}, targets {tuple(targets.shape)}, weights {tuple(weights.shape)} and head "
            f"{tuple(head_weight.shape)} do not fit (N, D), (N,), (N,) and (V, D)"
        )
    if teacher is not None and teacher.shape != hidden.shape:
        raise ModelError(f"teacher {tuple(teacher.shape)} must have the student's shape {tuple(hidden.shape)}")
    share = 0.0 if teacher is None else kl_share
    loss, nll, kl = _HeadLoss.apply(hidden, targets, weights, head_weight, teacher, share)  # type: ignore[misc]
    return HeadLoss(loss, nll, kl)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor,
        head_weight: Tensor,
        teacher: Tensor | None,
        share: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        nll = hidden.new_zeros(len(hidden), dtype=torch.float32)
        kl = torch.zeros_like(nll)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for first in range(0, len(hidden), CHUNK_ENTRIES):
            part = slice(first, first + CHUNK_ENTRIES)
            logits = (hidden[part] @ head_weight.T).float()
            log_sum = logits.logsumexp(-1, keepdim=True)
            chosen = targets[part, None]
            nll[part] = (log_sum - logits.gather(-1, chosen))[:, 0]
            log_student = logits.sub_(log_sum)
            if teacher is None:
                towards = None
            else:
                teacher_logits = (teacher[part] @ head_weight.T).float()
                log_teacher = teacher_logits.sub_(teacher_logits.logsumexp(-1, keepdim=True))
                towards = log_teacher.exp()
                kl[part] = (towards * log_teacher.sub_(log_student)).sum(-1)
            if gradient is not None:
                # d/d logits of both terms: student - share * teacher - (1 - share) * one-hot.
                slope = log_student.exp_()
                if towards is not None:
                    slope.sub_(towards, alpha=share)
                slope.scatter_add_(-1, chosen, slope.new_full(chosen.shape, share - 1.0))
                slope.mul_(weights[part, None])
                gradient[part] = slope.to(head_weight.dtype) @ head_weight
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(nll, kl)
        return (weights * (share * kl + (1.0 - share) * nll)).sum(), nll, kl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None, None, None
