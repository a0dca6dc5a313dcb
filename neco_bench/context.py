"""What a task is handed besides encoder, data and settings, and what it hands back. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from neco_bench.cache import cache_dir
from neco_bench.errors import UsageError

if TYPE_CHECKING:
    from neco_bench.encoders.base import Encoder
    from neco_bench.features.store import FeatureStore
    from neco_bench.protocol import Task

log = logging.getLogger("neco_bench")
T = TypeVar("T")
PER_ITEM = 128  # bytes of an item's place in the order of a run
LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"  # of containers, versions 2 and 1


def item_rng(seed: int, *key: object) -> np.random.Generator:
    """A generator that depends on (seed, key) alone: what happens to an item never moves with workers or batches."""
    entropy = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(entropy[:16], "little")))


@dataclass
class Context:
    """One run: seed, loading and batch settings, and what is measured on the way.

    batch_size: images per encoder forward; halved when the device runs out of memory. timing: seconds per phase.
    notes: facts of the run that belong in its provenance. store: where features are kept; None keeps none. reused:
    images whose features came from it.
    watched: ids of items that `show` will draw. seen: what the family hands over of them, by id: `truth` and
    `prediction` (H, W); where it has them `clusters` (H, W), `features` (D, h, w), of equal shape for all images, and
    `neighbours`, a function from a patch's number to its `Neighbour`s; of
    pairs `points` (P, 2), the predicted pixels (x, y) of the target, their `errors` and the longest `side` of its box.
    """

    seed: int = 0
    batch_size: int = 16
    workers: int = 0
    progress: bool = False
    timing: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    notes: dict[str, Any] = field(default_factory=dict)
    store: FeatureStore | None = None
    reused: int = 0
    watched: frozenset[str] = frozenset()
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `timing[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timing[name] += time.perf_counter() - start

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        """`items` with a progress bar on stderr where that is a terminal."""
        if not self.progress:
            return items
        from tqdm import tqdm

        return tqdm(items, desc=description, total=total, disable=None, leave=False)


@dataclass(frozen=True)
class Neighbour:
    """A patch of a memory: its cosine with a query, its most frequent class, and `view`, the patch amid its image.

    view: (3 s, 3 s, 3) uint8 for a patch of side s, black beyond the image.
    """

    cosine: float
    label: int
    view: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What a task family returns. Metrics are fractions; statistics go beside the result as arrays. ci95: None where
    an interval cannot be had, as from a single image."""

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float | None]]
    ci95: Mapping[str, tuple[float, float] | None]
    n_images: int
    statistics: dict[str, np.ndarray]
    features: dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """What a run will take, known before it. images: through the encoder, each `size` pixels a side. operations:
    floating-point ones besides, in inner products of vectors of `width`. memory, disk: bytes held at once."""

    images: int
    size: int
    width: int
    operations: float = 0
    memory: float = 0
    disk: float = 0


def memory_there(device: Any = None) -> float:
    """Bytes of memory of this machine, or of its container, and of a GPU; infinite where that is not known."""
    try:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # Windows
        return float("inf")
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max": none
            memory = min(memory, float(Path(path).read_text()))
    if device is not None and device.type == "cuda":
        import torch  # not needed to plan

        memory += torch.cuda.get_device_properties(device).total_memory
    return memory


def check_fits(task: Task, draws: Iterable[Mapping[str, Any]], encoder: Encoder, context: Context) -> None:
    """Raise UsageError for a run that needs more memory or disk than there is; lower the batch size to what fits.

    Known from the family's `cost`; families without one, of plug-ins, are not checked.
    """
    cost_of = getattr(task.module, "cost", None)
    if cost_of is None:
        return
    there, settings = memory_there(encoder.device), task.settings()
    for data in draws:
        cost = cost_of(settings, data, encoder.stride, encoder.embed_dim)
        image = 4.0 * (3 * cost.size**2 + encoder.embed_dim * (cost.size // encoder.stride) ** 2)
        needed = cost.memory + image + PER_ITEM * cost.images
        if needed > there:
            changed = ", ".join(f"{key}={value}" for key, value in task.changed.items())
            raise UsageError(
                f"{task.card.name}@{task.label} needs about {needed / 2**30:,.0f} GiB of memory, there are "
                f"{there / 2**30:,.0f} GiB. "
                + (f"Lower what --set gives ({changed})." if changed else "Use --limit, a lower --set input_size=N.")
            )
        free = shutil.disk_usage(next(p for p in (cache_dir(), *cache_dir().absolute().parents) if p.exists())).free
        if cost.disk / 2 > free:  # part of that is for features that are kept only where there is room
            raise UsageError(
                f"{task.card.name}@{task.label} needs about {cost.disk / 2**30:,.0f} GiB in {cache_dir()}, "
                f"{free / 2**30:,.0f} GiB are free. Free space, set NECO_BENCH_CACHE to another disk, or use --limit."
            )
        fitting = max(1, int((there - needed) / 4 / image))  # the rest is for the encoder, and for loading
        if context.batch_size > fitting:
            log.warning("--batch-size %d does not fit into memory: %d is used.", context.batch_size, fitting)
            context.batch_size = fitting
