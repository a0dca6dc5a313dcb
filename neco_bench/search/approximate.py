"""Approximate search, on request: always with its recall, measured against exact search on a sample of the queries.

"bf16": products in bfloat16 over all keys, the best candidates ranked anew in single precision, without proof. For
banks of up to about a million keys. "ivf": an inverted file (Sivic and Zisserman, ICCV 2003) as FAISS has it: keys in
half precision, in lists by their nearest centroid, of which a query visits a few; built from a file, so that a bank of
ten million keys needs no more memory than they take in half precision, and up to as much again while lists grow.
"ivfpq": the same with keys as 4 bits for every two dimensions (product quantisation: Jegou et al., TPAMI 2011; FAISS's
fast scan), of which the best candidates are ranked anew with their keys in single precision, from the file. Needs an
eighth of the memory in half precision; the file is best in the system's page cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from neco_bench.core.errors import NumericalError, UsageError
from neco_bench.search.bf16 import _Half
from neco_bench.search.exact import check_neighbours
from neco_bench.search.fp32 import _Torch
from neco_bench.search.row_file import RowFile
from neco_bench.search.topk import ON_CPU, Found, blocked, merged

RECALL = 0.99  # that lists are visited for


SAMPLE = 256  # queries whose recall is measured


LISTS_PER_ROOT = 2  # lists, as a multiple of the root of the number of keys


TRAINING = 40  # keys per list that centroids are made of


SEED = 0


SPARE = 4  # candidates that are ranked anew, as a multiple of k, before more are found to be needed


LEAST = 64  # keys that quantisation is learned from


class ApproximateIndex:
    """Like `ExactIndex`, but not exact. `facts`: index, its parameters, `recall` of `sample` queries, bytes and seconds
    to build it; known with the first search."""

    def __init__(self, kind: str, dimension: int, device: torch.device) -> None:
        self.kind, self.device, self.facts = kind, device, dict[str, Any]()
        self._rows = RowFile(dimension)
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
                self._index = (_InvertedFile if self.kind == "ivf" else _Quantised)(self._rows)
                self.facts = {"index": f"ivf-{self._index.lists}-{self._index.code}", "bytes": self._index.bytes}
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
        return self._index.tune(queries.cpu(), k)


def recall(found: Tensor, exact: Tensor) -> float:
    """Share of the exact ids (n, k) that are among those found."""
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
    return sum(hits) / exact.numel()


class _InvertedFile:
    """FAISS's inverted file over rows that lie in a file."""

    code = "fp16"

    def __init__(self, rows: RowFile) -> None:
        self.rows, self.count, self.width = rows, len(rows), rows.dimension
        self.lists = max(1, min(int(LISTS_PER_ROOT * self.count**0.5), self.count // TRAINING))
        kmeans = faiss.Kmeans(
            self.width, self.lists, niter=6, seed=SEED, spherical=True, max_points_per_centroid=TRAINING
        )
        points = rows.faiss_subsample(TRAINING * self.lists, SEED)
        kmeans.train(points)
        assert kmeans.centroids is not None
        self._quantizer = faiss.IndexFlatIP(self.width)
        self._quantizer.add(kmeans.centroids)
        self.index = self._filled(points, torch.from_numpy(kmeans.centroids).bfloat16())

    @property
    def bytes(self) -> int:
        """Of keys, their ids and centroids in two precisions."""
        return self.count * (2 * self.width + 8) + self.lists * self.width * 6

    def _filled(self, points: np.ndarray, centroids: Tensor) -> Any:
        """The index over all rows. points: what is learned from."""
        half = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexIVFScalarQuantizer(self._quantizer, self.width, self.lists, half, faiss.METRIC_INNER_PRODUCT)
        index.by_residual = False
        index.train(points[:1])  # half precision learns nothing
        start = 0
        for part in self.rows.chunks():
            # Which list holds a key is not critical, so bfloat16 decides; FAISS would take several times as long.
            nearest = blocked(centroids, torch.from_numpy(part).bfloat16(), 1, torch.mm)[1][:, 0].numpy()
            ids = np.arange(start, start + len(part))
            index.add_core(
                len(part), faiss.swig_ptr(part), faiss.swig_ptr(ids), faiss.swig_ptr(np.ascontiguousarray(nearest))
            )
            start += len(part)
        return index

    def search(self, queries: Tensor, k: int) -> Found:
        scores, ids = self._found(queries.cpu(), k)
        if (ids < 0).any():  # fewer than k keys in the lists visited
            raise NumericalError(
                f"{self.index.nprobe} lists hold fewer than {k} keys for some queries. Use --set search=exact."
            )
        return scores, ids

    def _found(self, queries: Tensor, k: int) -> Found:
        """Like `search`, with the id -1 for what is not found."""
        scores, ids = self.index.search(np.ascontiguousarray(queries.numpy()), k)
        return torch.from_numpy(scores), torch.from_numpy(ids)

    def tune(self, queries: Tensor, k: int) -> dict[str, float]:
        """Visit as few lists (in steps of a fifth) as give RECALL on these queries, and say which recall that is.

        The exact neighbours are those among the keys as they are stored.
        """
        exact = self._exact(queries, k)
        facts = self._tune_codes(queries, k, exact)
        lists = self.index.invlists
        assert lists is not None
        shortest = min(lists.list_size(i) for i in range(self.lists))
        self.index.nprobe = min(self.lists, 1 + k // max(1, shortest))
        while True:
            share = recall(self._found(queries, k)[1], exact)
            if share >= RECALL or self.index.nprobe == self.lists:
                return {"recall": share, "lists_visited": self.index.nprobe, "lists": self.lists, **facts}
            self.index.nprobe = min(self.lists, self.index.nprobe + max(1, self.index.nprobe // 5))

    def _tune_codes(self, queries: Tensor, k: int, exact: Tensor) -> dict[str, int]:
        """Half precision has nothing to tune."""
        return {}

    def _exact(self, queries: Tensor, k: int) -> Tensor:
        """(n, k) ids of the exact neighbours among the stored keys."""
        found: list[Found] = []
        for start, block in self._stored():
            values, ids = blocked(block, queries, min(k, len(block)), torch.mm)
            found = [merged([*found, (values, ids + start)], k)]
        return found[0][1]

    def _stored(self) -> Iterator[tuple[int, Tensor]]:
        self.index.make_direct_map()
        for start in range(0, self.count, ON_CPU.keys):
            yield start, torch.from_numpy(self.index.reconstruct_n(start, min(ON_CPU.keys, self.count - start)))


class _Quantised(_InvertedFile):
    """The same with keys quantised in memory, and ranked anew as they are in the file."""

    code, spare = "pq4", SPARE

    @property
    def bytes(self) -> int:
        """Of codes, ids and centroids; the file comes beside."""
        return self.count * (self.index.pq.M // 2 + 8) + self.lists * self.width * 4

    def _filled(self, points: np.ndarray, centroids: Tensor) -> Any:
        if len(points) < LEAST:
            raise UsageError(f"search=ivfpq needs at least {LEAST} patches, there are {len(points)}. Use search=exact.")
        parts = next(m for m in range(max(1, self.width // 2), 0, -1) if self.width % m == 0)
        index = faiss.IndexIVFPQFastScan(self._quantizer, self.width, self.lists, parts, 4, faiss.METRIC_INNER_PRODUCT)
        index.train(points)
        for part in self.rows.chunks():
            index.add(part)
        return index

    def _tune_codes(self, queries: Tensor, k: int, exact: Tensor) -> dict[str, int]:
        """As many candidates as lose at most half of what RECALL allows, where all lists are visited."""
        self.index.nprobe, self.spare = self.lists, SPARE
        while self.spare * k < self.count and recall(self._found(queries, k)[1], exact) < (1 + RECALL) / 2:
            self.spare *= 2
        return {"candidates": min(self.spare * k, self.count)}

    def _found(self, queries: Tensor, k: int) -> Found:
        wanted = min(self.spare * k, self.count)
        candidates = torch.from_numpy(self.index.search(np.ascontiguousarray(queries.numpy()), wanted)[1])
        found = []
        for some, ids in zip(queries.split(64), candidates.split(64), strict=True):
            keys = torch.from_numpy(self.rows.at(ids.clamp(min=0).numpy()))
            scores = torch.bmm(keys, some[..., None])[..., 0].masked_fill_(ids < 0, -torch.inf)
            best, order = scores.topk(k)
            found.append((best, ids.gather(1, order)))
        return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])

    def _stored(self) -> Iterator[tuple[int, Tensor]]:
        start = 0
        for part in self.rows.chunks():
            yield start, torch.from_numpy(part)
            start += len(part)
