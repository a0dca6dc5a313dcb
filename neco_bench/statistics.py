"""Percentile-bootstrap intervals over images or pairs, from per-image sufficient statistics. Pure numpy.

Images are resampled with replacement (Efron 1979); a data-set metric such as mIoU is computed anew from the pooled
counts of each draw. A draw is a vector of how often each image occurs, so that many draws are one matrix product. The
same n and seed give the same draws, whatever the metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from neco_bench.errors import NumericalError
from neco_bench.metrics import Absent

_CHUNK = 4_000_000  # drawn image indices held at once: about 100 MB


def bootstrap_miou(
    confusions: np.ndarray, *, absent: Absent = "exclude", draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """(low, high) of the mIoU over pooled pixels, from per-image confusions (n, C, C), rows ground truth.

    With (S, n, C, C), of several seeds over the same images, the interval is that of the mean of their S mIoUs.
    Absent classes are treated in each draw as `metrics.mean_iou` treats them: "exclude" leaves out classes without
    ground truth in the draw, "union" those in neither truth nor prediction there, "zero" averages over all C with 0 for
    the latter.
    Raises NumericalError for no images, or no ground truth in any draw.
    """
    stack = confusions[None] if confusions.ndim == 3 else confusions
    hits = np.einsum("snii->sni", stack)
    truth = stack.sum(3)
    union = truth + stack.sum(2) - hits
    seeds, images, classes = hits.shape

    def miou(sums: np.ndarray) -> np.ndarray:
        tp, total, gt = sums.reshape(-1, 3, seeds, classes).swapaxes(0, 1).reshape(3, -1, classes)
        counted = {"zero": total >= 0, "exclude": gt > 0, "union": total > 0}[absent]
        values = _mean_ratio(tp, total, counted)
        return values.reshape(-1, seeds).mean(1)

    columns = np.stack([hits, union, truth]).transpose(2, 0, 1, 3).reshape(images, 3 * seeds * classes)
    return _interval(columns, miou, draws, seed, level)


def bootstrap_ratio(
    hits: np.ndarray,
    totals: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """(low, high) of sum(hits) / sum(totals), both (n,), as in PCK per point.

    With `groups` (n,) integers (categories): of the mean of the groups' ratios; a group without totals in a draw is
    left out of that draw. Raises NumericalError for no items, or no totals in any draw.
    """
    ids, group = np.unique(np.zeros(len(hits), int) if groups is None else groups, return_inverse=True)
    member = np.arange(len(ids)) == group.reshape(-1, 1)
    columns = np.concatenate([member * hits[:, None], member * totals[:, None]], axis=1)

    def ratio(sums: np.ndarray) -> np.ndarray:
        above, below = np.split(sums, 2, axis=1)
        return _mean_ratio(above, below, below > 0)

    return _interval(columns, ratio, draws, seed, level)


def bootstrap_mean(
    values: np.ndarray, *, draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """(low, high) of the mean of `values` (n,). Raises NumericalError for no values, or NaN among them."""
    return bootstrap_ratio(values, np.ones(len(values)), draws=draws, seed=seed, level=level)


def _mean_ratio(above: np.ndarray, below: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """(draws,) mean over the counted (draws, K) of above / below, where 0 / 0 is 0; NaN where none is counted."""
    ratios = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    number = counted.sum(1)
    return np.divide((ratios * counted).sum(1), number, out=np.full(len(above), np.nan), where=number > 0)


def _counts(n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n images occurs in each draw: (rows, n) float64 pieces, `draws` rows in all."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    for start in range(0, draws, rows):
        size = min(rows, draws - start)
        picked = rng.integers(0, n, (size, n))
        picked += np.arange(size)[:, None] * n
        yield np.bincount(picked.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _interval(
    columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], draws: int, seed: int, level: float
) -> tuple[float, float]:
    """Percentile interval of `statistic`, a function of the (rows, K) resampled sums of `columns` (n, K)."""
    columns = columns.astype(np.float64)  # pixel counts below 2**53 stay exact
    if not len(columns) or not np.isfinite(columns).all():
        raise NumericalError(f"A bootstrap needs finite values of at least one item, got {len(columns)} items.")
    values = np.concatenate([statistic(counts @ columns) for counts in _counts(len(columns), draws, seed)])
    values = values[~np.isnan(values)]
    if not len(values):
        raise NumericalError("A bootstrap found no item with ground truth, so the metric is undefined.")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
