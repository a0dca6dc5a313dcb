"""Cluster-based foreground: select the clusters of patches that agree with a noisy foreground."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def precisions(clusters: np.ndarray, noisy: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """Compute the share of each cluster's area that is noisy foreground, averaged over the images that contain it.

    Args:
        clusters: (N, P) clusters of P patches of N images.
        noisy: (N, P) bool, the noisy foreground.
        weights: (P,) area of each patch in pixels.
        count: number of clusters K.

    Returns:
        (K,) in [0, 1]; NaN for a cluster that is in no image.
    """
    sums, images = np.zeros(count), np.zeros(count)
    for own, inside in zip(clusters, noisy, strict=True):
        area = np.bincount(own, weights, count)
        sums += np.bincount(own, weights * inside, count) / np.maximum(area, 1)
        images += area > 0
    return np.divide(sums, images, out=np.full(count, np.nan), where=images > 0)


def best_threshold(precision: np.ndarray, areas: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the threshold of the precision at which clusters fit the foreground best, rounded to 0.05.

    Splits with 55 % to 75 % of the clusters as background are compared; the last of the best ones is used. All these
    numbers are those of the reference.

    Args:
        precision: (K,) precisions; absent clusters rank lowest.
        areas: for each image, (K,) pixels of each cluster, and (K,) those in the foreground of the ground truth.
    """
    known = np.nan_to_num(precision)
    order, count = np.argsort(known, kind="stable"), len(known)
    starts = np.arange(int(0.55 * count), int(0.75 * count))
    if not len(starts):
        starts = np.array([count // 2])
    ious = np.zeros(len(starts))  # summed over images
    for area, inside in areas:
        # Pixels of the clusters from each rank on.
        predicted, hits = (values[order][::-1].cumsum()[::-1][starts] for values in (area, inside))
        union = predicted + inside.sum() - hits
        ious += np.divide(hits, union, out=np.zeros(len(starts)), where=union > 0)
    best = len(ious) - 1 - int(np.argmax(ious[::-1]))
    value = known[order][starts[best]]
    grid = np.arange(0, 1, 0.05)
    return float(grid[np.abs(grid - value).argmin()])


def otsu(precision: np.ndarray) -> float:
    """Return the smallest precision of the upper of two groups of clusters (Otsu, 1979: least variance within groups).

    Absent clusters (NaN) are not used.
    """
    values = np.sort(precision[~np.isnan(precision)])
    below = np.arange(1, len(values))
    sums = values.cumsum()
    low, high = sums[:-1] / below, (sums[-1] - sums[:-1]) / (len(values) - below)
    between = below * (len(values) - below) * (high - low) ** 2
    return float(values[int(between.argmax()) + 1]) if len(values) > 1 else 0.0
