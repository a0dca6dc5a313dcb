"""Several processes on one run, started by torchrun: `torchrun --nproc-per-node N -m neco_bench run ...`.

Images are shared out for encoding and scoring, and a memory bank with those it was made of; what is small (nearest
neighbours, confusion counts) is gathered. The result is the same as that of one process. Imports no torch
until there are several processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# For groups in which one process may work for hours while the others wait. One that dies is noticed by torchrun.
NO_LIMIT = timedelta(days=365)

_place = (0, 1)

_group: Any = None  # of these processes; None is the default group


def started_by_torchrun() -> bool:
    """Whether there are several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> None:
    """Join the other processes; each takes the GPU of its number, where there are GPUs."""
    global _place
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=NO_LIMIT)
    _place = torch.distributed.get_rank(), torch.distributed.get_world_size()


@contextlib.contextmanager
def sharing(group: Any) -> Iterator[None]:
    """Share runs out over the processes of a torch.distributed group that this one belongs to."""
    global _place, _group
    import torch.distributed as dist

    before = _place, _group
    _place, _group = (dist.get_rank(group), dist.get_world_size(group)), group
    try:
        yield
    finally:
        _place, _group = before


def rank() -> int:
    """Number of this process, 0 where there is one."""
    return _place[0]


def world() -> int:
    """Number of processes that share this run."""
    return _place[1]


def gather(value: Any) -> list[Any]:
    """What each process gives, in the order of processes."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value, group=_group)
    return values


def gather_rows(rows: Tensor, most: int) -> list[Tensor]:
    """The rows (n, ...) of each process, n at most `most` and different between processes."""
    import torch

    counts = gather(len(rows))
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded, group=_group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


@dataclass
class RankShard:
    """What a process works on: `images` of the `total` of all processes, from number `start`.

    batch_number: how many batches came before, several to a step where gradients are accumulated.
    """

    seed: int
    images: int
    start: int = 0
    total: int = 0
    batch_number: int = 0

    def __post_init__(self) -> None:
        self.total = self.total or self.images
