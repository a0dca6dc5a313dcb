"""How often intervals cover the true value, and how often tests of a true null reject it, case by case."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from neco_bench.core.sampling import Sampling
from neco_bench.metrics.intervals import estimate
from neco_bench.metrics.paired import holm, paired_difference
from neco_bench.metrics.segmentation import AbsentClasses
from neco_bench.metrics.sums import SumMetric, mean_sums, merged
from tests.statistics.populations import Pairs, Rng, class_ious, drive, miou, objects, scenes

Trial = Callable[[Rng], bool]


@dataclass(frozen=True)
class Case:
    """name; what is counted: "coverage" (nominal 0.95) or "level" (nominal 0.05); trial: one sample, whether it did;
    times: samples of a full run; low, high: what the share may be, the error of the simulation aside."""

    name: str
    kind: str
    trial: Trial
    times: int
    low: float
    high: float

    @property
    def nominal(self) -> float:
        """What is claimed."""
        return 0.95 if self.kind == "coverage" else 0.05

    def measure(self, times: int | None = None, seed: int = 0) -> tuple[float, float]:
        """The share of samples, and its standard error."""
        times = times or self.times
        seeds = np.random.SeedSequence([seed, sum(map(ord, self.name + self.kind))]).spawn(times)
        share = sum(self.trial(np.random.default_rng(one)) for one in seeds) / times
        return share, math.sqrt(max(share * (1 - share), 1 / times) / times)


def covers(sums: SumMetric, truth: float, sampling: Sampling | None = None) -> bool:
    """Whether the interval of a sample holds the true value."""
    ends = estimate(sums, sampling).interval().ends
    return ends is not None and ends[0] <= truth <= ends[1]


def coverage_of_miou(classes: int, images: int, absent: AbsentClasses) -> Trial:
    population = scenes(classes)
    return lambda rng: covers(miou(population.sample(rng, images)[0], absent), population.truth())


def coverage_of_pck(population: Pairs, mean: str) -> Trial:
    def trial(rng: Rng) -> bool:
        (sums,), images = population.sample(rng, mean)
        return covers(sums, population.truth(), Sampling("pair", images=images))

    return trial


def coverage_of_drive(frames: int, correlation: float) -> Trial:
    sampling = Sampling("frame", np.zeros(frames, int))
    return lambda rng: covers(mean_sums(drive(rng, frames, correlation)), 0.5, sampling)


def coverage_of_objects(sequences: int) -> Trial:
    def trial(rng: Rng) -> bool:
        (sums,), group = objects(rng, sequences)
        return covers(sums, 0.6, Sampling("sequence", group))

    return trial


def coverage_of_errors(images: int, root: bool) -> Trial:
    """Errors of depth, of which a few images have most: the mean is 0.2, the root of the mean square 0.2 too."""

    def trial(rng: Rng) -> bool:
        scores = rng.gamma(2.0, 0.1, images) if not root else rng.gamma(1.5, 0.04 / 1.5, images)
        return covers(mean_sums(scores, root=root, fraction=False), 0.2)

    return trial


def coverage_of_few_hits(items: int, share: float) -> Trial:
    return lambda rng: covers(mean_sums((rng.random(items) < share).astype(float)), share)


def coverage_over_seeds(images: int, seeds: int, spread: float) -> Trial:
    """The mean over seeds that differ by `spread`, on the same images."""

    def trial(rng: Rng) -> bool:
        hard = rng.normal(0, 0.2, images)
        sides = [0.5 + rng.normal(0, spread) + hard + rng.normal(0, 0.05, images) for _ in range(seeds)]
        return covers(merged([mean_sums(scores, fraction=False) for scores in sides]), 0.5)

    return trial


def level_of_miou(classes: int, images: int) -> Trial:
    def trial(rng: Rng) -> bool:
        first, second = scenes(classes).sample(rng, images, models=2)
        (found,) = paired_difference(miou(first, "exclude"), miou(second, "exclude"), seed=int(rng.integers(2**31)))
        return found.p < 0.05

    return trial


def level_by_class(classes: int, images: int) -> Trial:
    """Whether any class has an adjusted p below 0.05, though the two models are alike in all."""

    def trial(rng: Rng) -> bool:
        first, second = (class_ious(counts) for counts in scenes(classes).sample(rng, images, models=2))
        found = paired_difference(first, second, seed=int(rng.integers(2**31)))
        return bool((holm(np.array([row.p for row in found])) < 0.05).any())

    return trial


def level_of_pck(population: Pairs) -> Trial:
    def trial(rng: Rng) -> bool:
        (first, second), images = population.sample(rng, "totals", models=2)
        return paired_difference(first, second, Sampling("pair", images=images))[0].p < 0.05

    return trial


def level_of_drive(frames: int, correlation: float) -> Trial:
    sampling = Sampling("frame", np.zeros(frames, int))

    def trial(rng: Rng) -> bool:
        first, second = (mean_sums(drive(rng, frames, correlation)) for _ in range(2))
        return paired_difference(first, second, sampling, draws=2000)[0].p < 0.05

    return trial


def level_of_objects(sequences: int) -> Trial:
    def trial(rng: Rng) -> bool:
        (first, second), group = objects(rng, sequences, models=2)
        return paired_difference(first, second, Sampling("sequence", group), draws=2000)[0].p < 0.05

    return trial


def level_over_seeds(images: int, seeds: int, spread: float) -> Trial:
    """Two models whose seeds differ by `spread` each, and whose means over all seeds are the same."""

    def trial(rng: Rng) -> bool:
        hard = rng.normal(0, 0.2, images)
        sides: list[SumMetric] = []
        for _ in range(2):
            scores = [0.5 + rng.normal(0, spread) + hard + rng.normal(0, 0.05, images) for _ in range(seeds)]
            sides.append(merged([mean_sums(one, fraction=False) for one in scores]))
        return paired_difference(sides[0], sides[1])[0].p < 0.05

    return trial


SPARSE, DENSE, FEW = Pairs(18, 25, 100, 0.8), Pairs(10, 10, None, 0.8), Pairs(1, 10, None, 0.8)


def cases() -> Iterator[Case]:
    """All cases, by family."""
    mious: list[tuple[int, int, AbsentClasses, int, float]] = [
        (11, 101, "exclude", 1000, 0.92),
        (21, 50, "zero", 1000, 0.87),
        (21, 50, "exclude", 1000, 0.92),
        (21, 101, "zero", 1000, 0.90),
        (21, 101, "exclude", 1000, 0.92),
        (150, 101, "zero", 400, 0.90),
        (150, 101, "exclude", 400, 0.92),
        (150, 500, "zero", 200, 0.90),
        (150, 500, "exclude", 200, 0.90),
        (150, 2000, "exclude", 60, 0.90),
    ]
    for classes, images, absent, times, low in mious:
        name = f"mIoU, {classes} classes x {images} images, absent = {absent}"
        yield Case(name, "coverage", coverage_of_miou(classes, images, absent), times, low, 1.0)
    for name, population, low in (
        ("18 x 25 images, 100 pairs each", SPARSE, 0.92),
        ("10 x 10 images, all pairs", DENSE, 0.90),
        ("1 x 10 images, all pairs", FEW, 0.86),
    ):
        for mean in ("totals", "categories"):
            if population is not FEW or mean == "totals":
                yield Case(
                    f"PCK, {name}, mean over {mean}", "coverage", coverage_of_pck(population, mean), 400, low, 1.0
                )
    for correlation, low in ((0.0, 0.92), (0.5, 0.91), (0.8, 0.88), (0.9, 0.84)):
        name = f"101 frames of a drive, autocorrelation {correlation}"
        yield Case(name, "coverage", coverage_of_drive(101, correlation), 1000, low, 1.0)
    yield Case("J&F, objects of 30 sequences", "coverage", coverage_of_objects(30), 1000, 0.92, 0.97)
    yield Case("J&F, objects of 8 sequences", "coverage", coverage_of_objects(8), 1000, 0.91, 0.98)
    yield Case("error of depth, 50 images, mean", "coverage", coverage_of_errors(50, False), 1000, 0.91, 0.97)
    yield Case("error of depth, 50 images, root of squares", "coverage", coverage_of_errors(50, True), 1000, 0.91, 0.97)
    yield Case("share of hits 0.02, 80 items", "coverage", coverage_of_few_hits(80, 0.02), 1000, 0.90, 1.0)
    yield Case("mean of 3 seeds that differ, 80 images", "coverage", coverage_over_seeds(80, 3, 0.05), 1000, 0.91, 0.99)
    yield Case("mean of 3 seeds that do not, 80 images", "coverage", coverage_over_seeds(80, 3, 0.0), 1000, 0.92, 0.98)
    for classes in (11, 21, 150):
        for images, times in ((50, 600), (101, 500), (500, 300), (2000, 200)):
            times = times if classes < 150 else times // 2
            name = f"{classes} classes x {images} images"
            yield Case(f"mIoU, {name}", "level", level_of_miou(classes, images), times, 0.0, 0.06)
            yield Case(f"by class after Holm, {name}", "level", level_by_class(classes, images), times, 0.0, 0.06)
    yield Case("PCK, 18 x 25 images, 100 pairs each", "level", level_of_pck(SPARSE), 400, 0.0, 0.07)
    yield Case("PCK, 10 x 10 images, all pairs", "level", level_of_pck(DENSE), 400, 0.0, 0.08)
    for correlation, high in ((0.0, 0.06), (0.5, 0.08), (0.8, 0.10)):
        name = f"101 frames of a drive, autocorrelation {correlation}"
        yield Case(name, "level", level_of_drive(101, correlation), 1000, 0.0, high)
    yield Case("J&F, objects of 30 sequences", "level", level_of_objects(30), 1000, 0.02, 0.06)
    yield Case("3 seeds that differ, 80 images", "level", level_over_seeds(80, 3, 0.05), 1000, 0.0, 0.07)


def table(times: Callable[[Case], int] | None = None) -> Iterator[str]:
    """Lines of the table in Markdown: what was simulated, nominal and measured share, error of the simulation."""
    for kind, title in (("coverage", "Coverage of 95 % intervals"), ("level", "Level of tests at p < 0.05")):
        yield f"| {title} | nominal | measured | error | samples |"
        yield "| --- | ---: | ---: | ---: | ---: |"
        for case in cases():
            if case.kind == kind:
                count = times(case) if times else case.times
                share, error = case.measure(count)
                values = " | ".join(f"{100 * value:.1f} %" for value in (case.nominal, share, error))
                yield f"| {case.name} | {values} | {count} |"
        yield ""
