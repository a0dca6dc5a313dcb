"""Metrics as functions of sums over items, so that leaving out or exchanging an item is a subtraction. Pure numpy.

mIoU over pooled pixels, PCK, weighted means and their roots are all of this form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from neco_bench.metrics.segmentation import AbsentClasses

Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class SumMetric:
    """One or several metrics as functions of sums over items.

    columns: (n, K) values of each item. statistic: maps (rows, K) sums to (rows, R) values of R repeats (seeds, draws
    of the training set), or to (rows, M, R) of M metrics; NaN if undefined. The metric is the mean over the repeats.
    strata: (n,) category of each item, if the metric is a mean over fixed categories. fraction: whether values are in
    [0, 1].
    """

    columns: np.ndarray
    statistic: Statistic
    strata: np.ndarray | None = None
    fraction: bool = True

    def values(self) -> np.ndarray:
        """Values (R,) or (M, R) for all items, one per repeat."""
        return self.statistic(self.columns.sum(0, keepdims=True, dtype=np.float64))[0]

    def value(self) -> np.ndarray:
        """The metric for all items, () or (M,)."""
        return self.values().mean(-1)


def merged(parts: Sequence[SumMetric]) -> SumMetric:
    """Join the same metric of several seeds on the same items, with all their repeats."""
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([part.columns.shape[1] for part in parts])[:-1]

    def of_all(sums: np.ndarray) -> np.ndarray:
        pieces = np.split(sums, ends, axis=1)
        return np.concatenate([part.statistic(own) for part, own in zip(parts, pieces, strict=True)], axis=-1)

    columns = np.concatenate([part.columns for part in parts], axis=1)
    return SumMetric(columns, of_all, parts[0].strata, parts[0].fraction)


def miou_sums(confusions: np.ndarray, absent: AbsentClasses = "exclude") -> SumMetric:
    """Return the mIoU over pooled pixels, from confusions per image (n, C, C), rows ground truth, or (R, n, C, C).

    absent: which classes count, see `segmentation.mean_iou`.
    """
    return miou_of_counts(class_counts(confusions), absent)


def class_iou_sums(confusions: np.ndarray) -> SumMetric:
    """Return the IoU of each class, NaN if it is in neither truth nor prediction; confusions as in `miou_sums`."""
    return class_iou_of_counts(class_counts(confusions))


def class_counts(confusions: np.ndarray) -> np.ndarray:
    """Return pixels (3, R, n, C) of each class: hits, union of truth and prediction, and truth."""
    stack = confusions.reshape(-1, *confusions.shape[-3:])
    hits = np.einsum("snii->sni", stack)
    truth = stack.sum(3)
    return np.stack([hits, truth + stack.sum(2) - hits, truth])


def miou_of_counts(counts: np.ndarray, absent: AbsentClasses = "exclude") -> SumMetric:
    """`miou_sums` of `class_counts`."""
    columns, ious = _ious_of(counts)

    def miou(sums: np.ndarray) -> np.ndarray:
        values, truth, union = ious(sums)
        if absent == "zero":
            return values.mean(2)
        return _mean_counted(values, (union if absent == "union" else truth) > 0)

    return SumMetric(columns, miou)


def class_iou_of_counts(counts: np.ndarray) -> SumMetric:
    """`class_iou_sums` of `class_counts`."""
    columns, ious = _ious_of(counts)

    def per_class(sums: np.ndarray) -> np.ndarray:
        values, _, union = ious(sums)
        return np.where(union > 0, values, np.nan).swapaxes(1, 2)

    return SumMetric(columns, per_class)


def size_sums(confusions: np.ndarray, low: float, high: float) -> SumMetric:
    """Return the mIoU over regions of one size: all pixels of a class in an image, if their share of the image's
    labelled pixels is in [low, high). Classes without such a region are left out. Confusions as in `miou_sums`."""
    counts = class_counts(confusions)
    truth = counts[2, 0]
    share = truth / np.maximum(truth.sum(1, keepdims=True), 1)
    columns, ious = _ious_of(counts * ((truth > 0) & (share >= low) & (share < high)))

    def miou(sums: np.ndarray) -> np.ndarray:
        values, total, _ = ious(sums)
        return _mean_counted(values, total > 0)

    return SumMetric(columns, miou)


def ratio_sums(hits: np.ndarray, totals: np.ndarray) -> SumMetric:
    """Return sum(hits) / sum(totals), (n,) each; NaN without totals."""

    def ratio(sums: np.ndarray) -> np.ndarray:
        return np.where(sums[:, 1:] > 0, _ratios(sums[:, :1], sums[:, 1:]), np.nan)

    return SumMetric(np.stack([hits, totals], axis=1), ratio)


def category_sums(
    hits: np.ndarray, totals: np.ndarray, category: np.ndarray, *, mean: str = "categories", apart: bool = False
) -> SumMetric:
    """Return a weighted mean over categories of sum(hits) / sum(totals), as in PCK; all (n,).

    The categories are fixed by the benchmark and not sampled, so their weights do not change when an item is left out.

    Args:
        hits: hits of each item.
        totals: totals of each item.
        category: category index of each item.
        mean: "categories" gives equal weights, "totals" weights by totals, which gives sum(hits) / sum(totals).
        apart: whether each category is a separate metric, (rows, categories, 1).
    """
    _, group = np.unique(category, return_inverse=True)
    member = np.arange(group.max(initial=0) + 1) == group.reshape(-1, 1)
    columns = np.concatenate([member * hits[:, None], member * totals[:, None]], axis=1)
    weights = (member * totals[:, None]).sum(0) if mean == "totals" else np.ones(member.shape[1])

    def ratio(sums: np.ndarray) -> np.ndarray:
        above, below = np.split(sums, 2, axis=1)
        values = _ratios(above, below)
        if apart:
            return np.where(below > 0, values, np.nan)[..., None]
        return _mean_counted(values, (below > 0) * weights)[:, None]

    return SumMetric(columns, ratio, group.reshape(-1))


def mean_sums(
    scores: np.ndarray, weights: np.ndarray | None = None, *, root: bool = False, fraction: bool = True
) -> SumMetric:
    """Return the weighted mean of scores, (n,) or (R, n) of repeats, or its square root; weights: (n,)."""
    stack = np.atleast_2d(scores)
    weights = np.ones(stack.shape[1]) if weights is None else weights
    columns = np.concatenate([(stack * weights).T, weights[:, None]], axis=1)

    def mean(sums: np.ndarray) -> np.ndarray:
        total = sums[:, -1:]
        values = np.where(total > 0, _ratios(sums[:, :-1], np.broadcast_to(total, sums[:, :-1].shape)), np.nan)
        return np.sqrt(np.maximum(values, 0)) if root else values

    return SumMetric(columns, mean, fraction=fraction)


def _ious_of(counts: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], tuple[np.ndarray, ...]]]:
    """Return columns, and a function of their sums: IoU, pixels of ground truth and union, (rows, R, C) each."""
    _, repeats, images, classes = counts.shape

    def ious(sums: np.ndarray) -> tuple[np.ndarray, ...]:
        tp, total, gt = sums.reshape(-1, 3, repeats, classes).swapaxes(0, 1)
        return _ratios(tp, total), gt, total

    return counts.transpose(2, 0, 1, 3).reshape(images, 3 * repeats * classes), ious


def _ratios(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, where 0 / 0 is 0."""
    return np.divide(above, below, out=np.zeros(above.shape), where=below > 0)


def _mean_counted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean along the last axis; NaN if all weights are zero."""
    total = weights.sum(-1)
    return np.divide((values * weights).sum(-1), total, out=np.full(total.shape, np.nan), where=total > 0)
