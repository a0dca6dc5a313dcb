"""PCK: the share of keypoints matched within a threshold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pck_hits(errors: np.ndarray, thresholds: Sequence[float], *, strict: bool) -> np.ndarray:
    """Return the number (T,) of errors (P,) below each threshold: < if strict, else <=. Both in the same unit."""
    limits = np.asarray(thresholds)[:, None]
    return (errors < limits if strict else errors <= limits).sum(1)


def pck_averages(hits: np.ndarray, totals: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """Return the PCK by four averages, from hits and points per pair, (n,) each, and the class (n,) of each pair.

    points: over all points. pairs: mean of the pairs' rates. class_mean: mean of the classes' rates over their points.
    pair_weighted: the same, classes weighted by their number of pairs.
    """
    _, group, pairs = np.unique(classes, return_inverse=True, return_counts=True)
    rates = np.bincount(group, hits) / np.bincount(group, totals)
    return {
        "points": float(hits.sum() / totals.sum()),
        "pairs": float(np.mean(hits / totals)),
        "class_mean": float(np.mean(rates)),
        "pair_weighted": float(np.average(rates, weights=pairs)),
    }


def box_side(box: Sequence[float]) -> float:
    """Return the longest side of (x1, y1, x2, y2)."""
    return max(box[2] - box[0], box[3] - box[1])
