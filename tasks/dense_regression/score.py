"""Errors of predicted depth and normals by image and region, and the Outcome."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from neco_bench.tasks.dense_regression.inputs import region_slices
from neco_bench.tasks.dense_regression.settings import Settings

from neco_bench.core import distributed
from neco_bench.core.task import Context, Outcome
from neco_bench.data.dense import DenseDataset
from neco_bench.metrics.dense import DEPTH_METRICS, NORMAL_METRICS, depth_errors, normal_errors

# Eigen's region of NYU frames, of 480 x 640: rows and columns.
EIGEN = ((45, 471), (41, 601))

# Garg's region of KITTI frames, in shares of height and width (Garg et al., ECCV 2016).
GARG = ((0.40810811, 0.99189189), (0.03594771, 0.96405229))


def region_of(region: str, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Return rows and columns of "full", "eigen" (of NYU, scaled) or "garg" (of KITTI) in a frame (H, W)."""
    if region == "eigen":
        return region_slices(EIGEN, shape)
    if region == "garg":
        rows, columns = (slice(*(int(end * side) for end in ends)) for ends, side in zip(GARG, shape[:2], strict=True))
        return rows, columns
    return slice(None), slice(None)


class RegressionScore:
    """Errors of the images of a data set, for one or several heads.

    With several processes, each adds the images that it has predicted, and all get the same outcome. Images without a
    pixel to score are left out.
    """

    def __init__(self, dataset: DenseDataset, settings: Settings, context: Context) -> None:
        self.dataset, self.settings, self.context = dataset, settings, context
        self.names = DEPTH_METRICS if settings.target == "depth" else NORMAL_METRICS
        self._values: dict[int, np.ndarray] = {}  # by item: (heads, regions, metrics)

    def add(self, item: int, truth: np.ndarray, predictions: np.ndarray, image: Callable[[], np.ndarray]) -> None:
        """Compare the predictions of one image by all heads.

        Args:
            item: its index in the data set.
            truth: (H, W) or (H, W, 3).
            predictions: (heads, H, W) or (heads, H, W, 3).
            image: returns the frame (H, W, 3) for `show`.
        """
        s = self.settings
        is_depth = s.target == "depth"
        valid: np.ndarray = (truth > s.min_depth) & (truth < s.max_depth) if is_depth else np.any(truth != 0, axis=2)
        compare = depth_errors if is_depth else normal_errors
        rows = []
        for prediction in predictions:
            used = np.clip(prediction, s.min_depth, s.max_depth) if is_depth else prediction
            regions = []
            for region in s.regions:
                place = region_of(region, valid.shape)
                own = valid[place]
                regions.append(list(compare(used[place][own], truth[place][own]).values()))
            rows.append(regions)
        self._values[item] = np.array(rows)
        self.context.record(
            self.dataset.ids[item],
            truth=np.where(valid if is_depth else valid[..., None], truth, 0),
            prediction=predictions,
            image=image,
            values=self._values[item][:, 0],
        )

    @cached_property
    def values(self) -> np.ndarray:
        """Values (heads, images, regions, metrics) of all processes, in order. Nothing can be added afterwards."""
        for own in distributed.gather(self._values):
            self._values |= own
        return np.stack([self._values[item] for item in sorted(self._values)], 1)

    def best(self, metric: str) -> int:
        """Return the head with the lowest mean of a metric in the first region."""
        means = np.nanmean(self.values[:, :, 0, self.names.index(metric)], axis=1)
        return int(np.nanargmin(means)) if not np.isnan(means).all() else 0

    def outcome(self, head: int, features: dict[str, Any]) -> Outcome:
        """Return the outcome of a head: metrics are means over the images that have pixels in the region.

        Args:
            head: index of the head.
            features: how inputs were prepared.
        """
        values, s = self.values[head], self.settings
        items = np.array(sorted(self._values))
        scored = ~np.isnan(values[:, 0, 0])
        metrics = {name: _mean(values[:, 0, i]) for i, name in enumerate(self.names)}
        if len(s.regions) > 1:
            for place, region in enumerate(s.regions):
                metrics |= {f"{name}/{region}": _mean(values[:, place, i]) for i, name in enumerate(self.names)}
        for shown in self.context.run.predictions.values():
            own = dict(zip(self.names, shown["values"][head].tolist(), strict=True))
            shown |= {"prediction": shown["prediction"][head], "values": own}
        self.context.note(scored_images=int(scored.sum()))
        return Outcome(
            metrics=metrics,
            per_class={},
            ci95={},
            n_images=int(scored.sum()),
            statistics={
                "item_id": np.array([self.dataset.ids[i] for i in items[scored]]),
                **{f"score/{name}": values[scored, 0, i] for i, name in enumerate(self.names)},
            },
            features=features,
        )


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
