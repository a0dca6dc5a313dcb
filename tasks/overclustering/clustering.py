"""Clustering of patch features: standardise, PCA, k-means, with FAISS's own sub-sampling, on rows kept in a file.

FAISS trains PCA on at most 1000 * D points and k-means on at most 256 * K, drawn with its fixed seeds; the reference
(NeCo's overclustering) inherits that, and so do we. So only those points are ever in memory, however many rows there
are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from threading import Lock, Thread

import faiss
import numpy as np
import torch

from neco_bench.core.errors import UsageError
from neco_bench.search.faiss_gpu import faiss_sees_gpu, to_gpu
from neco_bench.search.row_file import RowFile

CPU = torch.device("cpu")


PCA_POINTS = 1000  # per dimension, the default of faiss.PCAMatrix


PCA_SEED = 1234  # of fvecs_maybe_subsample in FAISS


KMEANS_POINTS = 256  # per centroid, the default of faiss.Kmeans


def check_enough(patches: int, setting: str, count: int) -> None:
    """Raise UsageError where there are fewer patches than clusters, or than principal components."""
    if patches < count:
        what = "principal components" if setting == "components" else setting
        raise UsageError(
            f"{count} {what} need at least as many patches, there are {patches}. "
            f"Lower --set {setting}, or use more images."
        )


def reduce_dimensions(features: RowFile, dimensions: int) -> RowFile:
    """(N, d) principal components, centred, not whitened; the rows as given where D <= `dimensions`.

    Raises UsageError where there are fewer rows than components.
    """
    if features.dimension <= dimensions:
        return features
    check_enough(len(features), "components", dimensions)
    pca = faiss.PCAMatrix(features.dimension, dimensions)
    pca.train(features.drawn(PCA_POINTS * features.dimension, PCA_SEED))
    reduced = RowFile(dimensions)
    for part in features.chunks():
        reduced.append(pca.apply(part))
    return reduced


def kmeans(
    features: RowFile, clusters: int, *, seeds: Sequence[int], iterations: int, redos: int, device: torch.device = CPU
) -> Iterator[faiss.Index]:
    """For each seed, in order, the index over the (K, d) centroids of FAISS k-means (L2) with `redos` restarts;
    `nearest` reads it. On a GPU that FAISS sees, one seed after the other; else seeds are fitted side by side, each
    with its share of the cores.

    Raises UsageError where there are fewer points than clusters.
    """
    check_enough(len(features), "clusters", clusters)
    reading = Lock()

    def fit(seed: int) -> faiss.Index:
        with reading:
            points = features.drawn(KMEANS_POINTS * clusters, seed)
        model = faiss.Kmeans(
            features.dimension, clusters, niter=iterations, nredo=redos, seed=seed, min_points_per_centroid=1
        )
        if on_gpu:
            model.index = to_gpu(model.index, device)
        model.train(points)
        return model.index

    on_gpu = device.type == "cuda" and faiss_sees_gpu()
    if on_gpu:  # whose scratch memory serves one thread at a time
        return map(fit, seeds)
    cores = faiss.omp_get_max_threads()
    threads = min(cores, len(seeds))
    fitted: list[Future[faiss.Index]] = [Future() for _ in seeds]
    waiting = deque(zip(seeds, fitted, strict=True))

    def fit_waiting() -> None:
        faiss.omp_set_num_threads(cores // threads)  # of this thread
        while waiting:
            try:
                seed, result = waiting.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                result.set_result(fit(seed))
            except Exception as error:
                result.set_exception(error)

    for _ in range(threads):
        Thread(target=fit_waiting, daemon=True).start()  # an interruption does not wait for it
    return (result.result() for result in fitted)


def nearest(centroids: faiss.Index, rows: np.ndarray) -> np.ndarray:
    """(n,) int64 id of the nearest centroid of each row (n, d)."""
    return centroids.search(rows, 1)[1][:, 0]
