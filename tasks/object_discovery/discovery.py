"""Discovery of one box per image from its features: TokenCut (Wang et al., CVPR 2022), LOST (Simeoni et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from neco_bench.tasks.normalised_cut import cut
from scipy import ndimage


@dataclass(frozen=True)
class Discovery:
    """A box around one region of patches.

    cells: (top, left, bottom, right) of the box, the last two exclusive. region: (h, w) bool, the patches of the
    region. score: (h, w), larger for the object, for `show`. seed: row and column of a patch of the object.
    """

    cells: tuple[int, int, int, int]
    region: np.ndarray
    score: np.ndarray
    seed: tuple[int, int]


def tokencut(features: np.ndarray, tau: float) -> Discovery:
    """Return the component of the normalised cut that contains its seed; features (D, h, w)."""
    parts = cut(features, tau)
    sign = 1 if parts.vector[parts.seed] > 0 else -1
    return _around(parts.inside, sign * parts.vector, parts.seed)


def lost(features: np.ndarray, patches: int) -> Discovery:
    """Return the region grown from the patch with the lowest degree; features (D, h, w), not normalised.

    Two patches are similar if their inner product is positive; the degree of a patch is the number of similar patches.
    The seed is the patch with the lowest degree, the first in a tie. Of the `patches` patches with the lowest degree,
    those similar to the seed vote: a patch is in the region if the sum of its inner products with them is positive.
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
    """Return the box around the component (of four neighbours) that contains the seed; around the seed alone if it is
    not inside."""
    components, _ = ndimage.label(inside)
    region = components == components[seed] if inside[seed] else np.zeros_like(inside)
    region[seed] = True
    rows, columns = np.nonzero(region)
    cells = (int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1)
    return Discovery(cells, region, score, seed)


def box_iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compute the IoU of a box (4,) with each of others (n, 4), (x1, y1, x2, y2) with exclusive x2 and y2: (n,)."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    overlap = np.clip(high - low, 0, None).prod(1)
    areas = (others[:, 2:] - others[:, :2]).prod(1)
    return overlap / ((box[2:] - box[:2]).prod() + areas - overlap)
