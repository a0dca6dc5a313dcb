"""Arrays in temporary files: rows of one array, or arrays of any shape."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

import faiss
import numpy as np

from neco_bench.core.errors import NecoBenchError
from neco_bench.core.paths import cache_dir

CHUNK = 65536  # rows in memory at once


def _open_temporary() -> BinaryIO:
    """A temporary file in the cache folder, gone when it is closed or forgotten. Raises NecoBenchError."""
    with _full_disk_as_error():
        cache_dir().mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=cache_dir())


@contextlib.contextmanager
def _full_disk_as_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NecoBenchError(
            f"Features could not be written to {cache_dir()}: {error}. Free space there, or set NECO_BENCH_CACHE."
        ) from error


def faiss_draw(total: int, count: int, seed: int) -> np.ndarray:
    """Draw `count` of `total` numbers as FAISS does with that seed, in its order; all in order if there are no more."""
    if count >= total:
        return np.arange(total)
    permutation = np.empty(total, np.int32)
    faiss.rand_perm(faiss.swig_ptr(permutation), total, seed)  # type: ignore[attr-defined]
    return permutation[:count]


class ArrayFile:
    """Arrays of any shape in a temporary file in the cache folder: appended, then read in the same order."""

    def __init__(self) -> None:
        self._file = _open_temporary()
        self._count = 0

    def append(self, values: np.ndarray) -> None:
        """Add an array. Raises NecoBenchError where the disk is full."""
        with _full_disk_as_error():
            np.lib.format.write_array(self._file, values, allow_pickle=False)
            self._file.flush()
        self._count += 1

    def __iter__(self) -> Iterator[np.ndarray]:
        self._file.seek(0)
        for _ in range(self._count):
            yield np.lib.format.read_array(self._file, allow_pickle=False)


class RowFile:
    """(N, D) float32 rows in a temporary file in the cache folder: appended, then read in parts."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self._file = _open_temporary()
        self._count = 0
        self._scale: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._count

    def append(self, rows: np.ndarray) -> None:
        """Add (n, D) rows. Raises NecoBenchError where the disk is full."""
        with _full_disk_as_error():
            self._file.write(np.ascontiguousarray(rows, np.float32).ravel().view(np.uint8).data)
            self._file.flush()
        self._count += len(rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read rows start..stop-1: (stop - start, D)."""
        self._file.seek(start * self.dimension * 4)
        rows = np.empty((min(stop, self._count) - start, self.dimension), np.float32)
        self._file.readinto(rows.data.cast("B"))  # type: ignore[attr-defined]
        if self._scale is not None:
            rows -= self._scale[0]
            rows /= self._scale[1]
        return rows

    def at(self, ids: np.ndarray, *, rescaled: bool = False) -> np.ndarray:
        """Read rows of any (...) ids as they were added, or as they are read now: (..., D)."""
        rows = np.memmap(self._file, np.float32, "r", shape=(self._count, self.dimension))[ids]
        return (rows - self._scale[0]) / self._scale[1] if rescaled and self._scale is not None else rows

    def chunks(self) -> Iterator[np.ndarray]:
        """Read all rows in order, `CHUNK` at a time."""
        for start in range(0, self._count, CHUNK):
            yield self.read(start, start + CHUNK)

    def rescale(self, mean: np.ndarray, deviation: np.ndarray) -> None:
        """Subtract `mean` (D,) from all rows that are read from now on, and divide them by `deviation` (D,)."""
        self._scale = mean.astype(np.float32), deviation.astype(np.float32)

    def faiss_subsample(self, count: int, seed: int) -> np.ndarray:
        """Read `count` rows as FAISS draws them with that seed, in that order; all in file order if no more."""
        if count >= self._count:
            return self.read(0, self._count)
        ids = faiss_draw(self._count, count, seed)
        order = np.argsort(ids)
        rows, done = np.empty((count, self.dimension), np.float32), 0
        for start in range(0, self._count, CHUNK):
            here = order[done : done + np.searchsorted(ids[order[done:]], start + CHUNK)]
            if len(here):
                rows[here] = self.read(start, start + CHUNK)[ids[here] - start]
            done += len(here)
        return rows
