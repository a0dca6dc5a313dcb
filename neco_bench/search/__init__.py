"""k-nearest-neighbour search by inner product behind one small interface: exact, and approximate on request.

The exact ways differ in speed by machine and in rounding only; the fastest of them here is found by a short
measurement. All but FAISS's are blocked matrix products with a running top-k, so that memory stays bounded.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor

from neco_bench import distributed
from neco_bench.clustering import faiss_sees_gpu, to_gpu
from neco_bench.errors import UsageError

HELD = 16  # blocks whose best are held until they are merged
GROUP = 16  # keys that share a maximum in `top`
FIRST, SPARE = 1.5, 3  # candidates of the half-precision product that are ranked anew, as multiples of k
ASKED = 2**16  # keys at most that a query's shift is estimated from
MARGIN = 2**-7  # of the shift, for the rounding of what it is estimated from
UPWARDS = 1 + 2**-7  # what is a bound stays one in bfloat16
PART = 4096  # queries that are proven at once
TILE = 64  # columns of a bfloat16 product, in multiples of which it is fast
BOUNDS = 4  # columns that make a product a bound
ROUNDING = 2**-6  # what rounding loosens bounds by, as a share of the product of lengths
LOOSE = 0.004  # of bounds, as a share of the mean square length: less is not worth its columns
UNPROVEN_LOOSE = 0.016  # the same where bounds are not used
SAMPLE = 16_384  # about as many keys as axes are found on
TURNED = 4096  # keys that are turned at once
ORDINARY = 1e-15, 1e15  # lengths of rows, outside which squares or bfloat16 may leave the range of numbers
HOPELESS = 2  # times the time of another way, in which a way need not be measured again
WARM = 32  # queries that a way is used to before it is measured
MAX_DOUBT = 0.5  # share of queries searched again above which half precision is given up


class Sizes(NamedTuple):
    """How much is done at once.

    keys: in one product, or up to twice as many where these are all; on CPUs more slow the product down, fewer the
    finding of the best. scores: bytes of those held at once. measured: keys and queries of a measurement of the ways.
    worth_measuring: keys times queries of the first search, from which they are measured.
    """

    keys: int
    scores: int
    measured: tuple[int, int]
    worth_measuring: int


ON_CPU = Sizes(25_600, 16 * 2**20, (16_384, 512), 2**26)
ON_GPU = Sizes(131_072, 2**30, (131_072, 8_192), 2**36)

Found = tuple[Tensor, Tensor]  # scores and row ids, (n, k) each, best first


def sizes(device: torch.device) -> Sizes:
    """Those that were found best on that kind of device."""
    return ON_CPU if device.type == "cpu" else ON_GPU


def top(scores: Tensor, k: int) -> Found:
    """The k largest of each row of scores (n, M), largest first.

    The keys that hold the k largest lie in the k groups of largest maxima, so that only those are sorted. In bfloat16
    on CPUs numbers are compared as integers, several times faster: those at or below zero come last, in any order.
    """
    groups = scores.shape[1] // GROUP
    if groups <= k:
        return _largest(scores, k)
    inside = groups * GROUP
    whole = scores[:, :inside].unflatten(1, (GROUP, groups))  # a group is a stride apart: maxima vectorise
    maxima = whole.view(torch.int16).amax(1).view(scores.dtype) if _as_integers(scores) else whole.amax(1)
    chosen = _largest(maxima, k)[1]
    members = whole.gather(2, chosen[:, None].expand(-1, GROUP, -1)).flatten(1)
    if inside < scores.shape[1]:
        members = torch.cat([members, scores[:, inside:]], 1)
    values, best = _largest(members, k)
    ids = chosen.gather(1, best % k) + best // k * groups
    return values, torch.where(best < GROUP * k, ids, best - GROUP * k + inside)


def _as_integers(scores: Tensor) -> bool:
    return scores.dtype == torch.bfloat16 and scores.device.type == "cpu"


def _largest(scores: Tensor, k: int) -> Found:
    """The same by sorting: on CPUs, a bfloat16 number and its place as one integer."""
    width = scores.shape[1]
    if not _as_integers(scores) or width > 2**16:
        return scores.topk(k)
    pairs = scores.view(torch.int16).int()
    pairs <<= 16
    pairs |= torch.arange(width, dtype=torch.int32)
    packed = pairs.numpy()
    if k < width:
        packed.partition(width - k)
    found = torch.from_numpy(np.sort(packed[:, width - k :])).flip(1)
    return (found >> 16).to(torch.int16).view(torch.bfloat16), (found & 0xFFFF).long()


def merged(found: list[Found], k: int) -> Found:
    """The k best of findings among different keys, best first; fewer where there are fewer."""
    if len(found) == 1:
        return found[0][0][:, :k], found[0][1][:, :k]
    values, ids = torch.cat([f[0] for f in found], 1), torch.cat([f[1] for f in found], 1)
    values, order = _largest(values, min(k, values.shape[1]))
    return values, ids.gather(1, order)


def blocked(keys: Tensor, queries: Tensor, k: int, multiply: Callable[..., object]) -> Found:
    """The k best of `keys` (M, D) for each query, by products that `multiply(queries, keys.T, out=scores)` computes."""
    at_once = sizes(keys.device)
    width = at_once.keys if len(keys) > 2 * at_once.keys else len(keys)
    step = max(1, at_once.scores // (keys.element_size() * width))
    # One piece of memory for all products: to ask the system for fresh pages takes as long as a product.
    memory = torch.empty(min(step, len(queries)) * width, dtype=keys.dtype, device=keys.device)
    parts = []
    for some in queries.chunk(max(1, -(-len(queries) // step))):  # equal: a small part takes as long
        found: list[Found] = []
        for start in range(0, len(keys), width):
            block = keys[start : start + width]
            scores = memory[: len(some) * len(block)].view(len(some), len(block))
            multiply(some, block.T, out=scores)
            values, ids = top(scores, min(k, len(block)))
            found.append((values, ids + start))
            if len(found) == HELD:
                found = [merged(found, k)]
        parts.append(merged(found, k))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


class _Faiss:
    """FAISS's flat index on a GPU. (On CPUs its wheel's BLAS is never faster than the better of the other two.)"""

    def __init__(self, keys: Tensor) -> None:
        self.index = to_gpu(faiss.IndexFlatIP(keys.shape[1]), keys.device)
        self.index.add(keys.cpu().numpy())

    def search(self, queries: Tensor, k: int) -> Found:
        scores, ids = self.index.search(np.ascontiguousarray(queries.cpu().numpy()), k)
        return torch.from_numpy(scores), torch.from_numpy(ids)


class _Torch:
    """Products by PyTorch, in single precision."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    def search(self, queries: Tensor, k: int) -> Found:
        return blocked(self.keys, queries, k, torch.mm)


