"""Populations with known true values, from which samples of per-item statistics are drawn. Vectorised over items."""

from __future__ import annotations

from functools import cache

import numpy as np

from neco_bench.metrics.segmentation import AbsentClasses
from neco_bench.metrics.sums import SumMetric, category_sums, class_iou_of_counts, mean_sums, miou_of_counts

Rng = np.random.Generator


class Scenes:
    """Images with regions of classes, as in segmentation: few classes are common and most are rare (Zipf).

    Difficulty differs between images and between regions; wrong pixels go to other classes, common ones more often.

    Args:
        classes: C.
        present: the mean number of classes in an image.
    """

    def __init__(self, classes: int, present: float) -> None:
        self.classes = classes
        low, high = 0.0, 1e4
        for _ in range(60):  # the factor at which `present` classes are expected in an image
            factor = (low + high) / 2
            share = np.minimum(0.95, factor / np.arange(1, classes + 1))
            low, high = (factor, high) if share.sum() < present else (low, factor)
        self.share = share
        skill = np.clip(np.random.default_rng(5).normal(0.6, 0.2, classes), 0.1, 0.95)
        self.logit = np.log(skill / (1 - skill))

    def sample(self, rng: Rng, images: int, models: int = 1) -> list[np.ndarray]:
        """Counts (3, 1, images, C) of hits, union and truth of each model, which are alike on the same images."""
        on = rng.random((images, self.classes)) < self.share
        on[:, 0] |= ~on.any(1)
        image, label = np.nonzero(on)
        size = 1 + rng.gamma(1.0, 1000, len(image)).astype(int)
        truth = np.zeros((images, self.classes), np.int64)
        truth[image, label] = size
        ease = rng.normal(0, 0.5, images)[image]
        return [self._predicted(rng, truth, image, label, size, ease) for _ in range(models)]

    def _predicted(
        self, rng: Rng, truth: np.ndarray, image: np.ndarray, label: np.ndarray, size: np.ndarray, ease: np.ndarray
    ) -> np.ndarray:
        logits = self.logit[label] + ease + rng.normal(0, 0.7, len(image))
        right = np.rint(size / (1 + np.exp(-logits))).astype(int)
        hits, false = np.zeros_like(truth), np.zeros_like(truth)
        hits[image, label] = right
        for part in (0.6, 0.4):
            other = rng.choice(self.classes, len(image), p=self.share / self.share.sum())
            other = np.where(other == label, (other + 1) % self.classes, other)
            np.add.at(false, (image, other), ((size - right) * part).astype(int))
        return np.stack([hits, truth + false, truth])[:, None]

    @cache  # noqa: B019 (a few populations, for as long as the process lives)
    def truth(self) -> float:
        """The mIoU of the population, from 200,000 images."""
        rng, total = np.random.default_rng(99), np.zeros((3, self.classes))
        for _ in range(40):
            total += self.sample(rng, 5000)[0].sum((1, 2))
        return float((total[0] / total[1]).mean())


@cache
def scenes(classes: int) -> Scenes:
    """As many classes as CamVid (11), VOC (21) and ADE20K (150), with as many of them in an image."""
    return Scenes(classes, {11: 8.0, 21: 2.5, 150: 9.0}[classes])


def miou(counts: np.ndarray, absent: AbsentClasses) -> SumMetric:
    """The mIoU of a sample."""
    return miou_of_counts(counts, absent)


def class_ious(counts: np.ndarray) -> SumMetric:
    """The IoU of each class of a sample."""
    return class_iou_of_counts(counts)


class Pairs:
    """Pairs of images within categories, whose points are found the more often the easier their two images are.

    Args:
        categories: their number.
        images: of each category.
        pairs: of each category; None takes all ordered ones.
        spread: of the ease of images.
    """

    def __init__(self, categories: int, images: int, pairs: int | None, spread: float) -> None:
        self.categories, self.images, self.pairs, self.spread = categories, images, pairs, spread
        self.level = np.random.default_rng(3).normal(0, 0.7, categories)

    def sample(self, rng: Rng, mean: str, models: int = 1) -> tuple[list[SumMetric], np.ndarray]:
        """The PCK of each model, and the two images (n, 2) of each pair."""
        first, second = np.nonzero(~np.eye(self.images, dtype=bool))
        category, a, b = [], [], []
        for number in range(self.categories):
            chosen = np.arange(len(first))
            if self.pairs is not None:
                chosen = rng.choice(len(first), self.pairs, replace=False)
            category.append(np.full(len(chosen), number))
            a.append(number * self.images + first[chosen])
            b.append(number * self.images + second[chosen])
        of_pair, images = np.concatenate(category), np.stack([np.concatenate(a), np.concatenate(b)], 1)
        totals = rng.integers(4, 12, len(of_pair))
        sums = []
        for _ in range(models):
            ease = rng.normal(0, self.spread, self.categories * self.images)
            logits = self.level[of_pair] + ease[images].sum(1) + rng.normal(0, 0.5, len(of_pair))
            hits = rng.binomial(totals, 1 / (1 + np.exp(-logits)))
            sums.append(category_sums(hits, totals, of_pair, mean=mean))
        return sums, images

    @cache  # noqa: B019
    def truth(self) -> float:
        """The mean over categories; pairs are as many in each, so that it is that over points too."""
        noise = np.random.default_rng(1).normal(0, np.hypot(np.sqrt(2) * self.spread, 0.5), (100_000, 1))
        return float((1 / (1 + np.exp(-(self.level + noise)))).mean())


def drive(rng: Rng, frames: int, correlation: float) -> np.ndarray:
    """Scores around 0.5 of frames in a row, of lag-one autocorrelation `correlation` (AR 1)."""
    noise, values = rng.normal(0, 1, frames), np.empty(frames)
    values[0] = noise[0]
    for t in range(1, frames):
        values[t] = correlation * values[t - 1] + np.sqrt(1 - correlation**2) * noise[t]
    return 0.5 + 0.05 * values


def objects(rng: Rng, sequences: int, models: int = 1) -> tuple[list[SumMetric], np.ndarray]:
    """J&F of one to five objects in each sequence, which are alike within one, and the sequence of each; truth 0.6."""
    number = rng.integers(1, 6, sequences)
    group = np.repeat(np.arange(sequences), number)
    hard = rng.normal(0, 0.12, sequences)[group]
    scores = [0.6 + hard + rng.normal(0, 0.1, len(group)) for _ in range(models)]
    return [mean_sums(np.clip(score, 0, 1)) for score in scores], group
