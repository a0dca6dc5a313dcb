"""The normalised cut of an image's patches into two sides, after TokenCut (Wang et al., CVPR 2022, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh
from scipy.sparse.linalg import ArpackError, eigsh

WEAK = 1e-5  # weight of the edge between patches that are not alike


RESIDUAL, GAP = 1e-10, 1e-6  # of eigenvectors of unit length, and of eigenvalues, that iteration may leave


DENSE = 64  # patches below which the dense solver is as fast


TIE = 1e-6  # relative difference of values that count as equal


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

    x is D^-1/2 times the second largest eigenvector of D^-1/2 W D^-1/2, which Lanczos iteration finds in a seventh of
    the time of a dense solver. That takes over where the residual is not small, or where the third is as large: any
    mixture of the two is a solution then, and iteration would find another one each time.
    """
    if len(weights) < 2:
        return np.zeros(len(weights))
    scale = 1 / np.sqrt(weights.sum(1))
    scaled = scale[:, None] * weights * scale
    vector = _iterated(scaled) if len(scaled) >= DENSE else None
    if vector is None:
        vector = eigh(scaled, subset_by_index=[len(scale) - 2, len(scale) - 1])[1][:, 0]
    return scale * vector


def _iterated(matrix: np.ndarray) -> np.ndarray | None:
    """The eigenvector of the second largest eigenvalue; None where iteration does not settle it."""
    start = np.random.default_rng(0).normal(size=len(matrix))  # the same for every run
    try:
        values, vectors = eigsh(matrix, k=3, which="LA", v0=start)
    except ArpackError:
        return None
    residual = np.linalg.norm(matrix @ vectors - vectors * values, axis=0).max()
    order = np.argsort(values)
    third, second = values[order[:2]]
    return vectors[:, order[1]] if residual <= RESIDUAL and second - third > GAP else None


def cut(features: np.ndarray, tau: float) -> Cut:
    """Cut patches (D, h, w) at the mean of the second eigenvector; the side of the largest value is inside.

    Of values that are equal but for rounding the first one is the seed, so that no solver decides.
    """
    size = features.shape[1:]
    vector = second_eigenvector(affinity(features, tau))
    inside = vector > vector.sum() / len(vector)
    seed = int((np.abs(vector) >= np.abs(vector).max() * (1 - TIE)).argmax())
    if not inside[seed]:
        vector, inside = -vector, ~inside
    row, column = divmod(seed, size[1])
    return Cut(vector.reshape(size), inside.reshape(size), (row, column))
