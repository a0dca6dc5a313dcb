"""Batches for training linear heads, and their order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from neco_bench.core.rng import item_rng
from neco_bench.features.extract import FeatureBatch

Batches = Iterable[tuple[Tensor, Tensor]]  # features (B, D, h, w) with targets (B, H, W), for class ids int64


def training_order(count: int, total: int, seed: int) -> list[tuple[int, int]]:
    """Return `total` items (epoch, index) of `count` images: each epoch is a permutation; batches may span epochs."""
    items: list[tuple[int, int]] = []
    for epoch in range(-(-total // count)):
        items += [(epoch, int(i)) for i in item_rng(seed, "order", epoch).permutation(count)]
    return items[:total]


def with_targets(
    batches: Iterable[FeatureBatch], target: Callable[[np.ndarray], np.ndarray]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features (D, h, w) and `target` of the mask of each image, on the features' device; ids become int64."""
    for batch in batches:
        for features, mask in zip(batch.features, batch.masks, strict=True):
            values = target(mask)
            values = values if values.dtype == np.float32 else values.astype(np.int64)
            yield features, torch.from_numpy(values).to(features.device, non_blocking=True)


def batched(images: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features (B, D, h, w) and targets (B, H, W) of `size` images each; the last batch may be smaller."""
    images = iter(images)
    while chunk := list(itertools.islice(images, size)):
        features, targets = zip(*chunk, strict=True)
        yield torch.stack(features), torch.stack(targets)
