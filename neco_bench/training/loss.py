"""The loss of NeCo (Pariza et al., "Near, far: Patch-ordering enhances vision foundation models' scene understanding",
ICLR 2025): the student's patches should order reference patches by similarity as the teacher's patches do.

As in the official code, similarities are sorted ascending, and each reference has a distribution over ranks: there is
no second cross-entropy over the references of a rank.

Deviation: the official code takes the logarithm of the student's weights directly, so a weight that underflows to 0
(float32, odd_even, steepness 1000 and above) makes the loss NaN. Here weights below the smallest normal number (1.2e-38
in float32) are replaced by that number, and have no gradient. All other weights are unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neco_bench.core.errors import UsageError
from neco_bench.training.sorting import (
    DISTRIBUTIONS,
    Tape,
    as_rows,
    check_steepness,
    filled,
    in_parts,
    part_rows,
    plan,
    sort_columns,
    sort_gradient,
)


class _NecoLoss(torch.autograd.Function):
    """Compute the gradient together with the value, a few rows at a time, and keep only the gradient."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, network: str, steepness: tuple[float, float], differentiable: bool
    ) -> Tensor:
        layers, cauchy = plan(network, student.shape[1], student.device), DISTRIBUTIONS["cauchy"]
        scale, smallest = -1 / student.numel(), torch.finfo(student.dtype).tiny
        rows, size = student.detach(), part_rows(layers, student, differentiable)

        def work(part: slice) -> tuple[Tensor, Tensor | None]:
            """Return the sum over a part of the rows, and its gradient."""
            tape: Tape | None = [] if differentiable else None
            own = slice(len(rows[part]))  # the other columns are zero padding
            target = sort_columns(filled(teacher[part] * steepness[1], size), layers, cauchy)[:, 1:, own]
            columns = sort_columns(filled(rows[part] * steepness[0], size), layers, cauchy, tape)
            weights = columns[:, 1:, own].clamp_min(smallest)
            gradient = None
            if tape is not None:
                underflow = columns[:, 1:, own] < smallest
                columns[:, 0] = 0
                torch.div(target, weights, out=columns[:, 1:, own]).masked_fill_(underflow, 0)
                gradient = sort_gradient(columns, layers, cauchy, tape).T[own] * (scale * steepness[0])
            return weights.log_().mul_(target).sum(), gradient

        totals, gradients = zip(*in_parts(work, size, rows), strict=True)
        if differentiable:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(totals).sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * by_loss, None, None, None, None


def neco_loss(
    student_sim: Tensor,
    teacher_sim: Tensor,
    *,
    network: str = "bitonic",
    student_steepness: float = 100.0,
    teacher_steepness: float = 100.0,
) -> Tensor:
    """Compute the cross-entropy between the soft ranks that teacher and student assign to the same references.

    student_sim, teacher_sim: (M, n) cosine similarity of each of M patches to its n references. With the permutations P
    and Q of their soft sorts (Cauchy), the loss is - sum over ranks j of Q[m, i, j] ln P[m, i, j], mean over patches m
    and references i. Gradient to `student_sim` only. Computed in float32 (float64 for float64), inside autocast too.
    Returns a scalar. Raises UsageError for shapes that differ, an unknown network, a steepness that is not positive.
    """
    if student_sim.shape != teacher_sim.shape:
        raise UsageError(
            f"student_sim {tuple(student_sim.shape)} and teacher_sim {tuple(teacher_sim.shape)} must have one shape."
        )
    student = as_rows(student_sim, "student_sim")
    check_steepness(student_steepness)
    check_steepness(teacher_steepness)
    return _NecoLoss.apply(
        student,
        teacher_sim.detach().to(student.dtype),
        network,
        (student_steepness, teacher_steepness),
        torch.is_grad_enabled() and student.requires_grad,
    )
