"""Sampling units: the units that intervals and tests treat as independent. Imports no torch.

A data set states its `sampling_unit` and, if items are parts of larger units, `group_of(id)`. A task family stores the
ids of its items and their statistics in one of the forms below. The runner then computes intervals, and reports compute
paired tests, with these units.

- `image_id` (n,), `confusion` (..., n, C, C): for mIoU; leading axes are draws of the training set and seeds.
- `pair_id` (n,), `hits` (n, thresholds), `totals` (n,), `category` (n,), `images` (n, 2): for PCK.
- `item_id` (n,), `score/<metric>` (n,) or (repeats, n), optional `weight` (n,): for any metric that is the
  weighted mean over its items, such as J&F of objects, abs_rel of images, or a recall. With
  `square/<metric>` instead of `score/`, the metric is the root of the mean, such as an RMSE over all pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How the items of a data set were sampled.

    unit: "image", "pair", "frame", "sequence", "scene", "object", ... groups: (n,) index of the drive, sequence or
    scene of each item; None if items were sampled independently. "frame" means that items are frames of the groups, in
    order, and that neighbouring frames depend on each other, so the sampling units are blocks of frames. For other
    units, whole groups are the sampling units. images: (n, 2) indices of the two images of each item if items are
    pairs; pairs that share an image depend on each other.
    """

    unit: str = "image"
    groups: np.ndarray | None = None
    images: np.ndarray | None = None

    @property
    def in_blocks(self) -> bool:
        """Whether items are consecutive frames."""
        return self.unit == "frame" and self.groups is not None

    @classmethod
    def of(cls, unit: str, names: Sequence[str | None] = (), images: np.ndarray | None = None) -> Sampling:
        """Create the sampling from the group name of each item; None for an item without a group."""
        if not len(names) or all(name is None for name in names):
            return cls(unit, None, images)
        own = [f"item {i}" if name is None else f"group {name}" for i, name in enumerate(names)]
        return cls(unit, np.unique(own, return_inverse=True)[1].reshape(-1), images)