class _Numpy(_Torch):
    """Products by numpy, whose BLAS is another one and on some CPUs several times faster than PyTorch's."""

    def search(self, queries: Tensor, k: int) -> Found:
        def multiply(some: Tensor, block: Tensor, out: Tensor) -> None:
            np.matmul(some.numpy(), block.numpy(), out=out.numpy())

        return blocked(self.keys, queries, k, multiply)


def _ordinary(length: Any) -> Any:
    return (length > ORDINARY[0]) & (length < ORDINARY[1])


class _Half:
    """Candidates by a bfloat16 product, ranked anew in single precision; what cannot be proven right is searched again.

    Keys are centred on their mean m, which changes no order, and turned so that the first coordinates are the longest
    (principal axes of keys as they are). The first of them are given twice as many digits, as the sum of two bfloat16
    numbers, in three columns each (high high, low high, high low): rounding then costs little where the length is. The
    last ones, T, are left out where they hardly count. With k~ and q~ the rounded key and query, d their errors, R the
    coordinates in between: the product q k is at most q~ k~ + |q_R| |d_kR| + |d_qR| |k~_R| + |q_T| |k_T|
    (Cauchy-Schwarz). Four more columns make the product this bound itself, less a shift that brings the best of a
    query just above zero, where bfloat16 has its resolution. A key that is no candidate stays below the last
    candidate's bound, or below zero; where the k-th best candidate is above that, none is missed. That is asked of the
    first candidates, and where these do not suffice of all. Like every search in single precision it is
    exact up to the rounding of sums of D products, which is taken as 8 sqrt(D) units (Higham and Mary, 2019: more has a
    probability below 1e-13); of 2 D on GPUs, whose matrix units cut off what they add (Fasi et al., 2021).
    """

    def __init__(self, keys: Tensor, *, proven: bool = True) -> None:
        """proven: False takes the best candidates as they are."""
        self.keys, self.proven = keys, proven
        sample = keys[:: max(1, len(keys) // SAMPLE)]
        energy, axes = torch.linalg.eigh((sample.T @ sample).double() / len(sample))
        self.axes, self.mean = axes.flip(1).float(), keys.mean(0)
        columns = self._choose_columns((energy.flip(0).float() - (self.mean @ self.axes).square()).clamp_min(0))
        self.low = torch.empty(len(keys), columns, dtype=torch.bfloat16, device=keys.device)
        self.longest = 0.0
        for some, low in zip(keys.split(TURNED), self.low.split(TURNED), strict=True):
            centred = (some - self.mean) @ self.axes
            error, rest = self._round(centred, low, (1, 0))
            for column, bound in zip((-4, -3, -2), (error, rest, centred[:, self.kept :].norm(dim=1)), strict=True):
                low[:, column] = bound * UPWARDS
            low[:, -1] = 1
            self.longest = max(self.longest, float(centred.norm(dim=1).max()))
        self.spent = self.low.nbytes  # beside the keys
        self.again = _Torch(keys)
        self.searched = self.doubted = 0

    def _choose_columns(self, energy: Tensor) -> int:
        """How many columns, as few as leave the bounds tight; `kept` axes are in them, the first `double` twice.

        energy: (D,) mean square of each turned coordinate.
        """
        dimension = len(energy)
        left = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)]) / energy.sum().clamp_min(1e-30)
        most = -(-(dimension + max(BOUNDS, dimension // 3)) // TILE) * TILE  # 512 for 384
        for columns in range(TILE, most + 1, TILE):
            double = torch.arange(min(dimension, (columns - BOUNDS) // 3) + 1)
            kept = (columns - BOUNDS - 2 * double).clamp(max=dimension)
            loose = left[kept] + ROUNDING * (left[double] - left[kept])
            best = int(loose.argmin())
            if loose[best] <= (LOOSE if self.proven else UNPROVEN_LOOSE):
                break
        self.kept, self.double = int(kept[best]), int(double[best])
        return columns

    def _round(self, values: Tensor, low: Tensor, order: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Write turned `values` (n, D) to the columns `low`, their second and third parts in `order` (1 for what is
        left after the first). Gives (n,) the length of the error, and of what is written, in the coordinates R."""
        double, between = self.double, values[:, self.double : self.kept]
        parts = [values[:, :double].bfloat16()]
        parts.append((values[:, :double] - parts[0]).bfloat16())
        low[:, :double] = parts[0]
        for place, part in enumerate(order, 1):
            low[:, place * double : (place + 1) * double] = parts[part]
        others = low[:, 3 * double : 2 * double + self.kept]
        others.copy_(between)
        low[:, 2 * double + self.kept :] = 0
        rounded = others.float()
        return (between - rounded).norm(dim=1), rounded.norm(dim=1)

    def search(self, queries: Tensor, k: int) -> Found:
        if self.searched >= PART and self.doubted > MAX_DOUBT * self.searched:  # not worth the trouble here
            return self.again.search(queries, k)
        if not self.proven:
            return self._with_candidates(queries, k, int(FIRST * k))[:2]
        scores, ids, doubtful = self._with_candidates(queries, k, SPARE * k + 4)
        if len(doubtful):  # of all parts at once: a small product takes as long as a larger one
            some = queries[doubtful]
            scores[doubtful], ids[doubtful], still = self._with_candidates(some, k, 2 * SPARE * k)
            if len(still):
                scores[doubtful[still]], ids[doubtful[still]] = self.again.search(some[still], k)
            self.doubted += len(still)
        self.searched += len(queries)
        return scores, ids

    def _with_candidates(self, queries: Tensor, k: int, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and ids (n, k) of the best of `wanted` candidates, and which queries they are not proven for."""
        wanted = min(wanted, len(self.keys))
        parts = [self.candidates(some, k, wanted) for some in queries.chunk(max(1, -(-len(queries) // PART)))]
        scores, ids, sure = (torch.cat(part) for part in zip(*parts, strict=True))
        return scores, ids, (~sure).nonzero()[:, 0]

    def candidates(self, queries: Tensor, k: int, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and ids (n, k) of the best of `wanted` candidates, and for which queries (n,) they are proven."""
        turned, length = queries @ self.axes, queries.norm(dim=1)
        low = torch.empty(len(queries), self.low.shape[1], dtype=torch.bfloat16, device=queries.device)
        error, _ = self._round(turned, low, (0, 1))
        if self.proven:
            between, left = turned[:, self.double : self.kept].norm(dim=1), turned[:, self.kept :].norm(dim=1)
            for column, bound in zip((-4, -3, -2), (between, error, left), strict=True):
                low[:, column] = bound * UPWARDS
        low[:, -1] = -self._reached_by_few(low, wanted)
        with _summed_in_single_precision():
            rough, ids = blocked(self.low, low, wanted, torch.mm)
        # Besides the bound: rounding of what the product gives, of doubled coordinates (3 * 2**-18), and of sums.
        units = 8 * queries.shape[1] ** 0.5 if queries.device.type == "cpu" else 2 * queries.shape[1]
        sums = (self.longest + self.mean.norm()) * units * 2**-24
        rough = rough.float().clamp_min(0)  # what is no candidate has a bound of the last one's or zero at most
        beaten = (
            rough * (1 + 2**-8) + (queries @ self.mean - low[:, -1] + length * (self.longest * 2**-16 + sums))[:, None]
        )
        ordinary = _ordinary(length) & _ordinary(self.longest)
        every = wanted == len(self.keys)

        first = min(int(FIRST * k), wanted)
        scores = self._products(queries, ids[:, :first])
        best, order = scores.topk(k)
        nearest = ids.gather(1, order)
        sure = ordinary & ((beaten[:, first - 1] < best[:, -1]) | (every and first == wanted))
        if first < wanted and self.proven:
            rows = (~sure).nonzero()[:, 0]
            scores = torch.cat([scores[rows], self._products(queries[rows], ids[rows, first:])], 1)
            best[rows], order = scores.topk(k)
            nearest[rows] = ids[rows].gather(1, order)
            sure[rows] = ordinary[rows] & ((beaten[rows, -1] < best[rows, -1]) | every)
        return best, nearest, sure

    def _reached_by_few(self, low: Tensor, wanted: int) -> Tensor:
        """(n,) what somewhat more bounds of the queries `low` reach than are wanted, and hardly ever fewer: estimated
        from the largest in 64 parts of a sample of the keys."""
        step = max(GROUP, len(self.low) // ASKED)
        sample = self.low[::step]
        parts = min(64, len(sample))
        sample = sample[: len(sample) // parts * parts].T
        maxima = torch.cat(
            [(some @ sample).unflatten(1, (-1, parts)).amax(1) for some in low.split(TURNED // 4)]
        ).float()
        reached = maxima.topk(min(4 + wanted // step, parts), sorted=False).values.amin(1)
        return reached - MARGIN * reached.abs()

    def _products(self, queries: Tensor, ids: Tensor) -> Tensor:
        """(n, c) inner products of queries (n, D) with the keys of their candidates (n, c), in single precision."""
        scores = torch.empty(ids.shape, device=ids.device)
        memory = torch.empty(min(128, len(ids)) * ids.shape[1], self.keys.shape[1], device=ids.device)
        for some, chosen, out in zip(queries.split(128), ids.split(128), scores.split(128), strict=True):
            candidates = memory[: chosen.numel()]
            torch.index_select(self.keys, 0, chosen.flatten(), out=candidates)
            torch.bmm(candidates.view(*chosen.shape, self.keys.shape[1]), some[..., None], out=out[..., None])
        return scores


@contextlib.contextmanager
def _summed_in_single_precision() -> Iterator[None]:
    """GPUs may sum parts of a bfloat16 product in bfloat16, which proves nothing: not here."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


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
