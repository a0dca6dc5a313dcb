"""Checks before a run that its settings do not exceed the available patches, cores or memory.

Every number of bytes is a lower bound, for the parts whose size follows from the settings; activations of the encoder
are not included. Runs that are refused here could therefore not succeed.
"""

from __future__ import annotations

import itertools
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from neco_bench.core.distributed import RankShard
from neco_bench.core.errors import UsageError
from neco_bench.encoders.base import Encoder
from neco_bench.runner.capacity import host_memory
from neco_bench.training.recipe import Recipe
from neco_bench.training.sorting import MAX_THREADS
from neco_bench.training.views import GLOBALS

log = logging.getLogger("neco_bench")

FLOAT = 4  # bytes
PREFETCHED = 2  # batches that a loading process prepares, DataLoader's default


def default_workers(recipe: Recipe, shard: RankShard) -> int:
    """Return the default number of loading processes: the process's share of the cores minus one, at most 16.

    Their views may use at most a quarter of the process's share of the memory. With several processes, each has at
    least one loading process if there are two cores.
    """
    share = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = usable_cores()
    # 16 load 480 images of 518 px per second at 30 per core, more than a GPU needs.
    workers = min(16, max(cores // share - 1, min(1, cores - 1)))
    memory = process_memory()
    if memory is not None:
        workers = min(workers, max(1, memory // 4 // (PREFETCHED * _view_bytes(recipe, shard))))
    return workers


def usable_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # absent, or "max"
        return cores


def _view_bytes(recipe: Recipe, shard: RankShard) -> int:
    """Return the bytes of the views of a batch when loaded, one for each channel of a pixel."""
    return 3 * shard.images * (GLOBALS * recipe.global_size**2 + recipe.locals * recipe.local_size**2)


@dataclass(frozen=True)
class Need:
    """Bytes required by some settings; on_host: in the machine's memory for any device."""

    what: str
    settings: str
    bytes: int
    on_host: bool = False


def check(recipe: Recipe, encoder: Encoder, shard: RankShard, steps: int, workers: int) -> None:
    """Raise UsageError for settings that exceed the patches of a batch, the cores or the memory.

    steps: steps of the whole run. workers: loading processes. Warns if a setting has less effect than stated.
    """
    most = 32 * (os.cpu_count() or 1)
    if workers > most:
        raise UsageError(
            f"--workers={workers}: each is a process, but this machine has {os.cpu_count()} cores. Use at most {most}."
        )
    if recipe.objective == "neco":
        vectors = recipe.queue_length or shard.total * recipe.cells**2
        if recipe.references > vectors:
            source = "queue_length" if recipe.queue_length else "images of a batch part x cells²"
            raise UsageError(
                f"references={recipe.references} is more than the {vectors} vectors to choose from "
                f"({source}). Use --set references={vectors} or fewer."
            )
        patches = (recipe.global_size // encoder.stride) ** 2
        if recipe.queue_length and recipe.queue_per_image > patches:
            log.warning("queue_per_image=%d: a global view has %d patches only.", recipe.queue_per_image, patches)
    _check_memory(needs(recipe, encoder, shard, min(PREFETCHED * workers, steps * recipe.accumulate)), encoder.device)


def needs(recipe: Recipe, encoder: Encoder, shard: RankShard, prefetched: int) -> list[Need]:
    """Return the minimum requirements of each process of a run, by part. prefetched: number of batches in the queue."""
    images, width, out = shard.images, encoder.embed_dim, recipe.head_dim
    pixels = _view_bytes(recipe, shard)
    sizes = "batch_size, global_size, local_size, locals"
    pairs = GLOBALS * (GLOBALS - 1 + recipe.locals)
    cells, references = recipe.cells**2, recipe.references
    if recipe.objective == "mim":
        out = 3 * encoder.stride**2 if recipe.hidden_target == "pixels" else 1
    layers = [width, *[recipe.head_hidden] * min(recipe.head_layers - 1, 3), out]
    head = sum(before * after for before, after in itertools.pairwise(layers))
    head += max(0, recipe.head_layers - 4) * recipe.head_hidden**2
    copies = 4 + recipe.use_teacher  # weights, gradient, two moments of AdamW
    parts = [
        Need("views", sizes, pixels * FLOAT),
        Need("loaded views", f"{sizes}, or --workers", pixels * (1 + prefetched), on_host=True),
        Need("projection heads", "head_hidden, head_layers, head_dim", head * copies * FLOAT),
    ]
    if recipe.objective == "neco":
        threads = min(MAX_THREADS, torch.get_num_threads()) if encoder.device.type == "cpu" else 1
        rows = pairs * images * cells
        parts += [
            Need("the queue", "queue_length, head_dim", (GLOBALS + 1) * recipe.queue_length * out * FLOAT),
            Need("aligned vectors", f"cells, head_dim, {sizes}", 2 * pairs * images * cells * out * FLOAT),
            Need("references", "references, head_dim, batch_size, locals", pairs * images * references * out * FLOAT),
            Need("similarities", "references, cells, batch_size, locals", 3 * rows * references * FLOAT),
            Need("sorting", "references", min(threads, rows) * sorting_bytes(recipe.network, references)),
        ]
    return parts


def sorting_bytes(network: str, n: int) -> int:
    """Return the minimum bytes of `sorting.sort_columns` to sort one row of n float32 values with gradient.

    These are two sets of columns, the differences on the tape, and those of the largest layer again; exact for
    "bitonic".
    """
    if network == "odd_even":  # n layers of about n / 2 comparators, whose columns grow by two inputs each
        half = n // 2
        tape = (n - 1) // 2 * (half * (half + 1) + (n - half) * n + n)
        largest = (n - 1) // 2 * (n + 1)
    else:
        tape, largest = 0, 0
        blocks = (n - 1).bit_length()
        pad = 2**blocks - n
        for block in range(blocks):
            for stride in (2**i for i in range(block + 1)):
                padded = pad // (2 * stride) * stride + min(pad % (2 * stride), stride)
                layer = (2 ** (blocks - 1) - padded) * (min(n, 2 ** (block + 1)) + 1)
                tape, largest = tape + layer, max(largest, layer)
    return FLOAT * (2 * n * (n + 1) + tape + largest)


def _check_memory(parts: list[Need], device: torch.device) -> None:
    """Raise UsageError if the device or the machine has less memory than the minimum of the parts."""
    apart = device.type == "cuda"
    for on_host in (False, True) if apart else (True,):
        counted = [need for need in parts if need.on_host == on_host or not apart]
        available = process_memory() if on_host else torch.cuda.get_device_properties(device).total_memory
        needed = sum(need.bytes for need in counted)
        if available is not None and needed > available:
            most = max(counted, key=lambda need: need.bytes)
            raise UsageError(
                f"these settings need at least {needed / 2**30:,.1f} GiB of memory in each process, of which "
                f"{most.bytes / 2**30:,.1f} for {most.what}; {available / 2**30:,.1f} are available. Use smaller "
                f"{most.settings}."
            )


def process_memory() -> int | None:
    """Return the bytes of memory available to each process of this machine; None if unknown."""
    memory = host_memory()
    return None if memory is None else memory // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
