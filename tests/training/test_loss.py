"""The NeCo loss against worked values and its definition on whole permutations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from neco_bench.core.errors import UsageError
from neco_bench.training import sorting
from neco_bench.training.loss import neco_loss
from neco_bench.training.sorting import soft_sort


def worked() -> tuple[Tensor, Tensor]:
    """Student and teacher rows of protocols/neco.md 1.10."""
    r, c = torch.arange(3, dtype=torch.float64)[:, None], torch.arange(49, dtype=torch.float64)
    return torch.cos(0.7 * r + 1.3 * c + 0.25), torch.cos(0.7 * r + 1.3 * c + 0.2)


def random_rows(count: int, n: int = 49, scale: float = 0.1) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, count, n, generator=torch.Generator().manual_seed(0)) * scale
    return student, teacher


def by_definition(student: Tensor, teacher: Tensor, network: str, steepness: float) -> Tensor:
    p, q = soft_sort(student, network, steepness)[1], soft_sort(teacher, network, steepness)[1]
    return -(q * p.log()).sum(-1).mean()


@pytest.mark.parametrize(
    ("network", "steepness", "loss", "entropy"),
    [
        ("bitonic", 10, 3.50744676, 3.50042616),
        ("bitonic", 100, 2.40767679, 1.79851473),
        ("bitonic", 1000, 3.08339337, 0.73668702),
        ("odd_even", 10, 3.27003507, 3.26828186),
        ("odd_even", 100, 2.41865659, 2.29094087),
        ("odd_even", 1000, 2.37310477, 1.05724273),
    ],
)
def test_worked_losses(network: str, steepness: float, loss: float, entropy: float) -> None:
    student, teacher = worked()
    settings: dict[str, Any] = {"network": network, "student_steepness": steepness, "teacher_steepness": steepness}
    assert neco_loss(student, teacher, **settings).item() == pytest.approx(loss, abs=6e-9)
    assert neco_loss(teacher, teacher, **settings).item() == pytest.approx(entropy, abs=6e-9)


def test_worked_gradient() -> None:
    student, teacher = worked()
    neco_loss(student.requires_grad_(), teacher).backward()
    assert student.grad is not None
    # The protocol prints -0.263955 for the third; central differences of the dense product in float64 give -0.2639526.
    assert student.grad[0, :4].tolist() == pytest.approx([-0.385942, -0.143629, -0.263953, 0.164452], abs=6e-7)
    assert student.grad.abs().sum().item() == pytest.approx(22.367247, abs=6e-7)
    weights = soft_sort(teacher)[1]
    assert weights[0, 0, :3].tolist() == pytest.approx([0.00160318, 0.00064489, 0.00067295], abs=6e-9)


def test_many_rows_equal_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "CPU_BYTES", 1 << 20)
    student, teacher = random_rows(200)
    student.requires_grad_()
    loss = neco_loss(student, teacher)
    expected = by_definition(student, teacher, "bitonic", 100)
    torch.testing.assert_close(loss, expected)
    got, wanted = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
    torch.testing.assert_close(got, wanted, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("network", ["bitonic", "odd_even"])
def test_gradcheck(network: str) -> None:
    student, teacher = (part.double() for part in random_rows(3, 7, 1))
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: neco_loss(s, teacher, network=network, student_steepness=2, teacher_steepness=5), student
    )


def test_student_and_teacher_have_their_own_steepness() -> None:
    student, teacher = worked()
    expected = neco_loss(student / 10, teacher)
    torch.testing.assert_close(neco_loss(student, teacher, student_steepness=10), expected)


def test_teacher_gets_no_gradient() -> None:
    student, teacher = (part.requires_grad_() for part in random_rows(4))
    neco_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_loss_can_be_used_twice_and_scaled() -> None:
    student, teacher = random_rows(4)
    student.requires_grad_()
    loss = neco_loss(student, teacher)
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (thrice,) = torch.autograd.grad(2 * loss + loss, student)
    torch.testing.assert_close(thrice, 3 * once)


def test_differentiating_twice_is_refused() -> None:
    student, teacher = random_rows(4)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(neco_loss(student, teacher).square(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_grad_gives_the_same_number() -> None:
    student, teacher = random_rows(100)
    student.requires_grad_()
    with torch.no_grad():
        loss = neco_loss(student, teacher)
    assert not loss.requires_grad
    assert torch.equal(loss, neco_loss(student, teacher).detach())


def test_autocast_and_half_precision_compute_in_float32() -> None:
    student, teacher = (part.bfloat16() for part in random_rows(4))
    student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = neco_loss(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, neco_loss(student.float(), teacher.float()))


@pytest.mark.parametrize("steepness", [1e3, 1e4, 1e6])
@pytest.mark.parametrize("network", ["bitonic", "odd_even"])
def test_steep_sorts_in_float32_stay_finite(network: str, steepness: float) -> None:
    student, teacher = random_rows(64, scale=0.5)
    student.requires_grad_()
    loss = neco_loss(student, teacher, network=network, student_steepness=steepness, teacher_steepness=steepness)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    if network == "odd_even":  # the definition has weights of exactly 0 here, and their logarithm is no number
        assert by_definition(student, teacher, network, steepness).isnan()


def test_nan_is_not_hidden() -> None:
    student, teacher = random_rows(4)
    student[2, 3] = math.nan
    assert neco_loss(student, teacher).isnan()


def test_memory_does_not_grow_with_rows_or_layers() -> None:
    """Columns and tape of one part of the rows: within the budget for 21 layers and for 49, few rows or many."""
    student, _ = random_rows(2000)
    for network in ("bitonic", "odd_even"):
        layers = sorting.plan(network, 49, student.device)
        size = sorting.part_rows(layers, student, differentiable=True)
        tape: sorting.Tape = []
        columns = sorting.sort_columns(student[:size].T, layers, sorting.DISTRIBUTIONS["cauchy"], tape)
        assert len(tape) == len(layers)
        tensors = [columns, *(t for z, alpha, differences in tape for t in (z, alpha, *differences))]
        assert sum(t.numel() * t.element_size() for t in tensors) <= sorting.CPU_BYTES


def test_wrong_use_is_told() -> None:
    student, teacher = random_rows(4)
    with pytest.raises(UsageError, match=r"\(4, 49\) and teacher_sim \(3, 49\) must have one shape"):
        neco_loss(student, teacher[:3])
    with pytest.raises(UsageError, match="Did you mean 'odd_even'"):
        neco_loss(student, teacher, network="oddeven")
    with pytest.raises(UsageError, match="steepness must be a positive number, not -1"):
        neco_loss(student, teacher, teacher_steepness=-1)
    with pytest.raises(UsageError, match="at least one of each"):
        neco_loss(student[:0], teacher[:0])
