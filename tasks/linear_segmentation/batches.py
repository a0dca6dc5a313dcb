"""Batches that linear probes are trained on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from neco_bench.features.extract import FeatureBatch


def labelled(
    batches: Iterable[FeatureBatch], target: Callable[[np.ndarray], np.ndarray]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features (D, h, w) and `target` of the mask, (H, W) int64, of each image, on the features' device."""
    for batch in batches:
        for features, mask in zip(batch.features, batch.masks, strict=True):
            ids = torch.from_numpy(target(mask).astype(np.int64))
            yield features, ids.to(features.device, non_blocking=True)


def batched(images: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features (B, D, h, w) and targets (B, H, W) of `size` images each, fewer in the last batch."""
    images = iter(images)
    while chunk := list(itertools.islice(images, size)):
        features, targets = zip(*chunk, strict=True)
        yield torch.stack(features), torch.stack(targets)
