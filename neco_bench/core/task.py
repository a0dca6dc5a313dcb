"""What a task gets besides encoder, data and settings, and what it returns. Imports no torch."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from neco_bench.core.metric import Metric
from neco_bench.core.progress import Progress

T = TypeVar("T")


@dataclass
class RunRecord:
    """What is measured and noted while a task runs.

    batch_size: images per encoder forward, where they are fewer than requested: it is halved when the device runs out
    of memory. timing: seconds per phase. notes: facts that belong in the provenance. reused: images whose features came
    from the feature store. predictions: what `Context.record` stored of items, by id.
    """

    batch_size: int | None = None
    timing: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    notes: dict[str, Any] = field(default_factory=dict)
    reused: int = 0
    predictions: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """How a task is to run, and `run`, the record of how it did.

    batch_size: images per encoder forward, at most. workers: loading processes; with 0, threads load. progress:
    what shows how far it is. store: where
    features are stored; None stores none. recorded_ids: ids of items that `show` will draw.
    identity: what stands for the encoder, and the versions of libraries, in names of what a family stores; None stores
    nothing. fresh: leave what is stored of earlier runs aside. checkpointing: of a family that trains the encoder,
    compute activations again in backward: less memory, more time.
    """

    seed: int = 0
    batch_size: int = 16
    workers: int = 0
    progress: Progress | None = None
    store: Any = None
    recorded_ids: frozenset[str] = frozenset()
    run: RunRecord = field(default_factory=RunRecord)
    identity: str | None = None
    fresh: bool = False
    checkpointing: bool = False

    @property
    def batch_size_used(self) -> int:
        """Images per encoder forward from now on."""
        return self.run.batch_size or self.batch_size

    def note(self, **facts: Any) -> None:
        """Add facts of the run to its provenance."""
        self.run.notes |= facts

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds inside to `run.timing[name]`."""
        if self.progress is not None:
            self.progress.enter(name.replace("_", " "))
        start = time.perf_counter()
        try:
            yield
        finally:
            self.run.timing[name] += time.perf_counter() - start

    def record(self, item_id: str, **values: Any) -> None:
        """Store what `show` draws of an item, if it is one of `recorded_ids`; a function is called for its value.

        Args:
            item_id: of an image or a pair.
            values: of images `truth` and `prediction` (H, W), and where the family has them `clusters` (H, W),
                `foreground` (H, W) bool, `image` (h, w, 3) uint8 if only a part of it is predicted, `features`
                (D, h, w), of equal shape for all images, and `neighbours`, a function (passed as the value of a
                function) from a patch's number to its `Neighbour`s. Of pairs `points` (P, 2), the predicted pixels
                (x, y) of the target, their `errors` (P,) and the longest `side` of the target's box, in pixels. Of
                clips `truth` and `prediction`, lists of (H, W), and `scores` (2, objects, T), see `draw_clip`. Of depth
                and normals `image`, `truth`, `prediction` (H, W) or (H, W, 3), and `values`, the metrics by name.
        """
        if item_id in self.recorded_ids:
            self.run.predictions[item_id] = {
                name: value() if callable(value) else value for name, value in values.items()
            }

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        """Iterate over `items`, and say how far this is where progress is shown."""
        return items if self.progress is None else self.progress.track(items, description, total)


@dataclass(frozen=True)
class Neighbour:
    """A patch of a memory: its cosine with a query, its most frequent class, and `view`, the patch in its image.

    view: (3 s, 3 s, 3) uint8 for a patch of side s, black beyond the image.
    """

    cosine: float
    label: int
    view: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What a task family returns.

    metrics: by name; fractions, unless `core.metric.METRICS` or `units` say otherwise. per_class: by metric and class,
    None for a class without a value. statistics: per-item arrays, stored beside the result; from those of the forms in
    `results/statistics.py` the runner makes the intervals, and gives them the data set's sampling unit. ci95: intervals
    by metric that the family makes itself, None where there can be none, as from a single image. features: how inputs
    were prepared, for the provenance. units: of metrics that METRICS does not name, as those of a plug-in.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float | None]]
    ci95: Mapping[str, tuple[float, float] | None]
    n_images: int
    statistics: dict[str, np.ndarray]
    features: dict[str, Any]
    units: Mapping[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What a run will take, known before it.

    images: through the encoder, each `size` pixels a side. operations: further floating-point operations, in inner
    products of vectors of `width`. memory, disk: the largest number of bytes in use.
    """

    images: int
    size: int
    width: int
    operations: float = 0
    memory: float = 0
    disk: float = 0
