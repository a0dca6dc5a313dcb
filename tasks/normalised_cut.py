"""The normalised cut of an image's patches into two sides, after TokenCut (Wang et al., CVPR 2022, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh
from scipy.sparse.linalg import ArpackError, eigsh

WEAK = 1e-5  # weight of the edge between patches that are not alike


RESIDUAL = 1e-10  # of an eigenvector of unit length found by iteration; the dense solver takes over above it


@dataclass(frozen=True)
class Cut:
    """vector: (h, w) second eigenvector. inside: (h, w) bool, the side with the seed. seed: row and column of the patch
    of the largest absolute value."""

    vector: np.ndarray
    inside: np.ndarray
    seed: tuple[int, int]


def affinity(features: np.ndarray, tau: float) -> np.ndarray:
    """Weigh the edges between patches (D, h, w): (N, N) float64, 1 where the cosine is above `tau`, else 1e-5."""
    rows = features.reshape(len(features), -1).T
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return np.where(rows @ rows.T > tau, 1.0, WEAK)


def second_eigenvector(weights: np.ndarray) -> np.ndarray:
    """Solve (D - W) x = λ D x for the second smallest λ: x (N,) of a symmetric graph W (N, N), x' D x = 1.

    x is D^-1/2 times the second largest eigenvector of D^-1/2 W D^-1/2, which Lanczos iteration finds in a tenth of the
    time of a dense solver; that takes over where the residual is not small.
    """
    if len(weights) < 2:
        return np.zeros(len(weights))
    scale = 1 / np.sqrt(weights.sum(1))
    scaled = scale[:, None] * weights * scale
    try:
        start = np.random.default_rng(0).normal(size=len(scale))  # the same for every run
        values, vectors = eigsh(scaled, k=2, which="LA", v0=start) if len(scale) > 2 else (None, None)
    except ArpackError:
        values, vectors = None, None
    if vectors is None or np.linalg.norm(scaled @ vectors - vectors * values, axis=0).max() > RESIDUAL:
        values, vectors = eigh(scaled, subset_by_index=[len(scale) - 2, len(scale) - 1])
    return scale * vectors[:, np.argsort(values)[0]]


def cut(features: np.ndarray, tau: float) -> Cut:
    """Cut patches (D, h, w) at the mean of the second eigenvector; the side of the largest value is inside."""
    size = features.shape[1:]
    vector = second_eigenvector(affinity(features, tau))
    inside = vector > vector.sum() / len(vector)
    seed = int(np.abs(vector).argmax())
    if not inside[seed]:
        vector, inside = -vector, ~inside
    row, column = divmod(seed, size[1])
    return Cut(vector.reshape(size), inside.reshape(size), (row, column))
