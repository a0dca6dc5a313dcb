"""Percentile-bootstrap intervals and paired tests over images or pairs, from per-image statistics. Pure numpy.

Images are resampled with replacement (Efron 1979); a data-set metric such as mIoU is computed anew from the pooled
counts of each draw. A draw is a vector of how often each image occurs, so that many draws are one matrix product. The
same n and seed give the same draws, whatever the metric. Where all draws agree, Wilson's interval takes their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from neco_bench.core.errors import NumericalError
from neco_bench.metrics.segmentation import AbsentClasses

_CHUNK = 4_000_000  # drawn image indices held at once: about 100 MB


Interval = tuple[float, float]


Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class BootstrapMetric:
    """A metric as a function of sums over items: `columns` (n, K) and `statistic`, (rows, K) sums to (rows,) values,
    or to (rows, C) of several metrics at once.

    images: (n, 2) ids of the two images of each item, where items are pairs: those with an image in common depend on
    each other.
    """

    columns: np.ndarray
    statistic: Statistic
    images: np.ndarray | None = None

    def value(self) -> np.ndarray:
        """The metric of all items."""
        return self.statistic(self.columns.sum(0, keepdims=True, dtype=np.float64))[0]


def miou_sums(confusions: np.ndarray, absent: AbsentClasses = "exclude") -> BootstrapMetric:
    """mIoU over pooled pixels, from per-image confusions (n, C, C), rows ground truth, or (S, n, C, C): see
    `bootstrap_miou`."""
    columns, ious = _segmentation(confusions)
    _, truth, _ = ious(columns.sum(0, keepdims=True, dtype=np.float64))
    share = (truth > 0).mean(2) if absent == "zero" else 1.0

    def miou(sums: np.ndarray) -> np.ndarray:
        values, gt, total = ious(sums)
        return (_mean_counted(values, (total if absent == "union" else gt) > 0) * share).mean(1)

    return BootstrapMetric(columns, miou)


def class_iou_sums(confusions: np.ndarray) -> BootstrapMetric:
    """The IoU of each class, (rows, C), NaN where it is in neither truth nor prediction; of S seeds their mean."""
    columns, ious = _segmentation(confusions)

    def per_class(sums: np.ndarray) -> np.ndarray:
        values, _, total = ious(sums)
        return np.where(total > 0, values, np.nan).mean(1)

    return BootstrapMetric(columns, per_class)


def size_sums(confusions: np.ndarray, low: float, high: float) -> BootstrapMetric:
    """mIoU over the regions of one size: what a class covers of an image, where that is a share in [low, high) of the
    image's labelled pixels. Classes without such a region are left out. Confusions as in `miou_sums`."""
    truth = (confusions[0] if confusions.ndim == 4 else confusions).sum(2)
    share = truth / np.maximum(truth.sum(1, keepdims=True), 1)
    inside = (truth > 0) & (share >= low) & (share < high)
    columns, ious = _segmentation(confusions)
    parts = columns.reshape(len(columns), 3, -1, truth.shape[1]) * inside[:, None, None]

    def miou(sums: np.ndarray) -> np.ndarray:
        values, gt, _ = ious(sums)
        return _mean_counted(values, gt > 0).mean(1)

    return BootstrapMetric(parts.reshape(columns.shape), miou)


def ratio_sums(
    hits: np.ndarray,
    totals: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    images: np.ndarray | None = None,
    apart: bool = False,
) -> BootstrapMetric:
    """sum(hits) / sum(totals), or with groups the mean of their ratios: see `bootstrap_ratio`. apart: the ratio of each
    group, (rows, groups), NaN where it has no totals."""
    ids, group = np.unique(np.zeros(len(hits), int) if groups is None else groups, return_inverse=True)
    member = np.arange(len(ids)) == group.reshape(-1, 1)
    columns = np.concatenate([member * hits[:, None], member * totals[:, None]], axis=1)

    def ratio(sums: np.ndarray) -> np.ndarray:
        above, below = np.split(sums, 2, axis=1)
        values = _ratios(above, below)
        return np.where(below > 0, values, np.nan) if apart else _mean_counted(values, below > 0)

    return BootstrapMetric(columns, ratio, images)


