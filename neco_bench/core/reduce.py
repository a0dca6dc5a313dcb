"""Sums (with gradient) and means over the processes of a run. Imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from neco_bench.core.distributed import RankShard


class _SumOverProcesses(torch.autograd.Function):
    """`all_reduce` whose gradient is the sum of the gradients of all processes, because the value of one process is in
    the loss of all. (`torch.distributed.nn.functional.all_reduce` is the same, but deprecated.)"""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.forward(ctx, gradient)


def rows_of_all(part: Tensor, shard: RankShard) -> Tensor:
    """Return the rows (total, ...) of all processes, with gradient; this process has `part` (images, ...)."""
    if not dist.is_initialized():
        return part
    before, after = shard.start, shard.total - shard.start - shard.images
    whole: Tensor = _SumOverProcesses.apply(F.pad(part, (0, 0) * (part.dim() - 1) + (before, after)))
    return whole


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of `value` over all processes, without gradient."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def sum_in_place(tensors: Iterable[Tensor]) -> None:
    """Replace tensors of the same type by their sums over all processes, in one exchange, without gradient."""
    tensors = list(tensors)
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(total.view_as(tensor))
