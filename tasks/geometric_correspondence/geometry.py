"""Preparation of views as inputs, and the points of the surface to match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from neco_bench.core.errors import BadInputError
from neco_bench.data.views import Camera, DepthView
from neco_bench.features.transforms import pad_with, resize_nearest_torch, to_tensor


@dataclass(frozen=True)
class Prepared:
    """A view as an input with the points to match.

    image: (3, S, S) in [0, 1]. points: (N, 3) float64 in the camera's frame, in metres. places: (N, 2) float64,
    positions of the points in the crop, (x, y) as shares of its side. cells: (N,) row-major indices of grid cells.
    focal: focal length in pixels of the crop. side: side of the crop in pixels.
    """

    image: Tensor
    points: np.ndarray
    places: np.ndarray
    cells: np.ndarray
    focal: float
    side: int
    camera: Camera


def surface_points(depth: np.ndarray, focal: float) -> np.ndarray:
    """Return the points (H, W, 3) of depth (H, W) in the camera's frame, with the principal point at the centre."""
    height, width = depth.shape
    x = (np.arange(width) + 0.5 - width / 2) / focal
    y = (np.arange(height) + 0.5 - height / 2) / focal
    return np.stack([depth * x, depth * y[:, None], depth], axis=-1)


def prepare_probe3d(name: str, view: DepthView, size: int, stride: int, mean: Sequence[float], grid: int) -> Prepared:
    """Prepare a view as probe3d does.

    The shorter side is resized to `size` (nearest), and the central square is cropped. From it, the square around the
    object (less than a square at the border of the image) is cropped and resized to `size` (nearest, aspect ratio not
    kept). The input is padded with the mean to the stride, half on each side, but positions are not shifted by this.
    """
    import cv2  # takes 0.1 s

    shape = view.image.shape[:2]
    scale = size / min(shape)
    height, width = (size if side == min(shape) else int(size * side / min(shape)) for side in shape)
    image = resize_nearest_torch(view.image.transpose(2, 0, 1), height, width).transpose(1, 2, 0)
    depth = resize_nearest_torch(view.depth, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    image, depth = (part[top : top + size, left : left + size] for part in (image, depth))
    points = surface_points(depth.astype(np.float64), view.camera.focal * scale)
    rows, columns = probe3d_box(name, depth)
    image, points = (
        cv2.resize(np.ascontiguousarray(part[rows, columns]), (size, size), interpolation=cv2.INTER_NEAREST)
        for part in (image, points)
    )
    focal = view.camera.focal * scale * size / min(rows.stop - rows.start, columns.stop - columns.start)
    selected = resize_nearest_torch(np.arange(size)[None], 1, grid)[0]
    points = points[selected][:, selected].reshape(-1, 3)
    cells = np.flatnonzero(points[:, 2] > 0)
    places = np.stack([cells % grid + 0.5, cells // grid + 0.5], axis=1) / grid
    extra = -size % stride
    sides = (extra // 2, extra - extra // 2, extra // 2, extra - extra // 2)
    padded = pad_with(to_tensor(image), mean, sides)
    return Prepared(padded, points[cells], places, cells, focal, size, view.camera)


def probe3d_box(name: str, depth: np.ndarray) -> tuple[slice, slice]:
    """Return rows and columns, within the image, of the square around the object, where depth (S, S) is not 0.

    The last row and column of the object are excluded. If the square around its centre exceeds the image, the square
    instead ends with the object, but starts at 0 or later.
    """
    rows, columns = np.nonzero(depth > 0)
    if not len(rows):
        raise BadInputError(f"View {name!r} has no depth in the middle of the image. Restore the original files.")
    first, last = np.array([rows.min(), columns.min()]), np.array([rows.max(), columns.max()])
    box = last - first
    side = int(box.max())
    if side == 0:
        raise BadInputError(f"View {name!r} has depth in a single pixel. Restore the original files.")
    start = first - (side - box) // 2
    if (start < 0).any() or (start + side > depth.shape).any():
        start = np.maximum(first - (side - box), 0)
    stop = np.minimum(start + side, depth.shape)
    return slice(int(start[0]), int(stop[0])), slice(int(start[1]), int(stop[1]))


def prepare_exact(name: str, view: DepthView, size: int, stride: int, mean: Sequence[float], grid: int) -> Prepared:
    """Prepare a view by one bicubic crop of the square around the object; the mean colour fills it outside the image.

    Points are at the centres of pixels: for each cell of the grid, the pixel that contains its centre.
    """
    rows, columns = np.nonzero(view.depth > 0)
    if not len(rows):
        raise BadInputError(f"View {name!r} has no depth. Restore the original files.")
    height, width = view.depth.shape
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    side = max(bottom - top, right - left)
    top, left = (top + bottom - side) / 2, (left + right - side) / 2
    border = side  # the square never exceeds the image by more
    canvas = np.empty((height + 2 * border, width + 2 * border, 3), np.uint8)
    canvas[:] = np.rint(255 * np.array(mean))
    canvas[border : border + height, border : border + width] = view.image
    box = (left + border, top + border, left + border + side, top + border + side)
    image = Image.fromarray(canvas).resize((size, size), Image.Resampling.BICUBIC, box=box)
    middles = (np.arange(grid) + 0.5) * side / grid
    y, x = np.floor(top + middles).astype(int), np.floor(left + middles).astype(int)
    inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))
    depth = np.where(inside, view.depth[np.clip(y, 0, height - 1)][:, np.clip(x, 0, width - 1)], 0)
    cells = np.flatnonzero(depth > 0)
    y, x = y[cells // grid], x[cells % grid]
    points = surface_points(view.depth.astype(np.float64), view.camera.focal)[y, x]
    places = np.stack([(x + 0.5 - left) / side, (y + 0.5 - top) / side], axis=1)
    return Prepared(
        to_tensor(np.asarray(image)), points, places, cells, view.camera.focal * size / side, size, view.camera
    )


def features_at(features: Tensor, prepared: Prepared, grid: int, geometry: str) -> Tensor:
    """Return the features (N, D), not normalised, of the points of a view from a map (D, h, w).

    "probe3d" upsamples the map, including padding, to the grid (bicubic); "exact" samples it bilinearly.
    """
    if geometry == "probe3d":
        large = F.interpolate(features[None], (grid, grid), mode="bicubic", align_corners=False)[0]
        return large.flatten(1)[:, torch.from_numpy(prepared.cells).to(large.device)].T
    places = torch.from_numpy(2 * prepared.places - 1).to(features)
    sampled = F.grid_sample(features[None], places[None, None], padding_mode="border", align_corners=False)
    return sampled[0, :, 0].T


GEOMETRIES = {"probe3d": prepare_probe3d, "exact": prepare_exact}
