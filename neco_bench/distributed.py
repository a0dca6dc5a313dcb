"""Several processes on one run, started by torchrun: `torchrun --nproc-per-node N -m neco_bench run ...`.

Images are shared out for encoding and scoring, and a memory bank with those it was made of; what is small (nearest
neighbours, confusion counts) is gathered. The result is the same as that of one process. Imports no torch
until there are several processes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_place = (0, 1)


def started_by_torchrun() -> bool:
    """Whether there are several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> None:
    """Join the other processes; each takes the GPU of its number, where there are GPUs."""
    global _place
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    _place = torch.distributed.get_rank(), torch.distributed.get_world_size()


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

    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def gather_rows(rows: Tensor, most: int) -> list[Tensor]:
    """The rows (n, ...) of each process, n at most `most` and different between processes."""
    import torch

    counts = gather(len(rows))
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]
