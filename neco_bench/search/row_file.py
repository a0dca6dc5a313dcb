"""Rows of an array in a temporary file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import BinaryIO

import faiss
import numpy as np
import torch

from neco_bench.core.errors import NecoBenchError
from neco_bench.core.paths import cache_dir

CHUNK = 65536  # rows in memory at once


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


class RowFile:
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
        single = deviation.float()
        single[single == 0] = 1
        self._scale = mean.float().numpy(), single.numpy()

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