def _segmentation(confusions: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], tuple[np.ndarray, ...]]]:
    """Columns, and a function of their sums: IoU, pixels of ground truth and of the union, (rows, S, C) each."""
    stack = confusions[None] if confusions.ndim == 3 else confusions
    hits = np.einsum("snii->sni", stack)
    truth = stack.sum(3)
    union = truth + stack.sum(2) - hits
    seeds, images, classes = hits.shape

    def ious(sums: np.ndarray) -> tuple[np.ndarray, ...]:
        tp, total, gt = sums.reshape(-1, 3, seeds, classes).swapaxes(0, 1)
        return _ratios(tp, total), gt, total

    return np.stack([hits, union, truth]).transpose(2, 0, 1, 3).reshape(images, 3 * seeds * classes), ious


def bootstrap_miou(
    confusions: np.ndarray,
    *,
    absent: AbsentClasses = "exclude",
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """(low, high) of the mIoU over pooled pixels, from per-image confusions (n, C, C), rows ground truth.

    With (S, n, C, C), of several seeds over the same images, the interval is that of the mean of their S mIoUs.
    "exclude" leaves out of a draw the classes without ground truth in it, "union" those in neither truth nor
    prediction there. "zero" leaves out the same as "exclude", times the share of the C classes that have ground
    truth at all: a class that is in no image counts as 0, not one that only the draw misses. None where a single
    image has labelled pixels: nothing is known of the spread. Where all draws agree: `_wilson`. Raises
    NumericalError for no images, or no labelled pixel.
    """
    if not confusions.any():
        raise NumericalError(
            f"The masks of the {confusions.shape[-3]} images to score on have no labelled pixel, so the metric is "
            f"undefined. Check them: neco-bench data check."
        )
    sums = miou_sums(confusions, absent)
    labelled = (confusions[0] if confusions.ndim == 4 else confusions).any((1, 2)).sum()
    return _interval(_resampled(sums, draws, seed), level, int(labelled))


def bootstrap_ratio(
    hits: np.ndarray,
    totals: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    images: np.ndarray | None = None,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """(low, high) of sum(hits) / sum(totals), both (n,), as in PCK per point.

    images: (n, 2) ids of the two images of each pair; the interval is then as wide as pairs that share images ask for
    (`_dependence`), and stays within [0, 1].

    With `groups` (n,) integers (categories): of the mean of the groups' ratios; a group without totals in a draw is
    left out of that draw. None for a single item: nothing is known of its spread. Where all draws agree: `_wilson`.
    Raises NumericalError for no items, or no totals in any draw.
    """
    sums = ratio_sums(hits, totals, groups, images=images)
    values, items = _resampled(sums, draws, seed), int((totals > 0).sum())
    if images is None:
        return _interval(values, level, items)
    centre = sums.value()
    spread = centre + (values - centre) * _dependence(_influence(sums), images)
    # So many pairs at most have no image in common with each other.
    apart = min(items, max(2, len(np.unique(images[totals > 0])) // 2))
    interval = _interval(spread, level, apart)
    return interval and (max(0.0, interval[0]), min(1.0, interval[1]))


@dataclass(frozen=True)
class Difference:
    """value: of the second less the first; low, high: its interval; p: two-sided, of no difference."""

    value: float
    low: float
    high: float
    p: float


def paired_difference(
    first: BootstrapMetric, second: BootstrapMetric, *, draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> list[Difference]:
    """The difference of a metric between two models on the same items, drawn anew together (paired bootstrap).

    One per metric of the statistic. p is the smallest level at which the percentile interval leaves out zero (Efron and
    Tibshirani, *An Introduction to the Bootstrap*, 1993, section 15.4), at least 1 / (draws + 1). NaN where a metric is
    undefined for all items; no interval and no p where a difference rests on one item, as drawing anew tells nothing.
    Raises NumericalError where the items differ in number.
    """
    if len(first.columns) != len(second.columns):
        raise NumericalError(f"{len(first.columns)} items cannot be paired with {len(second.columns)}.")
    values = np.atleast_1d(second.value() - first.value())
    spread = _resampled(second, draws, seed) - _resampled(first, draws, seed)
    images = first.images if first.images is not None else second.images
    if images is not None:
        spread = values + (spread - values) * _dependence(_influence(second) - _influence(first), images)
    found = []
    for value, column in zip(values, spread.reshape(len(spread), -1).T, strict=True):
        known = column[~np.isnan(column)]
        if np.isnan(value) or not len(known):
            found.append(Difference(float("nan"), float("nan"), float("nan"), float("nan")))
            continue
        if value and np.ptp(known) <= 1e-12:
            found.append(Difference(float(value), float("nan"), float("nan"), float("nan")))
            continue
        low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
        tail = min((known <= 0).sum(), (known >= 0).sum())
        found.append(Difference(float(value), float(low), float(high), min(1.0, 2 * (tail + 1) / (len(known) + 1))))
    return found


def holm(values: np.ndarray) -> np.ndarray:
    """p-values adjusted for their number (Holm, Scandinavian Journal of Statistics 1979); NaN stays NaN."""
    adjusted = np.full(len(values), np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    steps = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def bootstrap_mean(
    values: np.ndarray,
    *,
    images: np.ndarray | None = None,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """(low, high) of the mean of `values` (n,); images and None as in `bootstrap_ratio`.

    Raises NumericalError for no values, or NaN among them.
    """
    return bootstrap_ratio(values, np.ones(len(values)), images=images, draws=draws, seed=seed, level=level)


def _influence(sums: BootstrapMetric) -> np.ndarray:
    """(n,) or (n, C): how the metric moves with the weight of each item (infinitesimal jackknife, Jaeckel 1972)."""
    total, step = sums.columns.sum(0, keepdims=True, dtype=np.float64), 1e-4
    return (sums.statistic(total + step * sums.columns) - sums.statistic(total)) / step


def _dependence(influence: np.ndarray, images: np.ndarray) -> np.ndarray:
    """How many times larger the standard error is because pairs share images, () or (C,), at least 1.

    The variance is the sum of products of the influences of all two pairs that have an image in common (dyadic-robust:
    Fafchamps and Gubert 2007; Aronow, Samii and Assenova, *Political Analysis* 2015, eq. 5); independent pairs have the
    sum of squares. influence: (n,) or (n, C); images: (n, 2).
    """
    influence = np.nan_to_num(influence)

    def squares(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
        _, group = np.unique(groups, axis=0, return_inverse=True)
        sums = np.zeros((group.max() + 1, *values.shape[1:]))
        np.add.at(sums, group.reshape(-1), values)
        return np.square(sums).sum(0)

    shared = squares(images.T.reshape(-1), np.concatenate([influence, influence]))
    dyadic = shared - squares(np.sort(images, axis=1), influence)
    single = np.square(influence).sum(0)
    ratio = np.divide(dyadic, single, out=np.ones_like(single), where=single > 0)
    return np.sqrt(np.maximum(ratio, 1.0))


def _ratios(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, where 0 / 0 is 0."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _mean_counted(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Mean along the last axis over what is counted; NaN where nothing is."""
    number = counted.sum(-1)
    return np.divide((values * counted).sum(-1), number, out=np.full(number.shape, np.nan), where=number > 0)


def _counts(n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n images occurs in each draw: (rows, n) float64 pieces, `draws` rows in all."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    for start in range(0, draws, rows):
        size = min(rows, draws - start)
        picked = rng.integers(0, n, (size, n))
        picked += np.arange(size)[:, None] * n
        yield np.bincount(picked.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _resampled(sums: BootstrapMetric, draws: int, seed: int) -> np.ndarray:
    """The metric of each draw, (draws,) or (draws, C). Equal numbers of items and seeds give the same draws."""
    columns = sums.columns.astype(np.float64)  # pixel counts below 2**53 stay exact
    if not len(columns) or not np.isfinite(columns).all():
        raise NumericalError(f"A bootstrap needs finite values of at least one item, got {len(columns)} items.")
    return np.concatenate([sums.statistic(counts @ columns) for counts in _counts(len(columns), draws, seed)])


def _interval(values: np.ndarray, level: float, items: int) -> Interval | None:
    """Percentile interval of the values of draws (draws,) of so many items; None where it would be a point by default.

    Drawing one item again and again, or items that all agree, gives a point, and says nothing of items not seen.
    """
    values = values[~np.isnan(values)]
    if not len(values):
        raise NumericalError("A bootstrap found no item with ground truth, so the metric is undefined.")
    if items < 2:
        return None
    if np.ptp(values) < 1e-9:
        return _wilson(float(values[0]), items, level) if 0 <= values[0] <= 1 else None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _wilson(mean: float, items: int, level: float) -> Interval:
    """Wilson's interval (1927) of the mean of values in [0, 1]: as wide as if each were 0 or 1, the largest variance.

    Where the mean is 0 or 1, it is one-sided: of 0 hits in 80 it is [0, 0.046].
    """
    z = NormalDist().inv_cdf((1 + level) / 2) if level < 1 else np.inf
    if np.isinf(z):
        return 0.0, 1.0
    centre, half = mean + z**2 / (2 * items), z * np.sqrt(mean * (1 - mean) / items + z**2 / (4 * items**2))
    low, high = ((centre + sign * half) / (1 + z**2 / items) for sign in (-1, 1))
    return max(0.0, min(float(low), mean)), min(1.0, max(float(high), mean))
