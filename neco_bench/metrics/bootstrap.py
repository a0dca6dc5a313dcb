"""The interval of a mean, under the name used by plug-in task families. New code should use `metrics.intervals`."""

from __future__ import annotations

import numpy as np

from neco_bench.metrics.intervals import Bounds, mean_interval


def bootstrap_mean(values: np.ndarray, *, seed: int = 0) -> Bounds | None:
    """Return (low, high) of the mean of `values` (n,), one per image. Nothing is drawn: `seed` is not used."""
    return mean_interval(values)
