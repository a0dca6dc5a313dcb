"""One box for an image from its features: TokenCut (Wang et al., CVPR 2022) and LOST (Simeoni et al., BMVC 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from neco_bench.tasks.normalised_cut import cut
from scipy import ndimage


@dataclass(frozen=True)
class Discovery:
    """cells: (top, left, bottom, right) of the box, the last two outside. region: (h, w) bool, the patches it encloses.
    score: (h, w) what `show` draws, larger for the object. seed: row and column."""

    cells: tuple[int, int, int, int]
    region: np.ndarray
    score: np.ndarray
    seed: tuple[int, int]


def tokencut(features: np.ndarray, tau: float) -> Discovery:
    """Take the component of the cut's side that holds its seed; features (D, h, w)."""
    found = cut(features, tau)
    sign = 1 if found.vector[found.seed] > 0 else -1
    return _around(found.inside, sign * found.vector, found.seed)


def lost(features: np.ndarray, patches: int) -> Discovery:
    """Grow the patch with the fewest similar ones, and take its component; features (D, h, w), not normalised.

    Two patches are similar where their inner product is positive. The seed is the patch with the fewest, the first of
    equal ones. Of the `patches` with the fewest, those similar to the seed vote: a patch is in the region where its
    products with them sum to more than 0.
    """
    size = features.shape[1:]
    rows = features.reshape(len(features), -1).T
    products = rows @ rows.T
    similar = products > 0
    np.fill_diagonal(similar, False)
    degree = similar.sum(1)
    order = np.argsort(degree, kind="stable")
    seed = int(order[0])
    voters = order[:patches][products[seed, order[:patches]] > 0]
    inside = (products[voters].sum(0) > 0).reshape(size)
    row, column = divmod(seed, size[1])
    return _around(inside, -degree.reshape(size).astype(np.float64), (row, column))


def _around(inside: np.ndarray, score: np.ndarray, seed: tuple[int, int]) -> Discovery:
    """Box the component, of four neighbours, that holds the seed; the seed's own cell where the seed is outside."""
    components, _ = ndimage.label(inside)
    region = components == components[seed] if inside[seed] else np.zeros_like(inside)
    region[seed] = True
    rows, columns = np.nonzero(region)
    cells = (int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1)
    return Discovery(cells, region, score, seed)


def box_iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compute the IoU of a box (4,) with each of others (n, 4), (x1, y1, x2, y2) with x2 and y2 outside: (n,)."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    overlap = np.clip(high - low, 0, None).prod(1)
    areas = (others[:, 2:] - others[:, :2]).prod(1)
    return overlap / ((box[2:] - box[:2]).prod() + areas - overlap)
