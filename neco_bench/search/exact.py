"""k-nearest-neighbour search by inner product behind one small interface: exact, and approximate on request.

Exact search uses FAISS on CPUs and on GPUs that FAISS supports, and otherwise matrix products in blocks with top-k. The
choice depends only on the device, so the same command gives the same digits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import faiss
import torch
from torch import Tensor

from neco_bench.core import distributed
from neco_bench.core.errors import UsageError

KEYS, QUERIES = 131_072, 2048  # in one product of PyTorch: 1 GiB of scores

TopK = tuple[Tensor, Tensor]  # scores and row ids, (n, k) each, best first


def faiss_sees_gpu() -> bool:
    """Return whether FAISS is built for GPUs and finds one."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@functools.cache
def _resources() -> Any:
    """Return FAISS's scratch memory, 1.5 GiB on each used GPU, which all indexes of this process share."""
    return faiss.StandardGpuResources()


def to_gpu(index: faiss.Index, device: torch.device) -> Any:
    """Copy an index to a GPU."""
    return faiss.index_cpu_to_gpu(_resources(), device.index or 0, index)


def merged(parts: list[TopK], k: int) -> TopK:
    """Merge results for different keys: the k best, or all if there are fewer, best first."""
    values, ids = (torch.cat(columns, 1) for columns in zip(*parts, strict=True))
    values, order = values.topk(min(k, values.shape[1]))
    return values, ids.gather(1, order)


def by_faiss(queries: Tensor, keys: Tensor, k: int) -> TopK:
    """Search the k best of keys (m, D) for each query (n, D), both on the CPU."""
    scores, ids = faiss.knn(queries.numpy(), keys.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(scores), torch.from_numpy(ids)


def by_products(queries: Tensor, keys: Tensor, k: int) -> TopK:
    """Search like `by_faiss`, on any device, with QUERIES queries at a time."""
    parts = [(part @ keys.T).topk(k) for part in queries.split(QUERIES)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def nearest_of(blocks: Iterable[Tensor], queries: Tensor, k: int) -> TopK:
    """Search the k best for each query (n, D) in blocks of keys, (m, D) each; ids are positions in all blocks."""
    best, start = list[TopK](), 0
    for block in blocks:
        find = by_faiss if block.device.type == "cpu" else by_products
        values, ids = find(queries, block, min(k, len(block)))
        best.append((values, ids + start))
        best = [merged(best, k)] if start else best
        start += len(block)
    return best[0]


class ExactIndex:
    """Inner-product index over float32 rows of `dimension` on `device`.

    capacity: the expected number of rows; more may be added. `facts`, set by the first search: kind and bytes.
    """

    def __init__(self, dimension: int, device: torch.device, *, capacity: int = 0) -> None:
        self.device, self.rows, self.facts = device, 0, dict[str, Any]()
        self._keys = torch.empty(capacity, dimension, device=device)
        self._on_gpu: Any = None

    def add(self, keys: Tensor) -> None:
        """Append (n, dimension) float32 keys."""
        needed = self.rows + len(keys)
        if needed > len(self._keys):
            grown = torch.empty(max(needed, 2 * self.rows), keys.shape[1], device=self.device)
            grown[: self.rows] = self._keys[: self.rows]
            self._keys = grown
        self._keys[self.rows : needed] = keys
        self.rows, self._on_gpu = needed, None

    def search(self, queries: Tensor, k: int) -> TopK:
        """Return scores and row ids, each (n, k), best first, on the CPU. Raises UsageError if there are fewer rows."""
        check_neighbours(k, self.rows)
        keys, on_cpu = self._keys[: self.rows], self.device.type == "cpu"
        on_gpu = self.device.type == "cuda" and faiss_sees_gpu() and k <= 2048
        self.facts = {"index": f"flat, {'FAISS' if on_cpu or on_gpu else 'PyTorch'}", "bytes": keys.nbytes}
        if not on_gpu:
            blocks = [keys] if on_cpu else keys.split(KEYS)
            scores, ids = nearest_of(blocks, queries.to(self.device, torch.float32), k)
            return scores.cpu(), ids.cpu()
        if self._on_gpu is None:
            self._on_gpu = to_gpu(faiss.IndexFlatIP(keys.shape[1]), self.device)
            for part in keys.split(KEYS):
                self._on_gpu.add(part.cpu().numpy())
        self.facts["bytes"] *= 2
        scores, ids = self._on_gpu.search(queries.cpu().float().contiguous().numpy(), k)
        return torch.from_numpy(scores), torch.from_numpy(ids)


class SharedIndex:
    """Index over the rows of all processes of a run: each searches its own, and all return the same results.

    own: the index of this process. Row ids count the rows of all processes in order.
    """

    def __init__(self, own: Any) -> None:
        counts = distributed.gather(own.rows)
        self.own, self.rows, self.before = own, sum(counts), sum(counts[: distributed.rank()])
        self.facts = dict[str, Any]()  # of this process's share

    def search(self, queries: Tensor, k: int) -> TopK:
        """Return scores and row ids, each (n, k), best first, on the CPU. Raises UsageError if there are fewer rows."""
        check_neighbours(k, self.rows)
        mine: TopK = torch.zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.int64)
        if self.own.rows:
            scores, ids = self.own.search(queries, min(k, self.own.rows))
            mine, self.facts = (scores, ids + self.before), self.own.facts
        return merged(distributed.gather(mine), k)


def check_neighbours(k: int, rows: int) -> None:
    """Raise UsageError if there are fewer rows than neighbours."""
    if k > rows:
        raise UsageError(
            f"{k} neighbours are needed, but the memory bank holds {rows} patches. "
            f"Lower it with --set neighbours={rows}, or use more images."
        )
