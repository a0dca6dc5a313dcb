"""Exact search through bfloat16 candidates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from neco_bench.search.fp32 import _Torch
from neco_bench.search.topk import GROUP, Found, blocked

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


MAX_DOUBT = 0.5  # share of queries searched again above which half precision is given up


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
