"""Clustering of patch features: standardise, PCA, k-means, with FAISS's subsampling, on rows stored in a file.

FAISS trains PCA on at most 1000 * D points and k-means on at most 256 * K points, drawn with its fixed seeds. The
reference (NeCo's evaluations) inherits this, and so do we. Only these points are in memory, for any number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from threading import Lock
from typing import Protocol

import faiss
import numpy as np
import torch
from sklearn.preprocessing import StandardScaler

from neco_bench.core.errors import UsageError
from neco_bench.search.faiss_gpu import faiss_sees_gpu, to_gpu
from neco_bench.search.row_file import CHUNK, RowFile, faiss_draw

CPU = torch.device("cpu")

PCA_POINTS = 1000  # per dimension, the default of faiss.PCAMatrix

PCA_SEED = 1234  # of fvecs_maybe_subsample in FAISS

KMEANS_POINTS = 256  # per centroid, the default of faiss.Kmeans


def check_enough(patches: int, setting: str, count: int) -> None:
    """Raise UsageError if there are fewer patches than clusters or principal components."""
    if patches < count:
        what = "principal components" if setting == "components" else setting
        raise UsageError(
            f"{count} {what} need at least as many patches, but there are {patches}. "
            f"Lower --set {setting}, or use more images."
        )


def standardise(features: RowFile) -> None:
    """Standardise rows when they are read: mean 0 and population deviation 1 in each dimension; constant ones are 0."""
    scaler = StandardScaler()
    for part in features.chunks():
        scaler.partial_fit(part)
    features.rescale(scaler.mean_, scaler.scale_)


def reduce_dimensions(features: RowFile, dimensions: int) -> RowFile:
    """Project rows onto their principal components, centred, not whitened: (N, d).

    Uses FAISS with its own subsample, as in the reference. Returns the rows unchanged if D <= `dimensions`. Raises
    UsageError if there are fewer rows than components.
    """
    if features.dimension <= dimensions:
        return features
    check_enough(len(features), "components", dimensions)
    pca = faiss.PCAMatrix(features.dimension, dimensions)
    pca.train(features.faiss_subsample(PCA_POINTS * features.dimension, PCA_SEED))
    reduced = RowFile(dimensions)
    for part in features.chunks():
        reduced.append(pca.apply(part))
    return reduced


class Points(Protocol):
    """The points for k-means: a `RowFile`, or some of its rows, possibly repeated."""

    dimension: int

    def __len__(self) -> int: ...

    def faiss_subsample(self, count: int, seed: int) -> np.ndarray:
        """Read `count` rows (count, d) as FAISS draws them with that seed."""


class PickedRows:
    """The rows of a file with the given ids (n,), which may repeat, in that order."""

    def __init__(self, rows: RowFile, ids: np.ndarray) -> None:
        self.rows, self.ids, self.dimension = rows, ids, rows.dimension

    def __len__(self) -> int:
        return len(self.ids)

    def faiss_subsample(self, count: int, seed: int) -> np.ndarray:
        """Read `count` of them as FAISS draws them with that seed."""
        return self.rows.at(self.ids[faiss_draw(len(self.ids), count, seed)], rescaled=True)


def kmeans(
    features: Points,
    clusters: int,
    *,
    seeds: Sequence[int],
    iterations: int,
    redos: int,
    spherical: bool = False,
    device: torch.device = CPU,
) -> Iterator[faiss.Index]:
    """Fit FAISS k-means (L2) with `redos` restarts: for each seed, in order, an index over the (K, d) centroids.

    The index is used with `nearest`. spherical: centroids have unit length, and points (not normalised) are assigned by
    the largest inner product. On a GPU supported by FAISS, seeds are fitted one after the other; otherwise in parallel,
    each with a share of the cores. Raises UsageError if there are fewer points than clusters.
    """
    check_enough(len(features), "clusters", clusters)
    on_gpu = device.type == "cuda" and faiss_sees_gpu()
    reading = Lock()

    def fit(seed: int) -> faiss.Index:
        with reading:
            points = features.faiss_subsample(KMEANS_POINTS * clusters, seed)
        model = faiss.Kmeans(
            features.dimension,
            clusters,
            niter=iterations,
            nredo=redos,
            seed=seed,
            spherical=spherical,
            min_points_per_centroid=1,
        )
        if on_gpu:
            model.index = to_gpu(model.index, device)
        model.train(points)
        return model.index

    if on_gpu:  # whose scratch memory serves one thread at a time
        return map(fit, seeds)
    # Small fits gain little from several threads each, so each seed gets its own share of the cores.
    cores = faiss.omp_get_max_threads()
    threads = min(cores, len(seeds))
    pool = ThreadPool(threads, faiss.omp_set_num_threads, (cores // threads,))  # sets that of the new thread
    models = pool.imap(fit, seeds)
    pool.close()  # an interruption does not wait for its threads
    return models


def nearest(centroids: faiss.Index, rows: np.ndarray) -> np.ndarray:
    """Find the nearest centroid of each row (n, d): (n,) int64 ids."""
    return centroids.search(rows, 1)[1][:, 0]


def assign(models: Sequence[faiss.Index], features: RowFile, size: int) -> Iterator[np.ndarray]:
    """Yield, of each `size` rows in order, the ids of the nearest centroids by each of M models: (M, size) int64."""
    step = max(1, CHUNK // size) * size
    for start in range(0, len(features), step):
        rows = features.read(start, start + step)
        ids = np.stack([nearest(model, rows) for model in models])
        yield from ids.reshape(len(models), -1, size).swapaxes(0, 1)
