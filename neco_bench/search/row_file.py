"""Rows of features in a temporary file, for more rows than memory can hold."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

import faiss
import numpy as np

from neco_bench.core.errors import NecoBenchError
from neco_bench.core.paths import cache_dir

CHUNK = 65536  # rows in memory at once


@contextlib.contextmanager
def _full_disk_as_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NecoBenchError(
            f"Features could not be written to {cache_dir()}: {error}. Free space there, or set NECO_BENCH_CACHE."
        ) from error


def faiss_draw(total: int, count: int, seed: int) -> np.ndarray:
    """Draw `count` of the numbers below `total` like FAISS, in its order; if count >= total, all in ascending order."""
    if count >= total:
        return np.arange(total)
    permutation = np.empty(total, np.int32)
    faiss.rand_perm(faiss.swig_ptr(permutation), total, seed)  # type: ignore[attr-defined]
    return permutation[:count]


class RowFile:
    """(N, D) float32 rows in a temporary file in the cache folder, which is deleted together with this object.

    Raises NecoBenchError if the disk is full.
    """

    def __init__(self, dimension: int) -> None:
        self.dimension, self._count = dimension, 0
        with _full_disk_as_error():
            cache_dir().mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=cache_dir())  # noqa: SIM115 - as long as this

    def __len__(self) -> int:
        return self._count

    def append(self, rows: np.ndarray) -> None:
        """Append (n, D) rows. Raises NecoBenchError if the disk is full."""
        with _full_disk_as_error():
            self._file.write(np.ascontiguousarray(rows, np.float32).data)
            self._file.flush()
        self._count += len(rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read rows start..stop-1: (stop - start, D)."""
        count = min(stop, self._count) - start
        self._file.seek(4 * start * self.dimension)
        return np.fromfile(self._file, np.float32, count * self.dimension).reshape(count, self.dimension)

    def chunks(self) -> Iterator[np.ndarray]:
        """Read all rows in order, `CHUNK` at a time."""
        for start in range(0, self._count, CHUNK):
            yield self.read(start, start + CHUNK)

    def at(self, ids: np.ndarray) -> np.ndarray:
        """Read rows of any ids (n,), which may repeat, chunk by chunk: (n, D)."""
        rows, chunks = np.empty((len(ids), self.dimension), np.float32), ids // CHUNK
        for chunk in np.unique(chunks).tolist():
            here = chunks == chunk
            rows[here] = self.read(chunk * CHUNK, (chunk + 1) * CHUNK)[ids[here] % CHUNK]
        return rows
