"""Sliding windows over an image, and several views of it (scales, mirrored)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neco_bench.features.transforms import upsample_argmax

Corners = list[tuple[int, int]]  # (top, left) of each window


def window_starts(length: int, window: int, step: int) -> list[int]:
    """Return the first pixels of windows along an axis of `length` >= `window`; the last window ends with the axis."""
    count = max(length - window + step - 1, 0) // step + 1
    return [min(k * step, length - window) for k in range(count)]


def crop_windows(image: Tensor, window: int, step: int) -> tuple[Tensor, Corners]:
    """Crop windows, `step` pixels apart, from an image (3, H, W): (n, 3, window, window), and their corners."""
    rows, columns = (window_starts(side, window, step) for side in image.shape[1:])
    corners = list(itertools.product(rows, columns))
    return torch.stack([image[:, top : top + window, left : left + window] for top, left in corners]), corners


def merge_windows(logits: Tensor, corners: Corners, window: int) -> Tensor:
    """Upsample the logits (n, C, h, w) of windows to pixels, and average them where windows overlap: (C, H, W)."""
    height, width = (max(side) + window for side in zip(*corners, strict=True))
    total, visits = logits.new_zeros(logits.shape[1], height, width), logits.new_zeros(height, width)
    for part, (top, left) in zip(logits, corners, strict=True):
        place = (..., slice(top, top + window), slice(left, left + window))
        total[place] += F.interpolate(part[None], (window, window), mode="bilinear", align_corners=False)[0]
        visits[place] += 1
    return total / visits


def classify_views(
    image: np.ndarray, scales: Sequence[float], flip: bool, logits_of: Callable[[np.ndarray, float], Tensor]
) -> np.ndarray:
    """Classify each pixel of an image (H, W, 3) uint8 by a single view, or by the mean probabilities of several views.

    Args:
        image: the image.
        scales: scales of the views.
        flip: whether each view is also mirrored.
        logits_of: maps an image (H, W, 3), possibly mirrored, and a scale to logits (C, h, w).

    Returns:
        (H, W) class ids.
    """
    shape = image.shape[:2]
    views = list(itertools.product(scales, (False, True) if flip else (False,)))
    mean = torch.zeros(())
    for scale, mirrored in views:
        logits = logits_of(image[:, ::-1] if mirrored else image, scale)
        if len(views) == 1:
            return upsample_argmax(logits, *shape).cpu().numpy()
        large = F.interpolate(logits[None], shape, mode="bilinear", align_corners=False)[0].softmax(0)
        mean = mean.to(large.device) + (large.flip(-1) if mirrored else large) / len(views)
    return mean.argmax(0).cpu().numpy()
