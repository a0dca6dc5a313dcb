"""The available memory, and whether a job fits into memory and disk space, according to its family's `cost`."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neco_bench.core.errors import UsageError
from neco_bench.core.paths import cache_dir

if TYPE_CHECKING:
    from neco_bench.core.protocol import Task
    from neco_bench.encoders.base import Encoder

log = logging.getLogger("neco_bench")

LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"  # containers: cgroup 2 and 1


def host_memory() -> int | None:
    """Return the bytes of memory of this machine or container; None if unknown."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            memory = min(memory, int(Path(path).read_text()))
    return memory


def memory_there(device: Any = None) -> float:
    """Return the bytes of memory of this machine or container plus those of a GPU; infinite if unknown."""
    memory = float(host_memory() or "inf")
    if device is not None and device.type == "cuda":
        import torch  # not needed to plan

        memory += torch.cuda.get_device_properties(device).total_memory
    return memory


def check_fits(task: Task, draws: Iterable[Mapping[str, Any]], encoder: Encoder, batch_size: int) -> int:
    """Raise UsageError if a run needs more memory or disk space than available; return a batch size that fits.

    The requirements are those of the family's `cost`; families of plug-ins without `cost` are not checked.
    """
    cost_of = getattr(task.module, "cost", None)
    if cost_of is None:
        return batch_size
    there, settings = memory_there(encoder.device), task.settings()
    for data in draws:
        cost = cost_of(settings, data, encoder.stride, encoder.embed_dim)
        image = 4.0 * (3 * cost.size**2 + encoder.embed_dim * (cost.size // encoder.stride) ** 2)
        needed = cost.memory + image + 128 * cost.images  # the order of a run needs 128 bytes per item
        if needed > there:
            changed = ", ".join(f"{key}={value}" for key, value in task.changed.items())
            raise UsageError(
                f"{task.card.name}@{task.label} needs about {needed / 2**30:,.0f} GiB of memory; there are "
                f"{there / 2**30:,.0f} GiB. "
                + (f"Lower the --set values ({changed})." if changed else "Use --limit or a lower --set input_size=N.")
            )
        free = shutil.disk_usage(next(p for p in (cache_dir(), *cache_dir().absolute().parents) if p.exists())).free
        if cost.disk / 2 > free:  # part of it is for features that are stored only if there is space
            raise UsageError(
                f"{task.card.name}@{task.label} needs about {cost.disk / 2**30:,.0f} GiB in {cache_dir()}; "
                f"{free / 2**30:,.0f} GiB are free. Free space, set NECO_BENCH_CACHE to another disk, or use --limit."
            )
        fitting = max(1, int((there - needed) / 4 / image))  # the rest is for the encoder and for loading
        if batch_size > fitting:
            log.warning("--batch-size %d does not fit into memory; using %d.", batch_size, fitting)
            batch_size = fitting
    return batch_size
