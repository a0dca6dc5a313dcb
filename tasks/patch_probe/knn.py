"""k-nearest-neighbour classification of patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from neco_bench.tasks.patch_probe.patches import CHUNK, Patches
from neco_bench.tasks.patch_probe.settings import Distance
from torch import Tensor

from neco_bench.core.errors import UsageError
from neco_bench.data.base import IGNORE, Void
from neco_bench.features.patches import majority_label, rescaled, unit_length
from neco_bench.search.exact import ExactIndex

VOTE_BYTES = 128 * 2**20


def search_keys(features: Tensor, distance: Distance) -> Tensor:
    """Return rows whose inner product with `search_queries` decreases with the distance to the features (n, D)."""
    if distance == "cosine":
        return unit_length(features, 1)
    return torch.cat([features, features.square().sum(1, keepdim=True) / -2], 1)


def search_queries(features: Tensor, distance: Distance) -> Tensor:
    """Return queries for the rows of `search_keys` from features (n, D)."""
    return F.pad(features, (0, 1), value=1.0) if distance == "l2" else rescaled(features, 1)


def check_ks(k: int, patches: int) -> None:
    """Raise UsageError if k exceeds the number of training patches."""
    if k > patches:
        raise UsageError(
            f"{k} neighbours are requested, but there are {patches} training patches. Use smaller numbers in "
            f"--set 'ks=[1, 3]', or more images."
        )


def nearest_rows(keys: Tensor, queries: Tensor, k: int, distance: Distance, device: torch.device) -> Tensor:
    """Find the rows of `keys` (N, D) nearest to each query (Q, D): (Q, k) int64 ids, nearest first; exact.

    CHUNK rows of each are moved to `device` at a time. Raises UsageError if k exceeds N.
    """
    check_ks(k, len(keys))
    offset = keys.mean(0) if distance == "l2" else 0  # it would cost digits
    scores = torch.full((len(queries), k), -torch.inf)
    ids = torch.zeros(len(queries), k, dtype=torch.int64)
    for start in range(0, len(keys), CHUNK):
        rows = search_keys(keys[start : start + CHUNK] - offset, distance)
        index = ExactIndex(rows.shape[1], device)
        index.add(rows)
        for s, i, part in zip(scores.split(CHUNK), ids.split(CHUNK), queries.split(CHUNK), strict=True):
            close, where = index.search(search_queries(part - offset, distance), min(k, len(rows)))
            s[:], order = torch.cat([s, close], 1).topk(k)
            i[:] = torch.cat([i, where + start], 1).gather(1, order)
    return ids


def vote(patches: Patches, ids: Tensor, classes: int, void: Void, device: torch.device) -> Tensor:
    """Return the most frequent label of the neighbours `ids` (Q, k) for each pixel of the block: (Q, A) uint8.

    It is IGNORE if void won. If void never votes and no neighbour has a label at a pixel, their majority labels vote.
    """
    (count, k), area = ids.shape, patches.blocks.shape[1]
    voted = torch.empty(count, area, dtype=torch.uint8)
    step = max(1, VOTE_BYTES // (area * (12 * k + 8 * classes)))
    for out, rows in zip(voted.split(step), ids.split(step), strict=True):
        pixels = patches.blocks[rows].to(device).transpose(1, 2).reshape(-1, k)
        winners = majority_label(pixels, classes, void).view(-1, area)
        if void == "never votes":
            fallback = majority_label(patches.labels[rows].to(device), classes, void)
            winners = torch.where(winners == IGNORE, fallback[:, None], winners)
        out[:] = winners
    return voted
