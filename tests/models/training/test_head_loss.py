"""Distillation through a chunked head: the values and the gradient of the plain formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.errors import ModelError
from models.training import head_loss as module
from models.training.head_loss import head_loss

N, D, V = 11, 6, 17


@pytest.fixture
def parts() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden": random(N, D),
        "teacher": random(N, D),
        "targets": torch.randint(0, V, (N,), generator=generator),
        "weights": torch.rand(N, generator=generator) * (torch.arange(N) % 4 > 0),
        "head_weight": random(V, D),
    }


def plainly(parts: dict[str, Any], share: float) -> tuple[Tensor, Tensor, Tensor]:
    """By the formula, in float64."""
    p = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in parts.items()}
    student = (p["hidden"] @ p["head_weight"].T).log_softmax(-1)
    teacher = (p["teacher"] @ p["head_weight"].T).log_softmax(-1)
    nll = F.nll_loss(student, p["targets"], reduction="none")
    kl = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return (p["weights"] * (share * kl + (1 - share) * nll)).sum(), nll, kl


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 4, 256])
def test_values_and_gradient_are_those_of_the_formula(
    parts: dict[str, Any], share: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ENTRIES", chunk)
    ours, reference = (parts["hidden"].clone().requires_grad_() for _ in range(2))
    found = head_loss(**{**parts, "hidden": ours}, kl_share=share)
    loss, nll, kl = plainly({**parts, "hidden": reference}, share)
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.nll.double(), nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.kl.double(), kl, rtol=1e-5, atol=1e-5)
    (3.0 * found.loss).backward()
    (3.0 * loss).backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-4, atol=1e-5)


def test_without_a_teacher_it_is_likelihood_alone(parts: dict[str, Any]) -> None:
    alone = head_loss(**{**parts, "teacher": None}, kl_share=0.7)
    beside = head_loss(**parts, kl_share=0.0)
    torch.testing.assert_close(alone.loss, beside.loss)
    assert not alone.kl.any()
    assert beside.kl.all()


def test_only_the_student_learns(parts: dict[str, Any]) -> None:
    learning = {name: parts[name].clone().requires_grad_() for name in ("hidden", "teacher", "head_weight")}
    found = head_loss(**{**parts, **learning})
    assert not found.nll.requires_grad
    assert not found.kl.requires_grad
    found.loss.backward()
    assert learning["hidden"].grad is not None
    assert learning["teacher"].grad is None
    assert learning["head_weight"].grad is None
    assert not learning["hidden"].grad[parts["weights"] == 0].any()


def test_without_gradients_the_values_are_the_same(parts: dict[str, Any]) -> None:
    with torch.no_grad():
        found = head_loss(**parts, kl_share=0.5)
    torch.testing.assert_close(found.loss, head_loss(**parts, kl_share=0.5).loss)
    assert not found.loss.requires_grad


def test_shapes_that_do_not_match_are_refused(parts: dict[str, Any]) -> None:
    for name, wrong in (("targets", 3), ("weights", 3), ("hidden", 3)):
        with pytest.raises(ModelError, match="do not fit"):
            head_loss(**{**parts, name: parts[name][:wrong]})
    with pytest.raises(ModelError, match="do not fit"):
        head_loss(**{**parts, "head_weight": parts["head_weight"][:, :2]})
    with pytest.raises(ModelError, match="the student's shape"):
        head_loss(**{**parts, "teacher": parts["teacher"][:3]})
