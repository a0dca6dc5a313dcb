"""Intervals of metrics by leaving out sampling units (jackknife). Pure numpy.

A unit is what was sampled from a population (`core.sampling.Sampling`): an image, a sequence, a scene. The metric is
computed without each unit in turn (delete-one jackknife: Quenouille 1956, Tukey 1958; Efron and Stein, *Annals of
Statistics* 1981), which estimates its variance and bias from few images. The interval is Student's t times the root of
variance plus squared bias, plus the spread over seeds. docs/pages/intervals.md reports its coverage in simulations.

- Pairs of images: an image is left out with all its pairs, within its category (Arvesen, *Annals of Mathematical
  Statistics* 1969).
- Frames of a drive: neighbouring frames depend on each other, so the variance is estimated from sums over blocks of
  consecutive frames (moving blocks: Künsch, *Annals of Statistics* 1989), whose length follows from the autocorrelation
  (Andrews, *Econometrica* 1991).
- Shares of hits: Wilson's interval (1927) with the number of trials that gives the same variance (Korn and Graubard,
  *Survey Methodology* 1998), so that it stays within [0, 1]; also if all units agree, when leaving out shows nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from neco_bench.core.errors import NumericalError
from neco_bench.core.sampling import Sampling
from neco_bench.metrics.segmentation import AbsentClasses
from neco_bench.metrics.sums import SumMetric, category_sums, mean_sums, miou_sums

LEVEL = 0.95

# With fewer units, a test cannot be significant: for five units that all gain, the exact p is 2 / 2**5 = 0.06.
FEWEST = 6

_SAME = 1e-12  # differences below this are rounding


Bounds = tuple[float, float]


@dataclass(frozen=True)
class Units:
    """The sampling units, and the items of each.

    member: (n,) the unit of each item, or (n, 2) for pairs of images. strata: (U,) the category of each unit, all 0
    without categories. drives: (U,) the drive of each unit if units are consecutive frames, else None.
    """

    name: str
    count: int
    member: np.ndarray
    strata: np.ndarray
    drives: np.ndarray | None = None

    @classmethod
    def of(cls, sampling: Sampling, items: int, strata: np.ndarray | None = None) -> Units:
        """Return the units of this number of items."""
        if sampling.images is not None:
            ids, member = np.unique(sampling.images, return_inverse=True)
            member = member.reshape(-1, 2)
            of_image = np.zeros(len(ids), int)
            if strata is not None:
                of_image[member.reshape(-1)] = np.repeat(strata, 2)
                if (of_image[member] != strata[:, None]).any():  # an image of several categories
                    of_image = np.zeros(len(ids), int)
            return cls("image", len(ids), member, of_image)
        if sampling.groups is None or sampling.in_blocks:
            return cls(sampling.unit, items, np.arange(items), np.zeros(items, int), sampling.groups)
        member = np.unique(sampling.groups, return_inverse=True)[1].reshape(-1)
        count = int(member.max(initial=-1)) + 1
        return cls(sampling.unit, count, member, np.zeros(count, int))

    def sums(self, columns: np.ndarray) -> np.ndarray:
        """Return the part (U, K) of the sums over all items that belongs to each unit."""
        if self.member.ndim == 1 and self.count == len(self.member):
            return columns
        total = np.zeros((self.count, columns.shape[1]))
        for member in self.member.reshape(len(columns), -1).T:
            np.add.at(total, member, columns)
        return total

    @property
    def groups(self) -> int | None:
        """Number of drives."""
        return None if self.drives is None else len(np.unique(self.drives))

    def block_length(self, effects: np.ndarray) -> int:
        """Return frames per block, from the lag-one autocorrelation of their effects (U,); 1 if independent."""
        if self.drives is None:
            return 1
        centred = effects - effects.mean()
        together = self.drives[1:] == self.drives[:-1]
        power = np.square(centred).sum()
        r = (centred[1:] * centred[:-1])[together].sum() / power if power > 0 else 0.0
        r = np.clip(r + (1 + 3 * r) / len(effects), 0.0, 0.97)  # Kendall's correction of the bias of r
        length = np.ceil(2.5 * (r / (1 - r**2)) ** (2 / 3) * len(effects) ** (1 / 3))
        return int(np.clip(length, 1, max(1, len(effects) // 4)))  # at most a quarter of all frames

    def blocks(self, length: int) -> np.ndarray:
        """Return the block (U,) of each frame: `length` consecutive frames of a drive; a rest joins the last block."""
        if self.drives is None or length == 1:
            return np.arange(self.count)
        numbers, last = np.zeros(self.count, int), -1
        for drive in dict.fromkeys(self.drives.tolist()):
            rows = np.flatnonzero(self.drives == drive)
            own = np.minimum(np.arange(len(rows)) // length, max(0, len(rows) // length - 1))
            numbers[rows] = last + 1 + own
            last = int(numbers[rows].max())
        return numbers


@dataclass(frozen=True)
class Interval:
    """A 95 % interval and its sampling units; see `results.schema.Drawn`. ends: None if there is no interval."""

    ends: Bounds | None
    unit: str
    units: int
    groups: int | None
    repeats: int
    method: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """A metric, and the estimate of its error.

    repeats: (R,) values of seeds or draws. effects: (U,) metric minus the metric without each unit, averaged over
    repeats. informative: (U,) whether a unit affects the metric.
    """

    repeats: np.ndarray
    effects: np.ndarray
    informative: np.ndarray
    units: Units
    fraction: bool = True

    @property
    def value(self) -> float:
        """The metric."""
        return float(self.repeats.mean())

    def minus(self, other: Estimate) -> Estimate:
        """Return the paired difference to another estimate on the same units (and repeats, if equally many).

        Raises:
            NumericalError: if the numbers of units differ.
        """
        if len(self.effects) != len(other.effects):
            raise NumericalError(f"{len(other.effects)} units cannot be paired with {len(self.effects)}.")
        paired = len(self.repeats) == len(other.repeats)
        repeats = self.repeats - other.repeats if paired else _spread_like(self, other)
        informative = self.informative | other.informative
        return Estimate(repeats, self.effects - other.effects, informative, self.units, fraction=False)

    @cached_property
    def length(self) -> int:
        """Frames per block; 1 if units are independent."""
        return self.units.block_length(self.effects)

    @cached_property
    def sampling_variance(self) -> tuple[float, float]:
        """Return the variance of the metric over samples of units, including bias, and its degrees of freedom."""
        effects, strata = self.effects, self.units.strata
        number = np.bincount(strata)
        centred = effects - (np.bincount(strata, effects) / number)[strata]
        bias = float((np.bincount(strata, effects) / number * (number - 1)).sum())
        if self.length == 1:
            variance = float((np.square(centred) * ((number - 1) / number)[strata]).sum())
            return variance + bias**2, max(1.0, len(effects) - float((number > 0).sum()))
        drives = np.zeros(len(effects)) if self.units.drives is None else self.units.drives
        sums = np.concatenate([_running_sums(centred[drives == drive], self.length) for drive in np.unique(drives)])
        share = self.length / len(effects)
        variance = float(np.square(sums).mean() / share / (1 - share))
        return variance + bias**2, max(1.0, 1 / share - 1)

    @cached_property
    def variance(self) -> tuple[float, float]:
        """Return the variance from units and repeats, and its degrees of freedom (Welch and Satterthwaite)."""
        first, df = self.sampling_variance
        count = len(self.repeats)
        if count < 2:
            return first, df
        second = float(self.repeats.var(ddof=1)) / count
        total = first + second
        if total <= 0:
            return 0.0, df
        return total, total**2 / (first**2 / df + second**2 / (count - 1))

    def interval(self, notes: Sequence[str] = (), level: float = LEVEL) -> Interval:
        """Return the interval; notes: additional notes on what it does not cover."""
        units, method = int(self.informative.sum()), f"delete-one-{self.units.name} jackknife"
        notes = [*notes, *([_of_drives(self.units.groups)] if self.units.groups else [])]
        ends: Bounds | None = None
        if units < 2:
            notes, method = [f"one {self.units.name}: nothing is known of the spread"], "none"
        elif np.ptp(self.effects) <= _SAME and self.variance[0] <= _SAME:
            method = "Wilson, as all agree"
            # So many pairs at most have no image in common with each other.
            apart = max(2, units // 2) if self.units.member.ndim == 2 else units
            ends = wilson(self.value, apart, level=level) if self.fraction and 0 <= self.value <= 1 else None
        else:
            ends = self._ends(level)
            if self.length > 1:
                method = f"moving blocks of {self.length} frames"
                units = len(np.unique(self.units.blocks(self.length)))
        if 2 <= units < FEWEST:
            notes.append(f"fewer than {FEWEST} units")
        return Interval(ends, self.units.name, units, self.units.groups, len(self.repeats), method, tuple(notes))

    def _ends(self, level: float) -> Bounds:
        from scipy.stats import t  # a tenth of a second, that listings do not need

        variance, df = self.variance
        quantile = float(t.ppf((1 + level) / 2, df)) if level < 1 else np.inf
        value = self.value
        if self.fraction and 0 < value < 1:
            return wilson(value, value * (1 - value) / variance, quantile)
        half = quantile * variance**0.5
        low, high = value - half, value + half
        return (max(0.0, low), min(1.0, high)) if self.fraction else (low, high)


def estimates(sums: SumMetric, sampling: Sampling | None = None) -> list[Estimate]:
    """Estimate each metric of the statistic; for a single metric, the list has one entry.

    Raises:
        NumericalError: for no items, values that are not finite, or a single metric that no item defines.
    """
    sampling = sampling or Sampling()
    columns = sums.columns.astype(np.float64)  # pixel counts below 2**53 stay exact
    if not len(columns) or not np.isfinite(columns).all():
        raise NumericalError(f"An interval needs finite values of at least one item, got {len(columns)} items.")
    units = Units.of(sampling, len(columns), sums.strata)
    total, parts = columns.sum(0, keepdims=True), units.sums(columns)
    values = sums.statistic(total)[0]
    without = sums.statistic(total - parts)
    if values.ndim == 1:
        if np.isnan(values).any():
            raise NumericalError("No item has ground truth, so the metric is undefined.")
        return [_estimate(values, without, (parts != 0).any(1), units, sums.fraction)]
    informative = np.any(~np.isclose(without, values[None], rtol=0, atol=_SAME, equal_nan=True), axis=2)
    return [
        _estimate(values[m], without[:, m], informative[:, m], units, sums.fraction) for m in range(values.shape[0])
    ]


def estimate(sums: SumMetric, sampling: Sampling | None = None) -> Estimate:
    """Estimate the one metric of a statistic. Raises as `estimates`."""
    (single,) = estimates(sums, sampling)
    return single


def miou_interval(
    confusions: np.ndarray, *, absent: AbsentClasses = "exclude", sampling: Sampling | None = None
) -> Bounds | None:
    """Return (low, high) of the mIoU over pooled pixels, from confusions per image (n, C, C), or (R, n, C, C).

    None if only one unit has labelled pixels. Raises NumericalError for no images, or no labelled pixel.
    """
    if not confusions.any():
        raise NumericalError(
            f"The masks of the {confusions.shape[-3]} images to score on have no labelled pixel, so the metric is "
            f"undefined. Check them: neco-bench data check."
        )
    return estimate(miou_sums(confusions, absent), sampling).interval().ends


def mean_interval(values: np.ndarray, *, sampling: Sampling | None = None, fraction: bool = True) -> Bounds | None:
    """Return (low, high) of the mean of `values` (n,); None for a single unit. For plug-in families.

    Raises NumericalError for no values, or NaN among them.
    """
    return estimate(mean_sums(values, fraction=fraction), sampling).interval().ends


def pck_interval(
    hits: np.ndarray, totals: np.ndarray, category: np.ndarray, images: np.ndarray, *, mean: str
) -> Bounds | None:
    """Return (low, high) of a PCK over pairs of images: see `category_sums`; images: (n, 2)."""
    return estimate(category_sums(hits, totals, category, mean=mean), Sampling("pair", images=images)).interval().ends


def wilson(mean: float, trials: float, quantile: float | None = None, level: float = LEVEL) -> Bounds:
    """Return Wilson's interval of a share of `trials`; one-sided for 0 or 1: for 0 hits in 80, [0, 0.046]."""
    if quantile is None:
        from statistics import NormalDist

        quantile = NormalDist().inv_cdf((1 + level) / 2) if level < 1 else np.inf
    if np.isinf(quantile):
        return 0.0, 1.0
    square = quantile**2 / trials
    centre, half = mean + square / 2, np.sqrt(square * mean * (1 - mean) + square**2 / 4)
    low, high = ((centre + sign * half) / (1 + square) for sign in (-1, 1))
    return max(0.0, min(float(low), mean)), min(1.0, max(float(high), mean))


