"""Approximate search, on request: always with its recall, measured against exact search on a sample of the queries.

"bf16": products in bfloat16 over all keys, the best candidates ranked anew in single precision, without proof. For
banks of up to about a million keys. "ivf": an inverted file (Sivic and Zisserman, ICCV 2003) as FAISS has it: keys in
half precision, in lists by their nearest centroid, of which a query visits a few; built from a file, so that a bank of
ten million keys needs no more memory than they take in half precision, and up to as much again while lists grow.
"""

from __future__ import annotations

import time
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from neco_bench.clustering import Rows
from neco_bench.errors import NumericalError
from neco_bench.search import BLOCK_ROWS, Found, _Half, _Torch, blocked, check_neighbours, merged

RECALL = 0.99  # that lists are visited for
SAMPLE = 256  # queries whose recall is measured
LISTS_PER_ROOT = 2  # lists, as a multiple of the root of the number of keys
TRAINING = 40  # keys per list that centroids are made of
SEED = 0


class ApproximateIndex:
    """Like `ExactIndex`, but not exact. `facts`: index, its parameters, `recall` of `sample` queries, bytes and seconds
    to build it; known with the first search."""

    def __init__(self, kind: str, dimension: int, device: torch.device) -> None:
        self.kind, self.device, self.facts = kind, device, dict[str, Any]()
        self._rows = Rows(dimension)
        self._index: Any = None

    @property
    def rows(self) -> int:
        """Keys added."""
        return len(self._rows)

    def add(self, keys: Tensor) -> None:
        """Append (n, dimension) float32 keys, before the first search."""
        self._rows.append(keys.cpu().numpy())

    def search(self, queries: Tensor, k: int) -> Found:
        """Scores and row ids, each (n, k), best first, on the CPU. Raises UsageError where k exceeds the rows,
        NumericalError where an inverted file cannot reach the recall."""
        check_neighbours(k, self.rows)
        if self._index is None:
            start = time.perf_counter()
            if self.kind == "bf16":
                keys = torch.from_numpy(self._rows.read(0, self.rows)).to(self.device)
                self._index = _Half(keys, proven=False)
                self.facts = {"index": "torch-bf16", "bytes": keys.nbytes + self._index.spent}
            else:
                self._index = _InvertedFile(self._rows)
                self.facts = {"index": f"ivf-{self._index.lists}-fp16", "bytes": self._index.bytes}
            self.facts["build_seconds"] = round(time.perf_counter() - start, 2)
            sample = queries[torch.linspace(0, len(queries) - 1, min(SAMPLE, len(queries))).long()].float()
            self.facts |= self._index_measured(sample, k) | {"sample": len(sample)}
        scores, ids = self._index.search(queries.to(self.device, torch.float32), k)
        return scores.cpu(), ids.cpu()

    def _index_measured(self, queries: Tensor, k: int) -> dict[str, float]:
        if self.kind == "bf16":
            queries = queries.to(self.device)
            exact = _Torch(self._index.keys).search(queries, k)[1]
            return {"recall": recall(self._index.search(queries, k)[1], exact)}
        return self._index.tune(queries, k)


def recall(found: Tensor, exact: Tensor) -> float:
    """Share of the exact ids (n, k) that are among those found."""
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
    return sum(hits) / exact.numel()


class _InvertedFile:
    """FAISS's inverted file over rows that lie in a file."""

    def __init__(self, rows: Rows) -> None:
        self.count, width = len(rows), rows.dimension
        self.lists = max(1, min(int(LISTS_PER_ROOT * self.count**0.5), self.count // TRAINING))
        kmeans = faiss.Kmeans(width, self.lists, niter=6, seed=SEED, spherical=True, max_points_per_centroid=TRAINING)
        kmeans.train(rows.drawn(TRAINING * self.lists, SEED))
        centroids = kmeans.centroids
        assert centroids is not None
        low = torch.from_numpy(centroids).bfloat16()
        self._quantizer = faiss.IndexFlatIP(width)
        self._quantizer.add(centroids)
        half = faiss.ScalarQuantizer.QT_fp16
        self.index = faiss.IndexIVFScalarQuantizer(self._quantizer, width, self.lists, half, faiss.METRIC_INNER_PRODUCT)
        self.index.by_residual = False
        self.index.train(centroids)  # half precision learns nothing
        start = 0
        for part in rows.chunks():
            # Which list holds a key is not critical, so bfloat16 decides; FAISS would take several times as long.
            nearest = blocked(low, torch.from_numpy(part).bfloat16(), 1, torch.mm)[1][:, 0].numpy()
            ids = np.arange(start, start + len(part))
            self.index.add_core(
                len(part), faiss.swig_ptr(part), faiss.swig_ptr(ids), faiss.swig_ptr(np.ascontiguousarray(nearest))
            )
            start += len(part)
        self.bytes = self.count * (2 * width + 8) + centroids.size * 6

    def search(self, queries: Tensor, k: int) -> Found:
        scores, ids = self.index.search(np.ascontiguousarray(queries.cpu().numpy()), k)
        if (ids < 0).any():  # fewer than k keys in the lists visited
            raise NumericalError(
                f"{self.index.nprobe} lists hold fewer than {k} keys for some queries. Use --set search=exact."
            )
        return torch.from_numpy(scores), torch.from_numpy(ids)

    def tune(self, queries: Tensor, k: int) -> dict[str, float]:
        """Visit as few lists (in steps of a fifth) as give RECALL on these queries, and say which recall that is.

        The exact neighbours are those among the keys in half precision, list by list.
        """
        exact = self._exact(queries, k)
        lists = self.index.invlists
        assert lists is not None
        shortest = min(lists.list_size(i) for i in range(self.lists))
        self.index.nprobe = min(self.lists, 1 + k // max(1, shortest))
        while True:
            found = torch.from_numpy(self.index.search(queries.numpy(), k)[1])
            share = recall(found, exact)
            if share >= RECALL or self.index.nprobe == self.lists:
                return {"recall": share, "lists_visited": self.index.nprobe, "lists": self.lists}
            self.index.nprobe = min(self.lists, self.index.nprobe + max(1, self.index.nprobe // 5))

    def _exact(self, queries: Tensor, k: int) -> Tensor:
        """(n, k) ids of the exact neighbours among the stored keys."""
        self.index.make_direct_map()
        found: list[Found] = []
        for start in range(0, self.count, BLOCK_ROWS):
            block = torch.from_numpy(self.index.reconstruct_n(start, min(BLOCK_ROWS, self.count - start)))
            values, ids = blocked(block, queries, min(k, len(block)), torch.mm)
            found = [merged([*found, (values, ids + start)], k)]
        return found[0][1]
