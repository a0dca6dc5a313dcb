"""Shared by all segmentation families: the score of predicted class maps, and the Outcome."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from neco_bench.core import distributed
from neco_bench.core.errors import UsageError
from neco_bench.core.protocol import Settings
from neco_bench.core.task import Context, Outcome
from neco_bench.data.base import SegmentationDataset
from neco_bench.features.transforms import resize_nearest_torch
from neco_bench.metrics import segmentation


def images_used(count: int, batch_size: int, off: str) -> int:
    """Return how many of `count` images are in complete batches. Raises UsageError for none.

    off: the option of --set that uses all images, "drop_last=false".
    """
    used = count // batch_size * batch_size
    if not used:
        raise UsageError(
            f"{off.partition('=')[0]} leaves none of the {count} images in complete batches of {batch_size}. "
            f"Use --set {off}, or the clean-1 protocol."
        )
    return used


def reduce_mask(mask: np.ndarray, side: int | None) -> np.ndarray:
    """Resize a mask to side x side by PyTorch's nearest rule; None keeps its size."""
    return mask if side is None else resize_nearest_torch(mask, side, side)


class SegmentationScore:
    """Confusion counts of the images of a data set, for one prediction of each image or for an array of them.

    With several processes, each adds the images that it has predicted, and all get the same outcome. Predictions of the
    images that `show` draws are recorded.

    Args:
        dataset: the data set, whose masks are the ground truth.
        settings: settings of the protocol, with `absent`, which selects the classes of the mean (see `mean_iou`).
        context: context of the run.
        shape: shape of the array of predictions of an image, such as (epochs, rates, seeds) of heads; () for one.
        clusters: K, if predictions are ids of clusters 0..K-1; None if they are class ids.
        extra_classes: names of further ids that may be predicted, after those of the classes.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        settings: Settings,
        context: Context,
        *,
        shape: tuple[int, ...] = (),
        clusters: int | None = None,
        extra_classes: Sequence[str] = (),
    ) -> None:
        self.dataset, self.settings, self.context = dataset, settings, context
        self.shape, self.clusters = shape, clusters
        self.names = (*dataset.classes, *extra_classes)
        self.absent: segmentation.AbsentClasses = settings.absent  # type: ignore[attr-defined]
        self._items: list[int] = []
        self._mappings: list[np.ndarray] = []
        self._counts = [segmentation.ImageConfusions(len(self.names), clusters) for _ in range(math.prod(shape))]

    def to_predict(self, items: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield (row, item) of the images of a batch that this process must predict and add."""
        return ((row, i) for row, i in enumerate(items) if i % distributed.world() == distributed.rank())

    def add(self, item: int, mask: np.ndarray, prediction: np.ndarray, **shown: Any) -> None:
        """Count one image.

        Args:
            item: its index in the data set.
            mask: (H, W) ground truth from the data set or a transform.
            prediction: (*shape, H, W) predicted ids.
            shown: other values that `show` draws, see `Context.record`.

        Raises:
            BadInputError: for ids outside the range of classes or clusters.
        """
        truth = self.dataset.eval_mask(mask)
        flat = prediction.reshape(-1, *truth.shape)
        for counts, own in zip(self._counts, flat, strict=True):
            counts.add(truth, own)
        self._items.append(item)
        self.context.record(self.dataset.ids[item], truth=truth, prediction=flat, **shown)

    @cached_property
    def counts(self) -> list[segmentation.ImageConfusions]:
        """Return the counts of all predictions over all images in order. Nothing can be added afterwards."""
        items = distributed.gather(self._items)
        return [segmentation.ImageConfusions.joined(distributed.gather(counts), items) for counts in self._counts]

    def match(self, method: Callable[[np.ndarray], np.ndarray]) -> None:
        """Assign a class to each predicted id by the (C, K) counts of all images, separately for each prediction."""
        self._mappings = [method(counts.total()) for counts in self.counts]

    def mean_ious(self) -> np.ndarray:
        """Return the mIoU of each prediction as fractions, in the given shape; before `match`, ids are classes."""
        totals = [counts.total() for counts in self.counts]
        if self._mappings:
            pairs = zip(totals, self._mappings, strict=True)
            totals = [segmentation.merge_clusters(total, mapping) for total, mapping in pairs]
        return np.array([segmentation.mean_iou(total, absent=self.absent) for total in totals]).reshape(self.shape)

    def outcome(
        self,
        *,
        used_size: int,
        resize: str,
        select: tuple[int, ...] = (),
        metrics: Mapping[str, float] | None = None,
        statistics: Mapping[str, np.ndarray] | None = None,
    ) -> Outcome:
        """Return the outcome of the predictions at `select`; metrics are means over them.

        Args:
            used_size: side of the inputs in pixels.
            resize: how images were resized, as text.
            select: the first indices into the array of predictions, for all axes or all but the last.
            metrics: additional metrics of the family.
            statistics: additional arrays of the family.
        """
        numbers = np.arange(len(self.counts)).reshape(self.shape)[select]
        mappings = [self._mappings[i] if self._mappings else None for i in numbers.flat]
        per_image = [self.counts[i].per_image(own) for i, own in zip(numbers.flat, mappings, strict=True)]
        self._select_recorded(numbers.flat[0], mappings[0])
        totals = [counts.sum(0) for counts in per_image]
        confusion = per_image[0][None] if len(per_image) == 1 else np.stack(per_image)  # no copy for a single one
        values = {
            "mIoU": float(self.mean_ious()[select].mean()),
            **(metrics or {}),
            "mIoU_present": float(np.mean([segmentation.mean_iou(total, absent="exclude") for total in totals])),
        }
        if self.clusters is None:
            values["pixel_accuracy"] = float(np.mean([np.trace(total) / max(1, total.sum()) for total in totals]))
        iou = np.mean([segmentation.iou_per_class(total) for total in totals], axis=0)
        arrays = {"confusion": confusion}
        if self._mappings:
            arrays["mapping"] = np.stack([self._mappings[i] for i in numbers.flat])
        return Outcome(
            metrics=values,
            per_class={"IoU": segmentation.by_class(iou, self.names)},
            ci95={},  # the runner computes them from the statistics
            n_images=confusion.shape[1],
            statistics={name: array.reshape(*numbers.shape, *array.shape[1:]) for name, array in arrays.items()}
            | dict(statistics or {}),
            features={
                "input_size": self.settings.input_size,
                "used_size": used_size,
                "resize": resize,
                "final_norm": True,
            },
        )

    def _select_recorded(self, number: int, mapping: np.ndarray | None) -> None:
        """Keep one of the recorded predictions of each image, as class ids."""
        for values in self.context.run.predictions.values():
            ids = values["prediction"][number]
            if self.clusters is not None:
                values["clusters"] = ids
            values["prediction"] = ids if mapping is None else mapping[ids]
