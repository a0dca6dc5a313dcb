"""The normalised cut of an image's patches into two parts, as in TokenCut (Wang et al., CVPR 2022, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh
from scipy.sparse.linalg import ArpackError, eigsh

# For estimates of cost: approximate number of products with the graph for a cut.
LANCZOS = 60

DENSE = 64  # number of patches below which the dense solver is as fast

RESIDUAL = 1e-10  # maximum residual of an eigenvector of unit length


@dataclass(frozen=True)
class Cut:
    """Two parts of an image.

    vector: (h, w) second eigenvector. inside: (h, w) bool, the part that contains the seed. seed: row and column of the
    patch with the largest absolute value.
    """

    vector: np.ndarray
    inside: np.ndarray
    seed: tuple[int, int]


def affinity(features: np.ndarray, tau: float) -> np.ndarray:
    """Return the weights (N, N) of edges between patches (D, h, w): 1 if their cosine is above `tau`, else 1e-5."""
    rows = features.reshape(len(features), -1).T
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return np.where(rows @ rows.T > tau, 1.0, 1e-5)


def second_eigenvector(weights: np.ndarray) -> np.ndarray:
    """Solve (D - W) x = λ D x for the second smallest λ: x (N,) of a symmetric graph W (N, N), x' D x = 1.

    x is D^-1/2 times the second largest eigenvector of D^-1/2 W D^-1/2. Lanczos iteration takes a seventh of the time
    of the dense solver, which is used if the iteration does not converge, or if the second and third eigenvalues are
    equal: then every combination of their eigenvectors is a solution, and the iteration would not be reproducible.
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
    """Return the eigenvector of the second largest eigenvalue by Lanczos iteration; None if it is not determined."""
    start = np.random.default_rng(0).normal(size=len(matrix))  # the same for every run
    try:
        values, vectors = eigsh(matrix, k=3, which="LA", v0=start)
    except ArpackError:
        return None
    residual = np.linalg.norm(matrix @ vectors - vectors * values, axis=0).max()
    order = np.argsort(values)
    third, second = values[order[:2]]
    return vectors[:, order[1]] if residual <= RESIDUAL and second - third > 1e-6 else None


def cut(features: np.ndarray, tau: float) -> Cut:
    """Cut patches (D, h, w) at the mean of the second eigenvector; the part with the largest absolute value is inside.

    Among values that are equal up to rounding, the first is the seed, so that it does not depend on the solver.
    """
    size = features.shape[1:]
    vector = second_eigenvector(affinity(features, tau))
    inside = vector > vector.sum() / len(vector)
    seed = int((np.abs(vector) >= np.abs(vector).max() * (1 - 1e-6)).argmax())
    if not inside[seed]:
        vector, inside = -vector, ~inside
    row, column = divmod(seed, size[1])
    return Cut(vector.reshape(size), inside.reshape(size), (row, column))
