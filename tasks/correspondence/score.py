"""The PCK of matched pairs: averages over points, pairs and categories, and the Outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from neco_bench.tasks.correspondence.settings import Settings

from neco_bench.core import distributed
from neco_bench.core.task import Context, Outcome
from neco_bench.data.base import Pair, PairDataset
from neco_bench.metrics.pck import box_side, pck_averages, pck_hits

# Groups of pairs by name; the primary metric is that of the group "".
Groups = Mapping[str, Sequence[Pair]]

# Averages that are reported in addition to the primary one; none if pairs are drawn, as in the reference.
BESIDE = {
    "points": ("class_mean", "pairs"),
    "pairs": ("points", "class_mean"),
    "class_mean": ("pair_weighted", "points", "pairs"),
}

SUFFIX = {
    "points": "per_point",
    "pairs": "per_image",
    "class_mean": "per_class_mean",
    "pair_weighted": "pair_weighted",
}


class PairScore:
    """Hits of the matched points of each pair, at each threshold of the protocol.

    With several processes, the categories are divided among them, and all get the same outcome. Predictions of the
    pairs that `show` draws are recorded.
    """

    def __init__(self, dataset: PairDataset, settings: Settings, context: Context) -> None:
        self.dataset, self.settings, self.context = dataset, settings, context
        self._hits: dict[str, np.ndarray] = {}
        self._totals: dict[str, int] = {}

    def add(self, pair: Pair, points: np.ndarray, errors: np.ndarray) -> None:
        """Count one pair: predicted points (P, 2), (x, y) pixels of the target image, and their errors (P,) there."""
        side = box_side(pair.target_box)
        limits = [alpha * side for alpha in self.settings.alphas]
        self._hits[pair.id] = pck_hits(errors, limits, strict=self.settings.strict)
        self._totals[pair.id] = len(errors)
        self.context.record(pair.id, points=points, errors=errors, side=side)

    def outcome(self, groups: Sequence[Groups], *, used_size: int) -> Outcome:
        """Return the outcome: the PCK of each group of pairs.

        Args:
            groups: the groups of each category.
            used_size: side of the inputs in pixels.
        """
        for hits, totals in distributed.gather((self._hits, self._totals)):
            self._hits |= hits
            self._totals |= totals
        metrics: dict[str, float] = {}
        per_class: dict[str, dict[str, float | None]] = {}
        statistics: dict[str, np.ndarray] = {}
        for name in dict.fromkeys(name for of_category in groups for name in of_category):
            members = [pair for of_category in groups for pair in of_category.get(name, ())]
            if not members:
                continue
            arrays = self._arrays(members)
            totals, category = arrays["totals"], arrays["category"]
            for column, alpha in enumerate(self.settings.alphas):
                key, hits = f"PCK@{alpha:.2f}{name}", arrays["hits"][:, column]
                metrics |= self._averages(key, hits, totals, category)
                per_class[key] = self._by_category(hits, totals, category)
            if name == "":
                statistics = arrays | {"pair_id": np.array([pair.id for pair in members])}
        self.context.note(
            pairs=len(statistics["totals"]),
            keypoints=int(statistics["totals"].sum()),
            pairs_evaluated=len(self._hits),
        )
        return Outcome(
            metrics=metrics,
            per_class=per_class,
            ci95={},  # the runner computes them from the statistics
            n_images=len(statistics["totals"]),
            statistics=statistics,
            features={
                "input_size": self.settings.input_size,
                "used_size": used_size,
                "resize": self.settings.geometry,
                "final_norm": self.settings.final_norm,
            },
        )

    @property
    def _categories(self) -> list[str]:
        return sorted({pair.category for pair in self.dataset.pairs})

    def _arrays(self, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
        """Return arrays over pairs: hits at each threshold, number of points, index of the category and the images."""
        numbers = {name: i for i, name in enumerate(self.dataset.image_ids)}
        categories = {name: i for i, name in enumerate(self._categories)}
        return {
            "hits": np.stack([self._hits[pair.id] for pair in pairs]),
            "totals": np.array([self._totals[pair.id] for pair in pairs]),
            "category": np.array([categories[pair.category] for pair in pairs]),
            "images": np.array([(numbers[pair.source_id], numbers[pair.target_id]) for pair in pairs], np.int32),
        }

    def _averages(self, key: str, hits: np.ndarray, totals: np.ndarray, category: np.ndarray) -> dict[str, float]:
        """Return the primary average as `key`, and the additional ones."""
        average = self.settings.average_used
        beside = BESIDE[average] if self.settings.pairs_per_bin is None else ()
        values = pck_averages(hits, totals, category)
        return {key: values[average], **{f"{key}_{SUFFIX[other]}": values[other] for other in beside}}

    def _by_category(self, hits: np.ndarray, totals: np.ndarray, category: np.ndarray) -> dict[str, float | None]:
        """Return the PCK of each category, None for a category without pairs."""
        rates: dict[str, float | None] = dict.fromkeys(self._categories)
        for number in np.unique(category):
            own = category == number
            values = pck_averages(hits[own], totals[own], category[own])
            rates[self._categories[number]] = values["pairs" if self.settings.average_used == "pairs" else "points"]
        return rates
