"""Communities of clusters that are often neighbours: co-occurrence, a graph, Infomap (Rosvall and Bergstrom, 2008)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

from neco_bench.core.errors import UsageError

Edge = tuple[int, int, float]


def offsets(reach: Sequence[int], angles: Literal["reference", "even"]) -> Counter[tuple[int, int]]:
    """Return the offsets (rows, columns) of neighbours in eight directions at each distance, with multiplicity.

    "reference" has 240 instead of 225 degrees, an error that changes the neighbour at distance 2 from (-1, -1) to
    (-2, -1). Diagonal neighbours at distance 2 equal those at distance 1, because offsets are rounded as in
    scikit-image's co-occurrence.
    """
    turns = [i * math.pi / 4 for i in range(8)]
    if angles == "reference":
        turns[5] = 4 * math.pi / 3
    return Counter((round(math.sin(turn) * d), round(math.cos(turn) * d)) for d in reach for turn in turns)


class CoOccurrence:
    """Mean over images of the shares of each cluster's neighbours.

    Images are added one at a time, so memory does not grow with their number.
    """

    def __init__(self, clusters: int, neighbours: Counter[tuple[int, int]]) -> None:
        self.neighbours = neighbours
        self._shares = np.zeros((clusters, clusters))
        self._images = np.zeros(clusters)

    def add(self, labels: np.ndarray) -> None:
        """Count an image, clusters (H, W). Neighbours of the same cluster do not count."""
        present, own = np.unique(labels, return_inverse=True)
        own, size = own.reshape(labels.shape), len(present)
        counts = np.zeros(size * size)
        height, width = labels.shape
        for (down, right), times in self.neighbours.items():
            rows, columns = max(0, height - abs(down)), max(0, width - abs(right))
            top, left = max(0, -down), max(0, -right)
            here = own[top : top + rows, left : left + columns]
            there = own[top + down : top + down + rows, left + right : left + right + columns]
            counts += times * np.bincount((here * size + there).ravel(), minlength=size * size)
        matrix = counts.reshape(size, size)
        np.fill_diagonal(matrix, 0)
        total = matrix.sum(1)
        self._shares[np.ix_(present, present)] += matrix / np.maximum(total, 1)[:, None]
        self._images[present] += total > 0

    def shares(self) -> np.ndarray:
        """Return (K, K) shares of neighbours (columns) of each cluster (rows); a row without neighbours is 0."""
        return self._shares / np.maximum(self._images, 1)[:, None]


def edges(shares: np.ndarray, threshold: float | None) -> list[Edge]:
    """Return the edges (i, j, weight), i < j, with both shares at least `threshold`; the weight is the smaller share.

    threshold: None uses 1 / (K - 1), the share if all other clusters were neighbours equally often.
    """
    least = 1 / max(1, len(shares) - 1) if threshold is None else threshold
    weights = np.minimum(shares, shares.T)
    pairs = np.argwhere(np.triu((weights >= least) & (weights > 0), 1))
    return [(int(i), int(j), float(weights[i, j])) for i, j in pairs]


def check_infomap() -> None:
    """Raise UsageError if the package is not installed."""
    try:
        import infomap  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "Community detection needs the package infomap, on Python 3.11 or newer: pip install 'neco-bench[unsup]'."
        ) from error


def communities(links: Sequence[Edge], clusters: int, *, modules: int, markov_time: float, seed: int) -> np.ndarray:
    """Find communities by two-level undirected Infomap: (clusters,) ids from 1; 0 for clusters without an edge.

    modules: preferred number of communities. seed: 0 or more (Infomap's seeds start at 1).
    """
    ids = np.zeros(clusters, np.int64)
    if not links:
        return ids
    from infomap import Infomap  # an extra, whose licence (GPL) this package does not share

    model = Infomap(
        f"--silent --two-level --flow-model undirected --seed {seed + 1} --markov-time {markov_time:g} "
        f"--preferred-number-of-modules {modules}"
    )
    for i, j, weight in links:
        model.add_link(i, j, weight)
    for node, module in model.run().modules().items():
        ids[node] = module
    return ids
