"""Errors of depth and surface normals for one image; scores of data sets are means over images. Pure numpy.

Depth: Eigen, Puhrsch and Fergus, NeurIPS 2014. Normals: Fouhey, Gupta and Hebert, ICCV 2013.
"""

from __future__ import annotations

import numpy as np

DEPTH_METRICS = ("rmse", "abs_rel", "sq_rel", "log10", "rmse_log", "silog", "d1", "d2", "d3")

LIMITS = (11.25, 22.5, 30.0)  # degrees

NORMAL_METRICS = ("mean_angle", "median_angle", "rmse_angle", *(f"within_{limit:g}" for limit in LIMITS))


def depth_errors(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Compare depths (n,) of the scored pixels, both above 0, in metres.

    Returns:
        Values by the names of DEPTH_METRICS: rmse (metres); abs_rel and sq_rel, the absolute and squared difference
        divided by the true depth; log10 (mean) and rmse_log (natural logarithm) of the ratio; silog, 100 times the
        standard deviation of the logarithm of the ratio; d1 to d3, shares of pixels whose ratio, or its inverse, is
        below 1.25, 1.25² and 1.25³. All are NaN without pixels.

    >>> depth_errors(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 2.0]))["d1"]
    0.6666666666666666
    """
    if not len(truth):
        return dict.fromkeys(DEPTH_METRICS, float("nan"))
    p, d = prediction.astype(np.float64), truth.astype(np.float64)
    difference, log = p - d, np.log(p) - np.log(d)
    ratio = np.maximum(p / d, d / p)
    values = (
        np.sqrt(np.mean(difference**2)),
        np.mean(np.abs(difference) / d),
        np.mean(difference**2 / d),
        np.mean(np.abs(log)) / np.log(10),
        np.sqrt(np.mean(log**2)),
        100 * np.std(log),
        *(np.mean(ratio < 1.25**power) for power in (1, 2, 3)),
    )
    return dict(zip(DEPTH_METRICS, map(float, values), strict=True))


def normal_errors(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Compare directions (n, 3), of any length above 0, of the scored pixels.

    Returns:
        Values by the names of NORMAL_METRICS: mean, median and root mean square of the angle between the two, in
        degrees, and shares of pixels with an angle below LIMITS. All are NaN without pixels.

    >>> normal_errors(np.array([[1.0, 0, 0], [0, 2, 0]]), np.array([[1.0, 0, 0], [1, 0, 0]]))["mean_angle"]
    45.0
    """
    if not len(truth):
        return dict.fromkeys(NORMAL_METRICS, float("nan"))
    angle = angles(prediction, truth)
    values = (np.mean(angle), np.median(angle), np.sqrt(np.mean(angle**2)), *(np.mean(angle < a) for a in LIMITS))
    return dict(zip(NORMAL_METRICS, map(float, values), strict=True))


def angles(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the angle (...) in degrees between directions (..., 3); 90 if one has length 0."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    length = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = np.divide((a * b).sum(-1), length, out=np.zeros(length.shape), where=length > 0)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))
