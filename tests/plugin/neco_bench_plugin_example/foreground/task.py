"""Foreground share: ridge regression from the mean patch feature of an image to its share of foreground pixels.

Scored by the share of val images that it is right about within a tolerance. Void pixels do not count at all.
"""

from __future__ import annotations

import numpy as np
from pydantic import PositiveFloat

from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.core.task import Context, Outcome
from neco_bench.data.base import IGNORE, SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.transforms import ResizeSquare
from neco_bench.metrics.intervals import mean_interval


class Settings(BaseSettings):
    """penalty of the ridge on standardised features; tolerance as a share of the image."""

    penalty: PositiveFloat
    tolerance: PositiveFloat


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """Share of the images of data["val"] predicted to within the tolerance, fitted on data["train"]."""
    size = settings.input_size_for(encoder.stride)
    extractor = FeatureExtractor(encoder, context, mean=settings.mean, std=settings.std)
    (x, y), (x_val, y_val) = (_pooled(extractor, data[split], size) for split in ("train", "val"))
    with context.phase("fit"):
        centre, spread = x.mean(0), x.std(0) + 1e-6
        x, x_val = (x - centre) / spread, (x_val - centre) / spread
        weights = np.linalg.solve(x.T @ x + settings.penalty * np.eye(x.shape[1]), x.T @ (y - y.mean()))
    errors = np.abs(np.clip(x_val @ weights + y.mean(), 0, 1) - y_val)
    hits = errors <= settings.tolerance
    return Outcome(
        metrics={"within_tolerance": float(hits.mean()), "mean_error": float(errors.mean())},
        per_class={},
        ci95={"within_tolerance": mean_interval(hits)},
        n_images=len(hits),
        statistics={"error": errors, "share": y_val},
        features={"input_size": settings.input_size, "used_size": size, "resize": "squash", "final_norm": True},
    )


def _pooled(extractor: FeatureExtractor, dataset: SegmentationDataset, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, D) mean patch features and (n,) foreground shares of a split, float64."""
    features, shares = [], []
    for batch in extractor.stream(dataset, ResizeSquare(size, "native"), dataset.split):
        features.append(batch.features.mean((2, 3)).double().cpu().numpy())
        shares += [(mask[mask != IGNORE] > 0).mean() for mask in batch.masks]
    return np.concatenate(features), np.array(shares)
