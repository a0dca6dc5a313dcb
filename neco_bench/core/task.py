"""The context and the return value of a task. Imports no torch."""

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
    """Measurements and notes of a running task.

    batch_size: images per encoder forward, if lower than requested: it is halved when the device runs out of memory.
    timing: seconds per phase. notes: facts for the provenance. reused: number of images whose features were read from
    the feature store. predictions: values stored by `Context.record`, by item id.
    """

    batch_size: int | None = None
    timing: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    notes: dict[str, Any] = field(default_factory=dict)
    reused: int = 0
    predictions: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Options for running a task, and `run`, the record of the run.

    batch_size: maximum number of images per encoder forward. workers: loading processes; with 0, threads load.
    progress: shows the progress. store: the feature store; None stores nothing. recorded_ids: ids of items that `show`
    will draw. layers_ahead: block numbers of later jobs, whose features are stored from the forward passes of this job.
    identity: identity of the encoder and the library versions, used in names of files that a family stores; None stores
    nothing. fresh: ignore files stored by earlier runs. checkpointing: if a family trains the encoder, compute
    activations again in backward: less memory, more time.
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
    layers_ahead: tuple[int, ...] = ()

    @property
    def batch_size_used(self) -> int:
        """Current number of images per encoder forward."""
        return self.run.batch_size or self.batch_size

    def note(self, **facts: Any) -> None:
        """Add facts about the run to its provenance."""
        self.run.notes |= facts

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds in this context to `run.timing[name]`."""
        if self.progress is not None:
            self.progress.enter(name.replace("_", " "))
        start = time.perf_counter()
        try:
            yield
        finally:
            self.run.timing[name] += time.perf_counter() - start

    def record(self, item_id: str, **values: Any) -> None:
        """Store values of an item that `show` draws, if it is in `recorded_ids`; functions are called for their value.

        Args:
            item_id: id of an image or a pair.
            values: for images, `truth` and `prediction` (H, W), and, if the family has them, `clusters` (H, W),
                `foreground` (H, W) bool, `image` (h, w, 3) uint8 if only a part of it is predicted, `features`
                (D, h, w), with the same shape for all images, and `neighbours`, a function (passed as the value of a
                function) from a patch's index to its `Neighbour`s. For pairs, `points` (P, 2), the predicted pixels
                (x, y) of the target, their `errors` (P,) and the longest `side` of the target's box, in pixels. For
                clips, `truth` and `prediction`, lists of (H, W), and `scores` (2, objects, T), see `draw_clip`. For
                depth and normals, `image`, `truth`, `prediction` (H, W) or (H, W, 3), and `values`, the metrics by
                name.
        """
        if item_id in self.recorded_ids:
            self.run.predictions[item_id] = {
                name: value() if callable(value) else value for name, value in values.items()
            }

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        """Iterate over `items`, and show the progress if requested."""
        return items if self.progress is None else self.progress.track(items, description, total)


@dataclass(frozen=True)
class Neighbour:
    """A patch of a memory: its cosine with a query, its majority class, and `view`, the patch in its image.

    view: (3 s, 3 s, 3) uint8 for a patch of side s, black outside the image.
    """

    cosine: float
    label: int
    view: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """The return value of a task family.

    metrics: by name; fractions, unless `core.metric.METRICS` or `units` state otherwise. per_class: by metric and
    class, None for a class without a value. statistics: per-item arrays, stored with the result; from the forms in
    `results/statistics.py`, the runner computes intervals with the data set's sampling unit. ci95: intervals by metric
    that the family computes itself, None if there is none, as for a single image. features: how inputs were prepared,
    for the provenance. units: units of metrics that are not in METRICS, such as those of a plug-in.
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
    """The expected cost of a run.

    images: number of images to encode, with `size` pixels per side. unstored: number of these whose features are never
    stored, so that each layer of a sweep needs its own passes. operations: other floating-point operations, in inner
    products of vectors of `width` dimensions. memory, disk: maximum number of bytes in use.
    """

    images: int
    size: int
    width: int
    operations: float = 0
    memory: float = 0
    disk: float = 0
    unstored: int = 0
