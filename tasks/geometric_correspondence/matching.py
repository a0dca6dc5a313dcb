"""Match points of two views by their features, and measure how far apart they are in space. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neco_bench.data.views import Camera
from neco_bench.features.patches import unit_length

CHUNK = 2048  # points compared at a time


SMALLEST = 1e-9  # distance, so that a ratio is defined


PIXELS = 512  # side of the crop in which errors in pixels are given


@dataclass(frozen=True)
class Matches:
    """Numbers (M,) of the points of the first and the second view, those that stand out most first."""

    source: np.ndarray
    target: np.ndarray


def match_points(source: Tensor, target: Tensor, count: int) -> Matches:
    """Match each of the features (N, D) to the most similar (cosine) of (K, D), and keep the `count` that stand out.

    How much one stands out is 1 less the ratio of the distances (1 - cosine) to the nearest and the second nearest
    (Lowe, IJCV 2004). Of equal ones the first is taken. With a single target all stand out equally.
    """
    source, target = unit_length(source, 1), unit_length(target, 1)
    best, weight = [], []
    for part in source.split(CHUNK):
        cosines = part @ target.T
        nearest = cosines.max(1)  # and again without it: topk(2) takes three times as long
        second = cosines.scatter_(1, nearest.indices[:, None], -1.0).amax(1) if len(target) > 1 else nearest.values
        near, far = ((1 - values).clamp(min=SMALLEST) for values in (nearest.values, second))
        best.append(nearest.indices)
        weight.append(1 - near / far)
    order = torch.sort(torch.cat(weight), descending=True, stable=True).indices[:count]
    return Matches(order.cpu().numpy(), torch.cat(best)[order].cpu().numpy())


def moved(points: np.ndarray, source: Camera, target: Camera) -> np.ndarray:
    """Points (N, 3) in the frame of one camera, in that of another."""
    rotation = target.rotation @ source.rotation.T
    return points @ rotation.T + target.translation - rotation @ source.translation


def projected(points: np.ndarray, focal: float) -> np.ndarray:
    """(N, 2) places (x, y) of points (N, 3) in an image, in pixels from the principal point."""
    return focal * points[:, :2] / points[:, 2:]
