"""Semantic correspondence: match keypoints between feature maps, score them by PCK. Pure functions.

Points are (P, 2) float (x, y), x right, y down. Maps are (D, h, w).
"""

from __future__ import annotations

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
    best = similarity.argmax(1)
    width = target.shape[2]
    return torch.stack([best % width, best // width], dim=1)


def pck_hits(errors: np.ndarray, thresholds: Sequence[float], *, strict: bool) -> np.ndarray:
    """(T,) number of the errors (P,) below each threshold: < where strict, else <=. Both in the same unit."""
    limits = np.asarray(thresholds)[:, None]
    return (errors < limits if strict else errors <= limits).sum(1)


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
