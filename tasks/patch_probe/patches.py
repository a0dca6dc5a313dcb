"""Patches with one label each, and their moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 262144  # rows searched, multiplied or standardised at once


@dataclass
class Patches:
    """Rows on the CPU: features (N, D) float32, blocks (N, A) uint8 pixel labels, labels (N,) uint8 majority labels.

    A row whose label is IGNORE is not fitted on.
    """

    features: Tensor
    blocks: Tensor
    labels: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Patches:
        return Patches(self.features[rows], self.blocks[rows], self.labels[rows])

    def __setitem__(self, rows: slice, other: Patches) -> None:
        self.features[rows], self.blocks[rows], self.labels[rows] = other.features, other.blocks, other.labels

    def __len__(self) -> int:
        return len(self.labels)


class Moments:
    """Mean and population deviation of rows (n, D) as they come, in float64 (Chan et al. 1979)."""

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean, self._squares = torch.zeros(2, dimension, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        rows = rows.double()
        total, mean = self.count + len(rows), rows.mean(0)
        shift = mean - self.mean
        self._squares += (rows - mean).square().sum(0) + shift.square() * (self.count * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.count = total

    def standardise(self, features: Tensor) -> None:
        """(N, D) float32 in place: mean 0, deviation 1; dimensions that were constant are only shifted."""
        deviation = (self._squares / self.count).sqrt().float()
        deviation[deviation == 0] = 1
        for part in features.split(CHUNK):
            part.sub_(self.mean.float()).div_(deviation)
