"""Image preparation of each protocol, and the mapping between keypoints and patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from neco_bench.tasks.correspondence.matching import (
    cell_similarity,
    nearest_cells,
    nearest_pixels,
    peak_cells,
    pixel_norms,
    sampled,
    window_softargmax,
)
from neco_bench.tasks.correspondence.settings import Settings
from PIL import Image
from torch import Tensor

from neco_bench.data.base import Pair
from neco_bench.features.transforms import pad_with, resize_image, to_tensor

# Predictions (P, 2), (x, y), of P points, and their errors (P,), in pixels of the original target image.
Match = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class View:
    """Features (D, h, w) of an image (unit length, except for "squash"), and its original width and height."""

    map: Tensor
    width: int
    height: int

    @property
    def longest(self) -> int:
        """The longer side in original pixels."""
        return max(self.width, self.height)

    @cached_property
    def norms(self) -> Tensor:
        """(height, width) lengths of the features upsampled to the image, float64."""
        return pixel_norms(self.map, (self.height, self.width))


def prepare_probe3d(image: np.ndarray, size: int, stride: int, mean: Sequence[float]) -> Tensor:
    """Return an input (3, S', S') in [0, 1]: padded to a square, resized to `size` (bicubic), padded to the stride.

    The first padding is white, at the right and bottom. The second is the mean colour (0 after normalisation) on all
    sides; if it is odd, it is smaller at the top and left.
    """
    longest = max(image.shape[:2])
    square = np.full((longest, longest, 3), 255, np.uint8)
    square[: image.shape[0], : image.shape[1]] = image
    extra = -size % stride
    tensor = resize_image(square, size, size, Image.Resampling.BICUBIC)
    sides = (extra // 2, extra - extra // 2, extra // 2, extra - extra // 2)
    return pad_with(tensor, mean, sides)


def integer_points(points: np.ndarray, longest: int, size: int) -> Tensor:
    """Scale integer pixels (P, 2) of an image whose longest side becomes `size`, truncated toward zero: (P, 2) float.

    Values are multiplied first, then divided, in single precision: a product with the rounded size / longest can be one
    pixel too small.
    """
    return (torch.from_numpy(points).long() * size / longest).long().float()


def match_probe3d(pairs: Sequence[Pair], sources: Sequence[View], target: View, size: int, stride: int) -> Match:
    """Match integer points, and read features and predictions at the corners of cells, as probe3d does."""

    def scaled(points: np.ndarray, view: View) -> Tensor:
        return integer_points(points, view.longest, size) / size

    starts = [2 * scaled(pair.source_points, view) - 1 for pair, view in zip(pairs, sources, strict=True)]
    cells = nearest_cells(_at(sources, starts, align_corners=True), target.map)
    predicted = cells.cpu().float() / target.map.shape[-1]
    ends = torch.cat([scaled(pair.target_points, target) for pair in pairs])
    errors = (predicted - ends).norm(dim=1).double().numpy() * target.longest
    return predicted.double().numpy() * target.longest, errors


def _at(views: Sequence[View], grids: Sequence[Tensor], *, align_corners: bool) -> Tensor:
    """Return the features (P, D) of views at points of each view, see `sampled`."""
    return torch.cat(
        [sampled(view.map, grid, align_corners=align_corners) for view, grid in zip(views, grids, strict=True)]
    )


def prepare_centres(image: np.ndarray, size: int, stride: int, mean: Sequence[float]) -> Tensor:
    """Return an input (3, S, S) in [0, 1]: longer side `size` (bicubic), mean colour at the right and bottom."""
    height, width = image.shape[:2]
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    canvas = torch.tensor(mean).view(3, 1, 1).repeat(1, size, size)
    canvas[:, :rows, :columns] = resize_image(image, rows, columns, Image.Resampling.BICUBIC)
    return canvas


def match_centres(pairs: Sequence[Pair], sources: Sequence[View], target: View, size: int, stride: int) -> Match:
    """Match exact points: pixel i covers [i, i + 1), and the prediction is the centre of a cell."""
    grids = [
        torch.from_numpy((pair.source_points + 0.5) / view.longest * 2 - 1).float()
        for pair, view in zip(pairs, sources, strict=True)
    ]
    scale = size / target.longest
    centres = (torch.arange(target.map.shape[-1]) + 0.5) * stride / scale
    valid = (centres < target.height)[:, None] & (centres < target.width)
    cells = nearest_cells(_at(sources, grids, align_corners=False), target.map, valid)
    predicted = (cells.cpu().double().numpy() + 0.5) * stride / scale - 0.5
    return predicted, np.linalg.norm(predicted - _ends(pairs), axis=1)


def _ends(pairs: Sequence[Pair]) -> np.ndarray:
    return np.concatenate([pair.target_points for pair in pairs])


def prepare_padded_centre(image: np.ndarray, size: int, stride: int, mean: Sequence[float]) -> Tensor:
    """Return an input (3, S, S) in [0, 1]: longer side `size` (Lanczos), centred on black."""
    height, width = image.shape[:2]
    new_width, new_height = (_resized(side, max(height, width), size) for side in (width, height))
    canvas = np.zeros((size, size, 3), np.uint8)
    left, top = (size - new_width) // 2, (size - new_height) // 2
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.LANCZOS)
    canvas[top : top + new_height, left : left + new_width] = np.asarray(resized)
    return to_tensor(canvas)


def match_padded_centre(
    pairs: Sequence[Pair], sources: Sequence[View], target: View, size: int, stride: int, settings: Settings
) -> Match:
    """Match the source cell that contains the point, in single precision, as sd-dino does."""

    def border(view: View) -> np.ndarray:
        return np.array(
            [(size - _resized(side, view.longest, size)) // 2 for side in (view.width, view.height)], np.float32
        )

    def placed(points: np.ndarray, view: View) -> np.ndarray:
        return points.astype(np.float32) * np.float32(size / view.longest) + border(view)

    side, points = target.map.shape[-1], []
    for pair, view in zip(pairs, sources, strict=True):
        start = placed(pair.source_points, view)
        x, y = torch.from_numpy((np.float32(side / size) * start).astype(np.int64).clip(0, side - 1)).T
        points.append(view.map[:, y, x].T)
    similarity = cell_similarity(torch.cat(points), target.map)
    if settings.readout == "nearest":
        cells = peak_cells(similarity)
    else:
        cells = window_softargmax(similarity, settings.half_window, settings.temperature)
    predicted = (cells.cpu().double().numpy() + 0.5) * stride + settings.centre_shift
    scale, end = target.longest / size, placed(_ends(pairs), target)
    return (predicted - border(target)) * scale, np.linalg.norm(predicted - end, axis=1) * scale


def _resized(side: int, longest: int, size: int) -> int:
    """Return the pixels of a side of an image whose longest side becomes `size`; halves are rounded to even."""
    return max(1, round(size * side / longest))


def prepare_squash(image: np.ndarray, size: int, stride: int, mean: Sequence[float]) -> Tensor:
    """Return an input (3, S, S) in [0, 1]: both sides `size` (bicubic), aspect ratio not kept."""
    return resize_image(image, size, size, Image.Resampling.BICUBIC)


def match_squash(pairs: Sequence[Pair], sources: Sequence[View], target: View, size: int, stride: int) -> Match:
    """Match integer points to the nearest of all pixels of the target; pair by pair, to limit memory."""
    pixels = []
    for pair, source in zip(pairs, sources, strict=True):
        limits = (source.width - 1, source.height - 1)
        start = torch.from_numpy(pair.source_points.astype(np.int64).clip(0, limits))
        sizes = (source.height, source.width), (target.height, target.width)
        pixels.append(nearest_pixels(source.map, target.map, start, *sizes, target.norms).cpu().numpy())
    predicted = np.concatenate(pixels)
    return predicted, np.linalg.norm(predicted - _ends(pairs), axis=1)


GEOMETRIES: dict[str, tuple[Callable, Callable]] = {
    "probe3d": (prepare_probe3d, match_probe3d),
    "centres": (prepare_centres, match_centres),
    "padded_centre": (prepare_padded_centre, match_padded_centre),
    "squash": (prepare_squash, match_squash),
}
