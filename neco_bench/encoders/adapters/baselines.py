"""Encoders without weights, as baselines for every table: colour, and colour with gradients.

Both use cells of 8x8 pixels, process each image independently, and are deterministic.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from neco_bench.encoders.base import DenseFeatures, Encoder

CELL = 8  # pixels

BINS = 9  # unsigned orientations over 180 degrees, as Dalal and Triggs (CVPR 2005)


def rgb() -> Encoder:
    """Return the encoder of mean and deviation of each colour in the cell and in its 3x3 neighbourhood: 12 numbers."""
    return _Colour()


def hog() -> Encoder:
    """Return the encoder of colour at three scales and of gradient histograms at two scales: 120 numbers."""
    return _Gradients()


def _around(cells: Tensor, reach: int) -> Tensor:
    """Return the mean over the (2 reach + 1)² cells around each cell; cells outside the image are not counted."""
    return F.avg_pool2d(cells, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)


def _colour(images: Tensor, reaches: tuple[int, ...]) -> list[Tensor]:
    """Return mean and standard deviation of colour around each cell, for each reach in cells."""
    first, second = F.avg_pool2d(images, CELL), F.avg_pool2d(images.square(), CELL)
    features = []
    for reach in reaches:
        mean = _around(first, reach)
        features += [mean, (_around(second, reach) - mean.square()).clamp_min(1e-6).sqrt()]
    return features


def orientations(images: Tensor) -> Tensor:
    """Compute gradient strength by orientation, (B, BINS, H, W), of images (B, 3, H, W).

    Each pixel votes for its two nearest orientations, in proportion to nearness.
    """
    grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]
    down = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    strength = (across.square() + down.square() + 1e-12).sqrt()
    position = torch.atan2(down, across).remainder(math.pi) * (BINS / math.pi)
    low = position.floor()
    share = position - low
    votes = torch.zeros(len(images), BINS, *images.shape[-2:], device=images.device)
    votes.scatter_add_(1, low.long() % BINS, strength * (1 - share))
    return votes.scatter_add_(1, (low.long() + 1) % BINS, strength * share)


class _Colour(Encoder):
    embed_dim, stride = 12, CELL

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        return DenseFeatures(torch.cat(_colour(images.float(), (0, 1)), 1), CELL, final_norm=False)


class _Gradients(Encoder):
    embed_dim, stride = 18 + 9 * BINS + 2 * BINS + 3, CELL

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        images = images.float()
        cells = F.avg_pool2d(orientations(images), CELL)
        near, wide = _around(cells, 1), _around(cells, 3)
        # Histograms are relative to the gradient strength of their block; this contrast has separate features.
        block = near.norm(dim=1, keepdim=True) + 0.02
        neighbours = F.unfold(F.pad(cells / block, (1, 1, 1, 1), mode="replicate"), 3).unflatten(2, cells.shape[-2:])
        energy = [h.sum(1, keepdim=True).sqrt() for h in (cells, near, wide)]
        context = [near / block, wide / (wide.norm(dim=1, keepdim=True) + 0.02)]
        return DenseFeatures(
            torch.cat([*_colour(images, (0, 1, 3)), neighbours, *context, *energy], 1), CELL, final_norm=False
        )