def _estimate(
    values: np.ndarray, without: np.ndarray, informative: np.ndarray, units: Units, fraction: bool
) -> Estimate:
    """Return an estimate; units without which a metric is undefined get no effect."""
    effects = values.mean() - without.mean(1)
    return Estimate(values, np.nan_to_num(effects), informative, units, fraction)


def _spread_like(one: Estimate, other: Estimate) -> np.ndarray:
    """Return values with the mean of a difference and the variance of its mean, if the repeats differ."""
    parts = [float(side.repeats.var(ddof=1)) / len(side.repeats) for side in (one, other) if len(side.repeats) > 1]
    count = min(len(side.repeats) for side in (one, other) if len(side.repeats) > 1)
    shape = np.linspace(-1, 1, count)
    return one.value - other.value + shape * np.sqrt(sum(parts) * count / shape.var(ddof=1))


def _running_sums(values: np.ndarray, length: int) -> np.ndarray:
    """Return the sums of all runs of `length` consecutive values; empty if there are fewer values."""
    ends = np.concatenate([[0.0], values.cumsum()])
    return ends[length:] - ends[:-length] if len(values) >= length else np.empty(0)


def _of_drives(number: int) -> str:
    return (
        "frames of one drive: nothing is known of other drives"
        if number == 1
        else f"frames of {number} drives: little is known of other drives"
    )
