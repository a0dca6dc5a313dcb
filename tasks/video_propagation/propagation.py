"""Propagate labels from frame to frame by the similarity of features. Pure functions on tensors.

Maps are (D, h, w) features of unit length; labels are (C, h, w) scores of ids.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from neco_bench.tasks.video_propagation.settings import Settings
from torch import Tensor

from neco_bench.features.transforms import resize_nearest_pil, resize_nearest_torch

TILE = 12  # side in cells of the tiles that are compared at once; larger ones have more cells outside of each window


def first_labels(mask: np.ndarray, rows: int, columns: int, settings: Settings) -> Tensor:
    """Reduce a mask (H, W) of ids 0, 1, ... to the labels (C, rows, columns) float32 of the first frame.

    C is the highest id plus 1; with `drop_lost`, that of the reduced mask.
    """
    if settings.first_mask == "share":
        one_hot = F.one_hot(torch.from_numpy(mask.astype(np.int64))).permute(2, 0, 1).float()
        return F.adaptive_avg_pool2d(one_hot, (rows, columns))
    small = torch.from_numpy(resize_nearest_pil(mask, rows, columns).astype(np.int64))
    count = int(small.max()) if settings.drop_lost else int(mask.max())
    return F.one_hot(small, count + 1).permute(2, 0, 1).float()


def propagate(query: Tensor, context: Sequence[tuple[Tensor, Tensor]], settings: Settings) -> Tensor:
    """Compute the labels (C, h, w) of a frame from the features and labels of context frames.

    Each cell gets the mean label of the `neighbours` most similar cells within its window, over all context frames,
    with weights exp(cosine / temperature). It is computed tile by tile, so that memory does not grow with the size of
    the map.
    """
    rows, columns = query.shape[1:]
    reach = settings.radius_in_cells(rows, columns)
    whole = math.floor(reach)
    keys, labels = (torch.stack(parts) for parts in zip(*context, strict=True))
    result = labels.new_empty(labels.shape[1:])
    for top in range(0, rows, TILE):
        for left in range(0, columns, TILE):
            bottom, right = min(top + TILE, rows), min(left + TILE, columns)
            low = max(0, top - whole), max(0, left - whole)
            high = min(rows, bottom + whole), min(columns, right + whole)
            near = keys[:, :, low[0] : high[0], low[1] : high[1]].transpose(0, 1).flatten(1)
            near_labels = labels[:, :, low[0] : high[0], low[1] : high[1]].transpose(0, 1).flatten(1)
            own = query[:, top:bottom, left:right].flatten(1)
            gate = window_gate((top, bottom), (left, right), (low[0], high[0]), (low[1], high[1]), settings, reach)
            mixed = weighted_labels(own.T @ near, near_labels, gate.repeat(1, len(keys)).to(own.device), settings)
            result[:, top:bottom, left:right] = mixed.unflatten(1, (bottom - top, right - left))
    return result


def window_gate(
    rows: tuple[int, int],
    columns: tuple[int, int],
    key_rows: tuple[int, int],
    key_columns: tuple[int, int],
    settings: Settings,
    reach: float,
) -> Tensor:
    """Return which cells of a part of a grid are in the window of each cell of a tile: (tile, part) bool, row-major."""
    down = torch.arange(*rows)[:, None] - torch.arange(*key_rows)
    across = torch.arange(*columns)[:, None] - torch.arange(*key_columns)
    if settings.window == "square":
        inside = (down.abs() <= reach)[:, None, :, None] & (across.abs() <= reach)[None, :, None]
    else:
        inside = (down.square()[:, None, :, None] + across.square()[None, :, None]) <= reach**2
    return inside.flatten(2).flatten(0, 1)


def weighted_labels(similarity: Tensor, labels: Tensor, gate: Tensor, settings: Settings) -> Tensor:
    """Average the labels (C, K) of keys for each query: (C, Q). similarity: (Q, K) cosines; gate: (Q, K) bool."""
    count = min(settings.neighbours, similarity.shape[1])
    if settings.keep_ties:
        highest = similarity.masked_fill(~gate, -torch.inf).amax(1, keepdim=True)  # subtracted against overflow
        weights = ((similarity - highest) / settings.temperature).clamp_(max=0).exp_().mul_(gate)
        least = weights.topk(count, dim=1).values[:, -1:]
        weights = weights.masked_fill_(weights < least, 0)
        return (labels @ weights.T) / weights.sum(1)
    values, index = similarity.masked_fill(~gate, -torch.inf).topk(count, dim=1)
    weights = (values / settings.temperature).softmax(1)
    return (labels[:, index] * weights).sum(2)


class Tracker:
    """Labels of the frames of a clip in order; only the context frames are stored.

    features: (D, h, w) of the first frame, of unit length. labels: (C, h, w) of the first frame.
    """

    def __init__(self, features: Tensor, labels: Tensor, settings: Settings) -> None:
        self.settings = settings
        self._first = features, labels.to(features.device)
        self._latest: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.context_frames)

    def step(self, features: Tensor) -> Tensor:
        """Compute the labels (C, h, w) of the next frame from its features (D, h, w)."""
        labels = propagate(features, [self._first, *self._latest], self.settings)
        self._latest.append((features, labels))
        return labels


def mask_of(labels: Tensor, size: tuple[int, int], input_size: tuple[int, int], settings: Settings) -> np.ndarray:
    """Return the id (H, W) uint8 of each pixel from labels (C, h, w)."""
    if settings.upsample == "nearest":
        scores = torch.from_numpy(resize_nearest_torch(labels.cpu().numpy(), *size))
    else:
        goal = size if settings.upsample == "bilinear" else input_size
        scores = F.interpolate(labels[None], goal, mode="bilinear", align_corners=False)[0]
    if settings.min_max:
        low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
        # Constant scores, such as those of an id that is nowhere, are not changed.
        scores = torch.where(high > low, (scores - low) / (high - low).clamp(min=1e-30), scores)
    ids = scores.argmax(0).to(torch.uint8).cpu().numpy()
    return ids if ids.shape == size else resize_nearest_pil(ids, *size)
