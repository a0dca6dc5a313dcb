"""The two probes, which predict the pixel labels of patches, each with a grid of constants to select from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from neco_bench.tasks.patch_probe.knn import nearest_rows, vote
from neco_bench.tasks.patch_probe.logistic import Logistic, fit_logistic
from neco_bench.tasks.patch_probe.patches import Patches
from neco_bench.tasks.patch_probe.settings import Settings
from torch import Tensor

from neco_bench.core.task import Context


class KnnProbe:
    """Predict the most frequent label of the k nearest patches for each pixel of a block.

    Points of the grid are (k, distance).
    """

    def __init__(self, settings: Settings, classes: int, device: torch.device) -> None:
        self.settings, self.classes, self.device = settings, classes, device

    def grid(self, fitted: Patches, queries: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Yield each point of the grid, and the blocks (Q, A) uint8 that it predicts for queries (Q, D)."""
        ks, distances = self.settings.ks, self.settings.distances
        # One search per distance for all k.
        rows = {d: nearest_rows(fitted.features, queries, max(ks), d, self.device) for d in distances}
        for k in ks:
            for distance in distances:
                yield (k, distance), self._vote(fitted, rows[distance][:, :k])

    def name(self, point: Any) -> str:
        """Name a point in results."""
        return "k={} {}".format(*point)

    def predict(self, fitted: Patches, queries: Tensor, point: Any) -> Tensor:
        """Predict blocks (Q, A) uint8 for queries (Q, D)."""
        k, distance = point
        return self._vote(fitted, nearest_rows(fitted.features, queries, k, distance, self.device))

    def _vote(self, fitted: Patches, rows: Tensor) -> Tensor:
        return vote(fitted, rows, self.classes, self.settings.void, self.device)


class LogisticProbe:
    """Multinomial logistic regression, with one class for a whole block; points are the inverse strengths C."""

    def __init__(self, settings: Settings, context: Context, device: torch.device) -> None:
        self.settings, self.context, self.device = settings, context, device

    def grid(self, fitted: Patches, queries: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Yield each C and its prediction."""
        for c in self.context.track(self.settings.regularisations, "select"):
            yield c, self._blocks(self._fit(fitted, c), fitted, queries)

    def name(self, point: Any) -> str:
        """Name a point in results."""
        return f"C={point:.4g}"

    def predict(self, fitted: Patches, queries: Tensor, point: Any) -> Tensor:
        """Predict blocks (Q, A) uint8 for queries (Q, D), and note how the fit ended."""
        model = self._fit(fitted, point)
        self.context.note(iterations=model.iterations, converged=model.converged)
        return self._blocks(model, fitted, queries)

    def _fit(self, fitted: Patches, c: float) -> Logistic:
        return fit_logistic(
            to_device(fitted.features, self.device),
            fitted.labels,
            c,
            max_iterations=self.settings.max_iterations,
            tolerance=self.settings.tolerance,
            device=self.device,
        )

    def _blocks(self, model: Logistic, fitted: Patches, queries: Tensor) -> Tensor:
        return model.predict(queries)[:, None].expand(-1, fitted.blocks.shape[1])


def to_device(features: Tensor, device: torch.device) -> Tensor:
    """Copy features to the device; if they do not fit, return them, so that parts are copied in every iteration."""
    try:
        return features.to(device)
    except torch.OutOfMemoryError:
        return features
