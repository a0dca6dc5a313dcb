"""Run with several processes, started by torchrun: `torchrun --nproc-per-node N -m neco_bench run ...`.

Images are divided among the processes for encoding and scoring, and so is the memory bank made from them; small data
(nearest neighbours, confusion counts) is gathered. The result equals that of one process. torch is imported only if
there are several processes.
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

# For groups in which one process may work for hours while the others wait. torchrun detects processes that die.
NO_LIMIT = timedelta(days=365)

_place = (0, 1)

_group: Any = None  # the group of these processes; None is the default group


def started_by_torchrun() -> bool:
    """Return whether torchrun started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> None:
    """Join the other processes; if there are GPUs, each process uses the GPU with its local number."""
    global _place
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=NO_LIMIT)
    _place = torch.distributed.get_rank(), torch.distributed.get_world_size()


@contextlib.contextmanager
def sharing(group: Any) -> Iterator[None]:
    """Divide runs among the processes of a torch.distributed group that contains this process."""
    global _place, _group
    import torch.distributed as dist

    before = _place, _group
    _place, _group = (dist.get_rank(group), dist.get_world_size(group)), group
    try:
        yield
    finally:
        _place, _group = before


def rank() -> int:
    """Return the number of this process, 0 for a single process."""
    return _place[0]


def world() -> int:
    """Return the number of processes of this run."""
    return _place[1]


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, in the order of processes."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value, group=_group)
    return values


def gather_rows(rows: Tensor, most: int) -> list[Tensor]:
    """Return the rows (n, ...) of each process; n is at most `most` and may differ between processes."""
    import torch

    counts = gather(len(rows))
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded, group=_group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


@dataclass
class RankShard:
    """The part of a process: `images` of the `total` of all processes, from index `start`.

    batch_number: number of previous batches, of which a step has several if gradients are accumulated.
    """

    seed: int
    images: int
    start: int = 0
    total: int = 0
    batch_number: int = 0

    def __post_init__(self) -> None:
        self.total = self.total or self.images
