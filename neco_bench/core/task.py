"""What a task is handed besides encoder, data and settings, and what it hands back. Imports no torch."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


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
    store: Any = None
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
