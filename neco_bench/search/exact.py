"""k-nearest-neighbour search by inner product behind one small interface: exact, and approximate on request.

The exact ways differ in speed by machine and in rounding only; the fastest of them here is found by a short
measurement. All but FAISS's are blocked matrix products with a running top-k, so that memory stays bounded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neco_bench.core import distributed
from neco_bench.core.errors import UsageError
from neco_bench.search.bf16 import _Half
from neco_bench.search.faiss_gpu import faiss_sees_gpu
from neco_bench.search.fp32 import _Faiss, _Numpy, _Torch
from neco_bench.search.topk import Found, merged, sizes

HOPELESS = 2  # times the time of another way, in which a way need not be measured again


WARM = 32  # queries that a way is used to before it is measured


def _ways(device: torch.device) -> dict[str, Callable[[Tensor], Any]]:
    """The exact ways on a device, by name, the one first that is most often the fastest."""
    if device.type == "cpu":
        return {"torch-bf16": _Half, "torch": _Torch, "numpy": _Numpy}
    ways: dict[str, Callable[[Tensor], Any]] = {"torch": _Torch}
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):  # has bfloat16
            ways = {"torch-bf16": _Half, **ways}
        if faiss_sees_gpu():
            ways["faiss-gpu"] = _Faiss
    return ways


def fastest(keys: Tensor, queries: Tensor, k: int) -> dict[str, float]:
    """Seconds that each exact way takes for some of these keys and queries, the fastest first."""
    counts = sizes(keys.device).measured
    some, asked = (t[:: max(1, len(t) // most)][:most] for t, most in zip((keys, queries), counts, strict=True))
    seconds = dict[str, float]()
    for name, way in _ways(keys.device).items():
        index = way(some)
        index.search(asked[:WARM], min(k, len(some)))
        for _ in range(2):  # the better one counts: something else may have come between
            start = time.perf_counter()
            index.search(asked, min(k, len(some)))[0].cpu()
            seconds[name] = min(time.perf_counter() - start, seconds.get(name, math.inf))
            if seconds[name] > HOPELESS * min(seconds.values()):
                break
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


class ExactIndex:
    """Inner-product index over float32 rows of `dimension` on `device`.

    capacity: rows that will be added, where known; more may come. way: of `_ways`; None takes the fastest. `facts`:
    how it searched, known with the first search.
    """

    def __init__(self, dimension: int, device: torch.device, *, capacity: int = 0, way: str | None = None) -> None:
        self.dimension, self.device, self.rows = dimension, device, 0
        self.way, self.facts = way, dict[str, Any]()
        self._keys = torch.empty(capacity, dimension, device=device)
        self._way: Any = None

    def add(self, keys: Tensor) -> None:
        """Append (n, dimension) float32 keys."""
        needed = self.rows + len(keys)
        if needed > len(self._keys):
            grown = torch.empty(max(needed, 2 * len(self._keys)), self.dimension, device=self.device)
            grown[: self.rows] = self._keys[: self.rows]
            self._keys = grown
        self._keys[self.rows : needed] = keys
        self.rows, self._way = needed, None

    def search(self, queries: Tensor, k: int) -> Found:
        """Scores and row ids, each (n, k), best first, on the CPU. Raises UsageError where k exceeds the rows."""
        check_neighbours(k, self.rows)
        if self._way is None:
            small = self.rows * len(queries) < sizes(self.device).worth_measuring
            keys = self._keys[: self.rows]
            name = self.way or ("torch" if small else next(iter(fastest(keys, queries.to(keys), k))))
            self._way = _ways(self.device)[name](keys)
            self.facts = {"index": name, "bytes": keys.nbytes + getattr(self._way, "spent", 0)}
        scores, ids = self._way.search(queries.to(self.device, torch.float32), k)
        return scores.cpu(), ids.cpu()


class SharedIndex:
    """The rows of all processes of a run, of which each holds and searches its own (`own`, an index); all give the same
    answers. Rows count through the processes. Raises UsageError like the others."""

    def __init__(self, own: Any) -> None:
        counts = distributed.gather(own.rows)
        self.own, self.rows, self.before = own, sum(counts), sum(counts[: distributed.rank()])

    @property
    def facts(self) -> dict[str, Any]:
        """Of this process's share."""
        return self.own.facts

    def search(self, queries: Tensor, k: int) -> Found:
        """Scores and row ids, each (n, k), best first, on the CPU."""
        check_neighbours(k, self.rows)
        mine: Found = torch.zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.int64)
        if self.own.rows:
            scores, ids = self.own.search(queries, min(k, self.own.rows))
            mine = scores, ids + self.before
        return merged(distributed.gather(mine), k)


def check_neighbours(k: int, rows: int) -> None:
    """Raise UsageError where k exceeds the rows."""
    if k > rows:
        raise UsageError(
            f"{k} neighbours were asked for, but the memory bank holds {rows} patches. "
            f"Lower it with --set neighbours={rows}, or use more images."
        )
