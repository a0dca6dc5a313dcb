"""Match points of two views by their features, and transform points between cameras. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neco_bench.data.views import Camera
from neco_bench.features.patches import unit_length

PIXELS = 512  # side of the crop in which errors in pixels are given


@dataclass(frozen=True)
class Matches:
    """Indices (M,) of matched points in the first and in the second view, the most distinctive first."""

    source: np.ndarray
    target: np.ndarray


def match_points(source: Tensor, target: Tensor, count: int) -> Matches:
    """Match each of the features (N, D) to the most similar (cosine) of (K, D); return the `count` most distinctive.

    The distinctiveness is 1 minus the ratio of the distances (1 - cosine) to the nearest and the second nearest (Lowe,
    IJCV 2004); the first match is preferred in a tie. With a single target, all are equally distinctive.
    """
    source, target = unit_length(source, 1), unit_length(target, 1)
    best, weight = [], []
    for part in source.split(2048):
        cosines = part @ target.T
        nearest = cosines.max(1)  # two maxima, because topk(2) takes three times as long
        second = cosines.scatter_(1, nearest.indices[:, None], -1.0).amax(1) if len(target) > 1 else nearest.values
        near, far = ((1 - values).clamp(min=1e-9) for values in (nearest.values, second))
        best.append(nearest.indices)
        weight.append(1 - near / far)
    order = torch.sort(torch.cat(weight), descending=True, stable=True).indices[:count]
    return Matches(order.cpu().numpy(), torch.cat(best)[order].cpu().numpy())


def moved(points: np.ndarray, source: Camera, target: Camera) -> np.ndarray:
    """Transform points (N, 3) from the frame of one camera to that of another."""
    rotation = target.rotation @ source.rotation.T
    return points @ rotation.T + target.translation - rotation @ source.translation


def projected(points: np.ndarray, focal: float) -> np.ndarray:
    """Project points (N, 3) to an image: (N, 2) positions (x, y) in pixels from the principal point."""
    return focal * points[:, :2] / points[:, 2:]
