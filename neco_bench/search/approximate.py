"""Approximate search, on request: any index of FAISS, always with its recall measured against exact search.

An index is named by FAISS's factory string, such as "IVF4096,SQfp16" ("PCA256,RFlat" is accepted for
"PCA256,Flat,RFlat"). Two indexes have short names. "ivf": an inverted file (Sivic and Zisserman, ICCV 2003) with keys
in half precision. "ivfpq": the same with 4 bits for every two dimensions of a key (product quantisation: Jegou et al.,
TPAMI 2011); the best candidates are ranked again in half precision. Keys are first written to a file, and then added in
parts: a memory bank needs the memory of its index, and at most the same again while the index grows.
"""

from __future__ import annotations

import bisect
import functools
import re
import time
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from neco_bench.core.errors import NumericalError, UsageError
from neco_bench.search.exact import TopK, check_neighbours, nearest_of
from neco_bench.search.row_file import RowFile, faiss_draw

RECALL = 0.99  # the recall for which parameters are tuned
SAMPLE = 256  # queries whose recall is measured
TRAINING = 40  # keys per list on which an index is trained; at least 40 thousand in total

# Parameters of FAISS's indexes that trade time for recall, with their largest values, in the order of tuning. For
# "nprobe", the largest value is the number of lists.
LIMITS = {"k_factor_rf": 256, "quantizer_efSearch": 1024, "efSearch": 4096, "nprobe": 0}


class ApproximateIndex:
    """Approximate index with the interface of `ExactIndex`.

    kind: "ivf", "ivfpq" or a factory string of FAISS. `facts`, set by the first search: factory string, parameters,
    `recall` for `sample` queries, bytes, seconds to build. Raises UsageError if FAISS does not know the index.
    """

    def __init__(self, kind: str, dimension: int) -> None:
        self.kind, self.rows, self.facts = kind, 0, dict[str, Any]()
        self._rows = RowFile(dimension)
        self._index: Any = None
        self._make()  # raises now, not after all keys were added

    def add(self, keys: Tensor) -> None:
        """Append (n, dimension) float32 keys; only before the first search."""
        self._rows.append(keys.cpu().numpy())
        self.rows += len(keys)

    def search(self, queries: Tensor, k: int) -> TopK:
        """Return scores and row ids, each (n, k), best first, on the CPU.

        Raises UsageError if there are fewer than k rows, or too few to build the index, and NumericalError if fewer
        than k neighbours are found.
        """
        check_neighbours(k, self.rows)
        queries = queries.cpu().float()
        if self._index is None:
            start = time.perf_counter()
            self._index = self._build()
            seconds = time.perf_counter() - start
            sample = queries[torch.linspace(0, len(queries) - 1, min(SAMPLE, len(queries))).long()]
            exact = nearest_of(map(torch.from_numpy, self._rows.chunks()), sample, k)[1]
            parameters, share = tune(self._index, sample, k, exact)
            self.facts = {"index": self.factory, "parameters": parameters, "recall": share, "sample": len(sample)}
            self.facts |= {"bytes": size(self._index), "build_seconds": round(seconds, 2)}
        scores, ids = map(torch.from_numpy, self._index.search(queries.numpy(), k))
        if (ids < 0).any():
            raise NumericalError(f"search={self.kind} found fewer than {k} keys for some queries. Use search=exact.")
        return scores, ids

    @property
    def factory(self) -> str:
        """The factory string of FAISS."""
        lists = max(1, min(int(2 * self.rows**0.5), self.rows // TRAINING))
        width = self._rows.dimension
        parts = next(m for m in range(max(1, width // 2), 0, -1) if width % m == 0)
        names = {"ivf": f"IVF{lists},SQfp16", "ivfpq": f"IVF{lists},PQ{parts}x4fs,Refine(SQfp16)"}
        return names.get(self.kind) or re.sub(r"^(PCAW?R?\d+),R", r"\1,Flat,R", self.kind)

    def _make(self) -> Any:
        try:
            return faiss.index_factory(self._rows.dimension, self.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise UsageError(
                f"FAISS knows no index {self.factory!r} for {self._rows.dimension} dimensions: {_reason(error)} Use "
                f"--set search=exact, ivf, ivfpq or a factory string such as IVF4096,SQfp16."
            ) from error

    def _build(self) -> Any:
        index = self._make()
        inverted = faiss.try_extract_index_ivf(index)
        wanted = TRAINING * max(1000, inverted.nlist if inverted else 0)
        try:
            index.train(self._rows.at(faiss_draw(self.rows, wanted, seed=0)))
        except RuntimeError as error:
            raise UsageError(
                f"search={self.kind} cannot be built over {self.rows} patches: {_reason(error)} Use search=exact, or "
                f"more images."
            ) from error
        for part in self._rows.chunks():
            index.add(part)
        return index


def tune(index: Any, queries: Tensor, k: int, exact: Tensor) -> tuple[dict[str, int], float]:
    """Tune the parameters of an index, and return them with the recall.

    They are set to small values that reach RECALL on queries with the true neighbours `exact` (n, k), or else to the
    largest values. Each is tuned by bisection, one after the other, while later ones have their largest values, and may
    cost an equal part of the recall that RECALL allows to lose. The visited lists always contain at least k keys.
    """
    space = faiss.ParameterSpace()
    space.initialize(index)
    known = {space.parameter_ranges.at(i).name for i in range(space.parameter_ranges.size())}
    ranges = {name: range(1, limit) for name, limit in LIMITS.items() if name in known}
    if "nprobe" in ranges:
        inverted: Any = faiss.extract_index_ivf(index)
        sizes = sorted(inverted.invlists.list_size(i) for i in range(inverted.nlist))
        ranges["nprobe"] = range(min(inverted.nlist, int(np.searchsorted(np.cumsum(sizes), k)) + 1), inverted.nlist)
    if "k_factor_rf" in ranges:
        ranges["k_factor_rf"] = range(1, max(1, min(LIMITS["k_factor_rf"], index.ntotal // k)))

    def measured() -> float:
        return recall(torch.from_numpy(index.search(queries.numpy(), k)[1]), exact)

    def measured_with(name: str, value: int) -> float:
        space.set_index_parameter(index, name, value)
        return measured()

    for name, values in ranges.items():
        space.set_index_parameter(index, name, values.stop)
    parameters = dict[str, int]()
    for number, (name, values) in enumerate(ranges.items(), 1):
        wanted = 1 - (1 - RECALL) * number / len(ranges)
        enough = bisect.bisect_left(values, wanted, key=functools.partial(measured_with, name))
        parameters[name] = values.start + enough
        space.set_index_parameter(index, name, parameters[name])
    return parameters, measured()


def recall(ids: Tensor, exact: Tensor) -> float:
    """Compute the share of the exact ids (n, k) that are in `ids`."""
    return faiss.eval_intersection(ids.numpy(), exact.numpy()) / exact.numel()


def size(index: Any) -> int:
    """Compute the bytes of an index as FAISS writes it."""
    lengths: list[int] = []
    writer = faiss.PyCallbackIOWriter(lambda data: lengths.append(len(data)))  # type: ignore[attr-defined]
    faiss.write_index(index, writer)
    return sum(lengths)


def _reason(error: RuntimeError) -> str:
    """Return FAISS's message without the place in its source."""
    reason = re.sub(r"^Error in .*? at \S+:\d+: (Error: '.*' failed: ?)?", "", str(error).strip(), flags=re.DOTALL)
    return reason.rstrip(".") + "." if reason else "it takes no inner products."
