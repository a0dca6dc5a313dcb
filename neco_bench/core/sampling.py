"""Which unit is drawn from a population: what intervals and tests take to be independent. Imports no torch.

The contract of data sets and task families. A data set says
`sampling_unit`, and where items are parts of larger units `group_of(id)`. A family stores the ids of its items and
their statistics in one of these forms; the runner then makes intervals, and reports make paired tests, by the unit.

- `image_id` (n,), `confusion` (..., n, C, C): of mIoU; leading axes are draws of the training set and seeds.
- `pair_id` (n,), `hits` (n, thresholds), `totals` (n,), `category` (n,), `images` (n, 2): of PCK.
- `item_id` (n,), `score/<metric>` (n,) or (repeats, n), optional `weight` (n,): any metric that is the weighted mean of
  its items, such as J&F of objects, abs_rel of images, or a recall. `square/<metric>` instead of `score/`: its root, of
  mean squared errors, such as an RMSE over all pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How the items of a data set were drawn.

    unit: "image", "pair", "frame", "sequence", "scene", "object", ... groups: (n,) the number of the drive, sequence or
    scene of each item; None where each item was drawn by itself. "frame" means that items are frames of the groups, in
    their order, and that neighbours depend on each other: blocks of them are drawn. Of any other unit whole groups are.
    images: (n, 2) numbers of the two images of each item, where items are pairs: those that share one depend on each
    other.
    """

    unit: str = "image"
    groups: np.ndarray | None = None
    images: np.ndarray | None = None

    @property
    def in_blocks(self) -> bool:
        """Whether items are frames in a row."""
        return self.unit == "frame" and self.groups is not None

    @classmethod
    def of(cls, unit: str, names: Sequence[str | None] = (), images: np.ndarray | None = None) -> Sampling:
        """Make it from the name of the group of each item, None for an item that is in no group."""
        if not len(names) or all(name is None for name in names):
            return cls(unit, None, images)
        own = [f"item {i}" if name is None else f"group {name}" for i, name in enumerate(names)]
        return cls(unit, np.unique(own, return_inverse=True)[1].reshape(-1), images)
