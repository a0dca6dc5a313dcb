"""Cluster-based foreground: which clusters of patches lie in a noisy foreground, image by image."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

# Shares of clusters, by precision from below, that the reference tries as background.
LEAST, MOST = 0.55, 0.75

STEP = 0.05  # to which the reference rounds the threshold


def precisions(clusters: np.ndarray, noisy: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """Compute for each cluster which share of its area in an image is noisy foreground, mean over images that have it.

    Args:
        clusters: (N, P) cluster of each of P patches of N images.
        noisy: (N, P) bool.
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
    """Find the precision from which on clusters fit the ground-truth foreground best, to the nearest 0.05.

    Tried are splits with 55 % to 75 % of the clusters as background; the last of equally good ones counts.

    Args:
        precision: (K,); an absent cluster ranks lowest.
        areas: of each image (K,) pixels of each cluster, and of these the ones of the ground truth's foreground.
    """
    known = np.nan_to_num(precision)
    order, count = np.argsort(known, kind="stable"), len(known)
    starts = np.arange(int(LEAST * count), int(MOST * count))
    if not len(starts):
        starts = np.array([count // 2])
    ious = np.zeros(len(starts))  # summed over images
    for area, inside in areas:
        # From each rank on: what the clusters there cover in all.
        predicted, hits = (values[order][::-1].cumsum()[::-1][starts] for values in (area, inside))
        union = predicted + inside.sum() - hits
        ious += np.divide(hits, union, out=np.zeros(len(starts)), where=union > 0)
    best = len(ious) - 1 - int(np.argmax(ious[::-1]))
    value = known[order][starts[best]]
    grid = np.arange(0, 1, STEP)
    return float(grid[np.abs(grid - value).argmin()])


def otsu(precision: np.ndarray) -> float:
    """Find the precision that separates clusters best into two groups (Otsu, 1979: least variance within them).

    The least precision of the upper group; absent clusters (NaN) do not count.
    """
    values = np.sort(precision[~np.isnan(precision)])
    below = np.arange(1, len(values))
    sums = values.cumsum()
    low, high = sums[:-1] / below, (sums[-1] - sums[:-1]) / (len(values) - below)
    between = below * (len(values) - below) * (high - low) ** 2
    return float(values[int(between.argmax()) + 1]) if len(values) > 1 else 0.0
