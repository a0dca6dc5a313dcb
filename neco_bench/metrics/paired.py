"""Tests of the difference between two models on the same items. Pure numpy.

Under the null hypothesis, the two models can be exchanged for each unit: the sign of each unit's part of the difference
is random (Fisher 1935, section 21; Edgington and Onghena, *Randomization Tests*, 2007). The part of a unit is the
change when it is exchanged while the other units are half of each model, so that it changes sign exactly. Units on
which the two models do not differ have no information and are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from neco_bench.core.errors import NumericalError
from neco_bench.core.sampling import Sampling
from neco_bench.metrics.intervals import FEWEST, Estimate, Units, estimates
from neco_bench.metrics.sums import SumMetric

DRAWS = 10_000


@dataclass(frozen=True)
class Difference:
    """value: second minus first; low, high: its interval; p: two-sided, for the hypothesis of no difference; units: the
    number of units that differ, which the test uses; unit: their name; test: "sign flips", "exact sign flips" or "t".
    Undefined numbers are NaN."""

    value: float
    low: float
    high: float
    p: float
    units: int
    unit: str
    test: str = ""


_NAN = float("nan")


def paired_difference(
    first: SumMetric, second: SumMetric, sampling: Sampling | None = None, *, draws: int = DRAWS, seed: int = 0
) -> list[Difference]:
    """Compare each metric between two models on the same items, in the same order: one Difference per metric.

    p is from exchanging the models unit by unit (`sign_flips`), where consecutive frames form blocks. If pairs share
    images, or values are means over seeds or draws, whose spread counts too, p is from Student's t of the interval.
    There is no p for fewer than six units that differ. NaN if a metric is undefined for all items.

    Raises:
        NumericalError: if the numbers of items differ.
    """
    if len(first.columns) != len(second.columns):
        raise NumericalError(f"{len(first.columns)} items cannot be paired with {len(second.columns)}.")
    sampling = sampling or Sampling()
    before, after = (estimates(side, sampling) for side in (first, second))
    middle, units = _exchanged(first, second, sampling)
    untested = [_untested(*three, units) for three in zip(before, after, middle.T, strict=True)]
    differences = [difference for difference, _ in untested]
    to_flip = {m: parts for m, (_, parts) in enumerate(untested) if parts is not None}
    for shape in {parts.shape for parts in to_flip.values()}:  # blocks may differ between metrics
        same = [m for m, parts in to_flip.items() if parts.shape == shape]
        p, exact = sign_flips(np.stack([to_flip[m] for m in same], axis=1), draws=draws, seed=seed)
        for m, value, few in zip(same, p, exact, strict=True):
            test = "exact sign flips" if few else "sign flips"
            differences[m] = replace(differences[m], p=float(value), test=test)
    return differences


def _untested(one: Estimate, other: Estimate, parts: np.ndarray, units: Units) -> tuple[Difference, np.ndarray | None]:
    """Return a difference, and its parts by unit if its p must be computed by sign flips."""
    if np.isnan(one.repeats).any() or np.isnan(other.repeats).any():
        return Difference(_NAN, _NAN, _NAN, _NAN, 0, units.name), None
    change = other.minus(one)
    length = change.length
    if length > 1:
        parts = np.bincount(units.blocks(length), parts)
    informative = int((np.abs(parts) > 1e-12 * np.abs(parts).max(initial=0)).sum())
    unit = units.name if length == 1 else "block of frames"
    ends = change.interval().ends or (_NAN, _NAN)
    if not informative and change.value == 0 and change.informative.any():  # the two are the same
        ends = (0.0, 0.0)
    if informative == 1:
        ends = (_NAN, _NAN)
    untested = Difference(change.value, *ends, _NAN, informative, unit)
    if informative < FEWEST:
        return untested, None
    if len(change.repeats) > 1 or units.member.ndim == 2:
        return replace(untested, p=student(change), test="t"), None
    return untested, parts


def student(change: Estimate) -> float:
    """Return the two-sided p for no difference, from Student's t of the interval."""
    from scipy.stats import t

    variance, df = change.variance
    return float(2 * t.sf(abs(change.value) / variance**0.5, df)) if variance > 0 else float("nan")


def sign_flips(parts: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the two-sided p for parts (U, M), whose signs are random under the hypothesis, for each of M metrics.

    For few units, all patterns of signs are counted; otherwise p is 2 (1 + the number of draws at least as large) /
    (draws + 1), so its smallest value is 2 / (draws + 1).

    Returns:
        (M,) p, and (M,) whether all patterns were counted.
    """
    size = np.abs(parts)
    counted = size > 1e-12 * size.max(0, initial=0)
    observed = np.abs(parts.sum(0)) - 1e-9 * size.sum(0)  # equal sums in another order are equal
    exact = counted.sum(0) <= 13  # all 2**12 patterns of signs are fewer than the draws
    p, larger = np.ones(parts.shape[1]), np.zeros(parts.shape[1])
    for m in np.flatnonzero(exact):
        own = parts[counted[:, m], m]
        patterns = (np.arange(2 ** max(0, len(own) - 1))[:, None] >> np.arange(len(own))) & 1
        p[m] = (np.abs((1 - 2 * patterns) @ own) >= observed[m]).mean()
    rng, drawn = np.random.default_rng(seed), parts[:, ~exact]
    rows = max(1, 4_000_000 // len(parts))  # 4 million signs in memory at once
    for start in range(0, draws if drawn.shape[1] else 0, rows):
        bits = rng.integers(0, 256, (min(rows, draws - start), -(-len(parts) // 8)), dtype=np.uint8)
        signs = np.unpackbits(bits, axis=1, count=len(parts)).astype(np.float64)
        larger[~exact] += (signs @ (2 * drawn) - drawn.sum(0) >= observed[~exact]).sum(0)
    return np.where(exact, p, np.minimum(1.0, 2 * (1 + larger) / (draws + 1))), exact


def holm(values: np.ndarray) -> np.ndarray:
    """Return p-values adjusted for their number (Holm, Scandinavian Journal of Statistics 1979); NaN stays NaN."""
    adjusted = np.full(len(values), np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    steps = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def _exchanged(first: SumMetric, second: SumMetric, sampling: Sampling) -> tuple[np.ndarray, Units]:
    """Return the changes (U, M) from exchanging the models in one unit while the others are half of each; and units."""
    before, after = (side.columns.astype(np.float64) for side in (first, second))
    units = Units.of(sampling, len(before), first.strata)
    middle = (before.sum(0) + after.sum(0)) / 2
    step = units.sums(after - before) / 2
    up, down = (second.statistic(middle + sign * step).mean(-1) for sign in (1, -1))
    return np.nan_to_num(up - down).reshape(len(step), -1), units
