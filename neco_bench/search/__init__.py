"""Exact k-nearest-neighbour search by inner product behind one small interface.

FAISS flat on CPUs and, where the installed wheel sees the GPU, on GPUs; elsewhere on accelerators a chunked matrix
product with a running top-k. All are exact: they differ in rounding only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from neco_bench.errors import UsageError

_CHUNK_BYTES = 256 * 2**20


class ExactIndex:
    """Inner-product index over float32 rows of `dimension` on `device`. `backend` says what it runs on."""

    def __init__(self, dimension: int, device: torch.device) -> None:
        self.dimension, self.device = dimension, device
        self.rows = 0
        self._keys: list[Tensor] = []
        self._flat: Any = None  # a FAISS index
        if device.type == "cpu" or (device.type == "cuda" and _faiss_sees_gpu()):
            import faiss

            self._flat = faiss.IndexFlatIP(dimension)
            if device.type == "cuda":
                self._resources = faiss.StandardGpuResources()
                self._flat = faiss.index_cpu_to_gpu(self._resources, device.index or 0, self._flat)
        self.backend = f"faiss-flat-{device.type}" if self._flat is not None else f"torch-{device.type}"

    def add(self, keys: Tensor) -> None:
        """Append (n, dimension) float32 keys."""
        self.rows += len(keys)
        if self._flat is not None:
            self._flat.add(keys.cpu().numpy())
        else:
            self._keys.append(keys.to(self.device))

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and row ids, each (n, k), best first, on the CPU. Raises UsageError where k exceeds the rows."""
        if k > self.rows:
            raise UsageError(
                f"{k} neighbours were asked for, but the memory bank holds {self.rows} patches. "
                f"Lower it with --set neighbours={self.rows}, or use more images."
            )
        if self._flat is not None:
            scores, ids = self._flat.search(np.ascontiguousarray(queries.cpu().numpy()), k)
            return torch.from_numpy(scores), torch.from_numpy(ids)
        if len(self._keys) > 1:
            self._keys = [torch.cat(self._keys)]
        step = max(1, _CHUNK_BYTES // (4 * self.rows))
        found = [torch.topk(part @ self._keys[0].T, k) for part in queries.to(self.device).split(step)]
        return torch.cat([f.values for f in found]).cpu(), torch.cat([f.indices for f in found]).cpu()


def _faiss_sees_gpu() -> bool:
    import faiss

    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
