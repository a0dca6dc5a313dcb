"""Match keypoints between feature maps. Pure functions.

Points are (P, 2) float (x, y), x right, y down. Maps are (D, h, w).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from neco_bench.data.base import Pair


def sampled(features: Tensor, grid: Tensor, *, align_corners: bool) -> Tensor:
    """Sample a map (D, h, w) bilinearly at points of a grid (P, 2) in [-1, 1], see `F.grid_sample`: (P, D)."""
    return F.grid_sample(
        features[None],
        grid.to(features)[None, None],
        mode="bilinear",
        padding_mode="border",
        align_corners=align_corners,
    )[0, :, 0].T


def cell_similarity(points: Tensor, target: Tensor) -> Tensor:
    """Compute the inner products (P, h, w) of features (P, D) with every cell of the target (D, h, w)."""
    return (points @ target.flatten(1)).unflatten(1, target.shape[1:])


def nearest_cells(points: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Find the cell of the target with the largest inner product with each of the features (P, D): see `peak_cells`.

    valid: (h, w) bool, the cells that may be selected.
    """
    similarity = cell_similarity(points, target)
    if valid is not None:
        similarity = similarity.masked_fill(~valid.to(similarity.device), -torch.inf)
    return peak_cells(similarity)


def peak_cells(similarity: Tensor) -> Tensor:
    """Find the largest of each (h, w): (P, 2) int64 (column, row), the first in row-major order in a tie."""
    best, width = similarity.flatten(1).argmax(1), similarity.shape[2]
    return torch.stack([best % width, best // width], dim=1)


def window_softargmax(similarity: Tensor, half_window: int, temperature: float) -> Tensor:
    """Compute the mean cell under the softmax of similarity (P, h, w) / temperature: (P, 2) float (column, row).

    The window around each peak has (2 half_window + 1)² cells, fewer at the border. Outside of it, similarities are 0
    instead of -inf, so every cell of the map has some weight: a quirk of GeoAware-SC (Zhang et al., CVPR 2024).
    """
    peaks = peak_cells(similarity)
    rows, columns = (torch.arange(side, device=similarity.device) for side in similarity.shape[1:])
    inside_rows = (rows - peaks[:, 1:]).abs() <= half_window
    inside_columns = (columns - peaks[:, :1]).abs() <= half_window
    inside = similarity * (inside_rows[:, :, None] & inside_columns[:, None])
    weights = (inside.flatten(1) / temperature).softmax(1).view_as(inside)
    return torch.stack([(weights.sum(1) * columns).sum(1), (weights.sum(2) * rows).sum(1)], dim=1)


def nearest_pixels(
    source: Tensor,
    target: Tensor,
    points: Tensor,
    source_size: tuple[int, int],
    target_size: tuple[int, int],
    norms: Tensor | None = None,
) -> Tensor:
    """Find the target pixel most similar (cosine) to the source feature at each of `points`: (P, 2) int64 (x, y).

    Maps are upsampled bilinearly (align_corners off) to sizes (height, width) in pixels, but upsampled maps are never
    stored: an inner product with a mean of four cells is the mean of four inner products. points: (P, 2) int64 (x, y).
    norms: `pixel_norms` of the target, if known. Computed in double precision; if pixels differ by less than 1e-12, as
    often at the border, the first in row-major order is returned, so that results do not depend on the machine.
    """
    norms = pixel_norms(target, target_size) if norms is None else norms
    source, target = _double(source), _double(target)
    rows, columns = _mixture(source.shape[1:], source_size, source.device)
    x, y = points.to(source.device).T
    vectors = source.flatten(1) @ (rows[y, :, None] * columns[x, None]).flatten(1).T
    cells = (F.normalize(vectors, dim=0).T @ target.flatten(1)).unflatten(1, target.shape[1:])
    rows, columns = _mixture(target.shape[1:], target_size, target.device)
    similarity = (rows @ cells @ columns.T).div_(norms).flatten(1)
    index = (similarity >= similarity.amax(1, keepdim=True) - 1e-12).int().argmax(1)
    return torch.stack([index % target_size[1], index // target_size[1]], dim=1)


def pixel_norms(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute the length (H, W) float64 of each pixel's feature after bilinear upsampling of (D, h, w) to `size`."""
    features = _double(features)
    height, width = features.shape[1:]
    rows, columns = _mixture(features.shape[1:], size, features.device)
    padded = F.pad(features, (1, 1, 0, 1))
    squared = rows.new_zeros(size)
    # A pixel is a mean of neighbouring cells: products of a cell with itself, and with neighbours in four directions.
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1), (1, -1)):
        product = (features * padded[:, down : down + height, 1 + right : 1 + right + width]).sum(0)
        by_rows = rows * F.pad(rows, (-down, down))  # shifted, with 0 beyond the end
        by_columns = columns * F.pad(columns, (-right, right))
        squared += (2 if down or right else 1) * (by_rows @ product @ by_columns.T)
    return squared.clamp_(min=1e-24).sqrt_()


def _double(features: Tensor) -> Tensor:
    """Convert to double precision, on the CPU if the device does not support it."""
    return (features.cpu() if features.device.type == "mps" else features).double()


def _mixture(cells: Sequence[int], size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the weights (H, h) of rows and (W, w) of columns of cells in each pixel, when a map of (h, w) `cells` is
    upsampled bilinearly to (H, W)."""
    ends = []
    for count, pixels in zip(cells, size, strict=True):
        position = ((torch.arange(pixels, dtype=torch.float64) + 0.5) * (count / pixels) - 0.5).clamp(0, count - 1)
        ends.append((1 - (position[:, None] - torch.arange(count)).abs()).clamp_(min=0).to(device))
    return ends[0], ends[1]


def draw_pairs(pairs: Sequence[Pair], attribute: str, level: int | None, count: int, seed: int) -> list[Pair]:
    """Draw up to `count` pairs with a level of an attribute (None: any), by Python's generator, as probe3d does.

    probe3d shuffles pairs in the order of the directory, which differs between machines; here they are sorted by id.
    """
    drawn = sorted((p for p in pairs if level is None or p.attributes[attribute] == level), key=lambda p: p.id)
    random.Random(seed).shuffle(drawn)  # noqa: S311 - a seeded draw, no secret
    return drawn[:count]
