"""Clustering of patch features: standardise, PCA, k-means, with FAISS's own sub-sampling, on rows kept in a file.

FAISS trains PCA on at most 1000 * D points and k-means on at most 256 * K, drawn with its fixed seeds; the reference
(NeCo's overclustering) inherits that, and so do we. So only those points are ever in memory, however many rows there
are.
"""

from __future__ import annotations

import functools
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from threading import Lock, Thread
from typing import Any, BinaryIO

import faiss
import numpy as np
import torch

from neco_bench.cache import cache_dir
from neco_bench.errors import NecoBenchError, UsageError

CPU = torch.device("cpu")
CHUNK = 65536  # rows in memory at once
PCA_POINTS = 1000  # per dimension, the default of faiss.PCAMatrix
PCA_SEED = 1234  # of fvecs_maybe_subsample in FAISS
KMEANS_POINTS = 256  # per centroid, the default of faiss.Kmeans


def open_spool() -> BinaryIO:
    """A temporary file in the cache folder, gone when it is closed or forgotten. Raises NecoBenchError."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=cache_dir())
    except OSError as error:
        raise _not_written(error) from error


def spool(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write to such a file. Raises NecoBenchError where the disk is full."""
    try:
        file.write(data)
        file.flush()
    except OSError as error:
        raise _not_written(error) from error


def _not_written(error: OSError) -> NecoBenchError:
    return NecoBenchError(
        f"Features could not be written to {cache_dir()}: {error}. Free space there, or set NECO_BENCH_CACHE."
    )


class Rows:
    """(N, D) float32 rows in a temporary file in the cache folder: appended, then read in parts."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self._file = open_spool()
        self._count = 0
        self._scale: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._count

    def append(self, rows: np.ndarray) -> None:
        """Add (n, D) rows. Raises NecoBenchError where the disk is full."""
        spool(self._file, np.ascontiguousarray(rows, np.float32).ravel().view(np.uint8).data)
        self._count += len(rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1, (stop - start, D)."""
        self._file.seek(start * self.dimension * 4)
        rows = np.empty((min(stop, self._count) - start, self.dimension), np.float32)
        self._file.readinto(rows.data.cast("B"))  # type: ignore[attr-defined]
        if self._scale is not None:
            rows -= self._scale[0]
            rows /= self._scale[1]
        return rows

    def at(self, ids: np.ndarray) -> np.ndarray:
        """Rows of any (...) ids as they were added, (..., D)."""
        return np.memmap(self._file, np.float32, "r", shape=(self._count, self.dimension))[ids]

    def chunks(self) -> Iterator[np.ndarray]:
        """All rows in order, `CHUNK` at a time."""
        for start in range(0, self._count, CHUNK):
            yield self.read(start, start + CHUNK)

    def standardise(self) -> None:
        """From now on rows are read with population mean 0 and deviation 1 in each dimension, constant ones as 0."""
        first = torch.from_numpy(self.read(0, 1)[0]).double()
        total, squares = torch.zeros(2, self.dimension, dtype=torch.float64)
        for part in self.chunks():  # in one pass over the file; relative to one row, so that little is cancelled
            centred = torch.from_numpy(part) - first
            total += centred.sum(0)
            squares += centred.square_().sum(0)
        mean = total / len(self)
        deviation = (squares / len(self) - mean.square()).clamp_(min=0).sqrt_()
        mean += first
        deviation[deviation == 0] = 1
        self._scale = mean.float().numpy(), deviation.float().numpy()

    def drawn(self, count: int, seed: int) -> np.ndarray:
        """The first `count` rows of FAISS's permutation of that seed, in its order; all in file order if no more."""
        if count >= self._count:
            return self.read(0, self._count)
        permutation = np.empty(self._count, np.int32)
        faiss.rand_perm(faiss.swig_ptr(permutation), self._count, seed)  # type: ignore[attr-defined]
        ids = permutation[:count]
        order = np.argsort(ids)
        rows, done = np.empty((count, self.dimension), np.float32), 0
        for start in range(0, self._count, CHUNK):
            here = order[done : done + np.searchsorted(ids[order[done:]], start + CHUNK)]
            if len(here):
                rows[here] = self.read(start, start + CHUNK)[ids[here] - start]
            done += len(here)
        return rows


def reduce_dimensions(features: Rows, dimensions: int) -> Rows:
    """(N, d) principal components, centred, not whitened; the rows as given where D <= `dimensions`.

    Raises UsageError where there are fewer rows than components.
    """
    if features.dimension <= dimensions:
        return features
    if len(features) < dimensions:
        raise UsageError(
            f"{dimensions} principal components need at least as many patches, there are {len(features)}. "
            f"Lower --set components, or use more images."
        )
    pca = faiss.PCAMatrix(features.dimension, dimensions)
    pca.train(features.drawn(PCA_POINTS * features.dimension, PCA_SEED))
    reduced = Rows(dimensions)
    for part in features.chunks():
        reduced.append(pca.apply(part))
    return reduced


def faiss_sees_gpu() -> bool:
    """Whether FAISS is built for GPUs and finds one."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@functools.cache
def _resources() -> Any:
    """FAISS's scratch memory on GPUs, 1.5 GiB on each that is used, for all indexes of this process."""
    return faiss.StandardGpuResources()


def to_gpu(index: faiss.Index, device: torch.device) -> Any:
    """The index on that GPU."""
    return faiss.index_cpu_to_gpu(_resources(), device.index or 0, index)


def kmeans(
    features: Rows, clusters: int, *, seeds: Sequence[int], iterations: int, redos: int, device: torch.device = CPU
) -> Iterator[faiss.Index]:
    """For each seed, in order, the index over the (K, d) centroids of FAISS k-means (L2) with `redos` restarts;
    `nearest` reads it. On a GPU that FAISS sees, one seed after the other; else seeds are fitted side by side, each
    with its share of the cores.

    Raises UsageError where there are fewer points than clusters.
    """
    if len(features) < clusters:
        raise UsageError(
            f"{clusters} clusters need at least as many patches, there are {len(features)}. "
            f"Lower --set clusters, or use more images."
        )
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
