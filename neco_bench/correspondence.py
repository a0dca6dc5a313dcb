"""Semantic correspondence: match keypoints between feature maps, score them by PCK. Pure functions.

Points are (P, 2) float (x, y), x right, y down. Maps are (D, h, w).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neco_bench.data.base import Pair


def nearest_cells(
    source: Tensor, target: Tensor, grid: Tensor, *, align_corners: bool, valid: Tensor | None = None
) -> Tensor:
    """(P, 2) int64 (column, row) of the target cell most similar (cosine) to the source feature at each point.

    grid: (P, 2) points in [-1, 1] of the source map, sampled bilinearly with `align_corners`. valid: (h, w) bool, the
    target cells that may be chosen. Ties go to the first cell in row-major order.
    """
    source, target = F.normalize(source, dim=0), F.normalize(target, dim=0)
    points = F.grid_sample(
        source[None], grid.to(source)[None, None], mode="bilinear", padding_mode="border", align_corners=align_corners
    )[0, :, 0].T
    similarity = points @ target.flatten(1)
    if valid is not None:
        similarity = similarity.masked_fill(~valid.flatten().to(similarity.device), -torch.inf)
    return peak_cells(similarity.unflatten(1, target.shape[1:]))


def cell_similarity(source: Tensor, target: Tensor, cells: Tensor) -> Tensor:
    """(P, h, w) cosine between the source features at `cells`, (P, 2) int64 (column, row), and every target cell."""
    source, target = F.normalize(source, dim=0), F.normalize(target, dim=0)
    points = source[:, cells[:, 1], cells[:, 0]].T
    return (points @ target.flatten(1)).unflatten(1, target.shape[1:])


def peak_cells(similarity: Tensor) -> Tensor:
    """(P, 2) int64 (column, row) of the largest of each (h, w); ties go to the first cell in row-major order."""
    best, width = similarity.flatten(1).argmax(1), similarity.shape[2]
    return torch.stack([best % width, best // width], dim=1)


def window_softargmax(similarity: Tensor, half_window: int, temperature: float) -> Tensor:
    """(P, 2) float (column, row): mean cell under the softmax of similarity (P, h, w) / temperature.

    The window around each peak has (2 half_window + 1)^2 cells, fewer at the border. Outside it similarities are 0 and
    not -inf, so every cell of the map keeps some weight: a quirk of GeoAware-SC (Zhang et al., CVPR 2024).
    """
    peaks = peak_cells(similarity)
    rows, columns = (torch.arange(side, device=similarity.device) for side in similarity.shape[1:])
    inside_rows = (rows - peaks[:, 1:]).abs() <= half_window
    inside_columns = (columns - peaks[:, :1]).abs() <= half_window
    kept = similarity * (inside_rows[:, :, None] & inside_columns[:, None])
    weights = (kept.flatten(1) / temperature).softmax(1).view_as(kept)
    return torch.stack([(weights.sum(1) * columns).sum(1), (weights.sum(2) * rows).sum(1)], dim=1)


def nearest_pixels(
    source: Tensor, target: Tensor, points: Tensor, source_size: tuple[int, int], target_size: tuple[int, int]
) -> Tensor:
    """(P, 2) int64 (x, y) of the target pixel most similar (cosine) to the source feature at each pixel of `points`.

    Sizes are (height, width) in pixels, to which the maps are upsampled bilinearly (corners not aligned); points:
    (P, 2) int64 (x, y). The upsampled maps are never made: an inner product with a mixture of four cells is the mixture
    of four inner products. In double precision on the CPU; of pixels equal to 1e-12 (those along the border often are)
    the first in row-major order is taken, on every machine the same.
    """
    source, target = source.cpu().double(), target.cpu().double()
    x, y = points.T
    vectors = torch.zeros(len(source), len(points), dtype=torch.float64)
    for rows, columns, share in _mixture(source.shape[1:], source_size):
        vectors += share[y, x] * source[:, rows[y], columns[x]]
    vectors = F.normalize(vectors, dim=0)

    mixture = _mixture(target.shape[1:], target_size)
    height, width = target.shape[1:]
    padded = F.pad(target, (0, 1, 0, 1))  # beyond the last cell, which has no share
    corners = [padded[:, dy : dy + height, dx : dx + width] for dy in (0, 1) for dx in (0, 1)]
    top, left, _ = mixture[0]
    squared = torch.zeros(target_size, dtype=torch.float64)
    for i, j in itertools.combinations_with_replacement(range(4), 2):
        product = (corners[i] * corners[j]).sum(0)[top[:, None], left]
        squared += (1 if i == j else 2) * mixture[i][2] * mixture[j][2] * product
    norm = squared.clamp(min=1e-24).sqrt()

    best = []
    for product in (vectors.T @ target.flatten(1)).unflatten(1, (height, width)):
        similarity = torch.zeros_like(norm)
        for rows, columns, share in mixture:
            similarity += share * product[rows[:, None], columns]
        similarity /= norm
        best.append((similarity >= similarity.max() - 1e-12).int().argmax())
    index = torch.stack(best)
    return torch.stack([index % target_size[1], index // target_size[1]], dim=1)


def _mixture(cells: Sequence[int], size: tuple[int, int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The four cells of a map of (h, w) `cells` that each pixel mixes when it is upsampled bilinearly to (H, W).

    For top left, top right, bottom left, bottom right: row (H,) and column (W,) of the cell, and its share (H, W).
    """
    ends = []
    for count, pixels in zip(cells, size, strict=True):
        position = ((torch.arange(pixels, dtype=torch.float64) + 0.5) * (count / pixels) - 0.5).clamp(0, count - 1)
        low = position.long()
        ends.append(((low, 1 - (position - low)), ((low + 1).clamp(max=count - 1), position - low)))
    return [(row, column, a[:, None] * b) for row, a in ends[0] for column, b in ends[1]]


def pck_hits(errors: np.ndarray, thresholds: Sequence[float], *, strict: bool) -> np.ndarray:
    """(T,) number of the errors (P,) below each threshold: < where strict, else <=. Both in the same unit."""
    limits = np.asarray(thresholds)[:, None]
    return (errors < limits if strict else errors <= limits).sum(1)


def pck_averages(hits: np.ndarray, totals: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """PCK by the four averages in use, from hits and points per pair, (n,) each, and the class (n,) of each pair.

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
    """Longest side of (x1, y1, x2, y2)."""
    return max(box[2] - box[0], box[3] - box[1])


def draw_pairs(pairs: Sequence[Pair], attribute: str, level: int | None, count: int, seed: int) -> list[Pair]:
    """Up to `count` pairs of one attribute level (None: any), shuffled by Python's generator seeded anew.

    probe3d's draw; it shuffles in directory order, which differs between machines, and we in order of file names.
    """
    chosen = sorted((p for p in pairs if level is None or p.attributes[attribute] == level), key=lambda p: p.id)
    random.Random(seed).shuffle(chosen)
    return chosen[:count]
