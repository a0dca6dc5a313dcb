"""Clustering of patch features: standardise, PCA, k-means, with FAISS's subsampling, on rows stored in a file.

FAISS trains PCA on at most 1000 * D points and k-means on at most 256 * K points, drawn with its fixed seeds, also in
the reference (NeCo's evaluations). Only these points (for each seed that is being fitted) and one chunk of rows are in
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from threading import Lock

import cv2
import faiss
import numpy as np
import torch
from sklearn.preprocessing import StandardScaler

from neco_bench.core.errors import UsageError
from neco_bench.search.exact import faiss_sees_gpu, to_gpu
from neco_bench.search.row_file import CHUNK, RowFile, faiss_draw

CPU = torch.device("cpu")

PCA_POINTS = 1000  # per dimension, the default of faiss.PCAMatrix

KMEANS_POINTS = 256  # per centroid, the default of faiss.Kmeans


def check_enough(patches: int, setting: str, count: int) -> None:
    """Raise UsageError if there are fewer patches than clusters or principal components."""
    if patches < count:
        what = "principal components" if setting == "components" else setting
        raise UsageError(
            f"{count} {what} need at least as many patches, but there are {patches}. "
            f"Lower --set {setting}, or use more images."
        )


class PackedMasks:
    """Masks (H, W) uint8 in memory, compressed to a twentieth as PNG; they are read in the order of appending."""

    def __init__(self) -> None:
        self._packed: list[np.ndarray] = []

    def append(self, mask: np.ndarray) -> None:
        """Add a mask."""
        self._packed.append(cv2.imencode(".png", mask)[1])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (np.asarray(cv2.imdecode(packed, cv2.IMREAD_UNCHANGED)) for packed in self._packed)


def standardise_and_reduce(features: RowFile, dimensions: int) -> RowFile:
    """Give each dimension mean 0 and population deviation 1, then project to the principal components: (N, d).

    Constant dimensions become 0. PCA is FAISS's, as in the reference, on its own sub-sample; it centres but does not
    whiten. It is omitted if D <= `dimensions`. Raises UsageError if there are fewer rows than components.
    """
    scaler = StandardScaler()
    for part in features.chunks():
        scaler.partial_fit(part)
    mean, deviation = scaler.mean_.astype(np.float32), scaler.scale_.astype(np.float32)

    def standardise(rows: np.ndarray) -> np.ndarray:
        rows -= mean
        rows /= deviation
        return rows

    pca = None
    if features.dimension > dimensions:
        check_enough(len(features), "components", dimensions)
        pca = faiss.PCAMatrix(features.dimension, dimensions)
        seed = 1234  # of fvecs_maybe_subsample in FAISS
        pca.train(standardise(features.at(faiss_draw(len(features), PCA_POINTS * features.dimension, seed))))
    reduced = RowFile(min(features.dimension, dimensions))
    for part in map(standardise, features.chunks()):
        reduced.append(pca.apply(part) if pca else part)
    return reduced


class PickedRows:
    """Rows of a file for fitting k-means, by their ids (n,), which may be repeated."""

    def __init__(self, rows: RowFile, ids: np.ndarray) -> None:
        self.rows, self.ids, self.dimension = rows, ids, rows.dimension

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, ids: np.ndarray) -> np.ndarray:
        """Return the rows (n, d) with indices (n,) into the ids."""
        return self.rows.at(self.ids[ids])


def kmeans(
    features: RowFile | PickedRows,
    clusters: int,
    *,
    seeds: Sequence[int],
    iterations: int,
    redos: int,
    spherical: bool = False,
    device: torch.device = CPU,
) -> Iterator[faiss.Index]:
    """Fit FAISS k-means (L2) with `redos` restarts: yield, for each seed in order, an index of the (K, d) centroids.

    `nearest` searches the index. spherical: centroids have unit length, and points (not normalised) are assigned by the
    largest inner product. On a GPU supported by FAISS, seeds are fitted one after another; otherwise in parallel, each
    with a share of the cores. Raises UsageError if there are fewer points than clusters.
    """
    check_enough(len(features), "clusters", clusters)
    on_gpu = device.type == "cuda" and faiss_sees_gpu()
    reading = Lock()

    def fit(seed: int) -> faiss.Index:
        with reading:
            points = features.at(faiss_draw(len(features), KMEANS_POINTS * clusters, seed))
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

    if on_gpu:  # only one thread at a time can use its scratch memory
        return map(fit, seeds)
    # Each seed gets a share of the cores: five fits of 21 clusters took 1.1 s of CPU time, and 18 s if each used both
    # cores.
    cores = faiss.omp_get_max_threads()
    threads = min(cores, len(seeds))
    pool = ThreadPool(threads, faiss.omp_set_num_threads, (cores // threads,))  # sets the number of the new thread
    models = pool.imap(fit, seeds)
    pool.close()  # an interruption does not wait for the threads
    return models


def nearest(centroids: faiss.Index, rows: np.ndarray) -> np.ndarray:
    """Return the id (n,) int64 of the nearest centroid of each row (n, d)."""
    return centroids.search(rows, 1)[1][:, 0]


def assign(models: Sequence[faiss.Index], features: RowFile, size: int) -> Iterator[np.ndarray]:
    """Yield the ids (M, size) int64 of the nearest centroids of M models, for groups of `size` rows in order."""
    step = max(1, CHUNK // size) * size
    for start in range(0, len(features), step):
        rows = features.read(start, start + step)
        ids = np.stack([nearest(model, rows) for model in models])
        yield from ids.reshape(len(models), -1, size).swapaxes(0, 1)


def feature_map(features: RowFile, item: int, side: int) -> torch.Tensor:
    """Read the features (D, side, side) of an image from a file with side * side rows per image."""
    rows = features.read(item * side**2, (item + 1) * side**2)
    return torch.from_numpy(rows).T.unflatten(1, (side, side))
