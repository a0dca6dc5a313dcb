"""Patches with their labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.preprocessing import StandardScaler
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

    @classmethod
    def empty(cls, rows: int, dimension: int, area: int) -> Patches:
        """Reserve memory for that many rows, of `dimension` features and `area` pixels each."""
        blocks, labels = torch.empty(rows, area, dtype=torch.uint8), torch.empty(rows, dtype=torch.uint8)
        return cls(torch.empty(rows, dimension), blocks, labels)

    def __getitem__(self, rows: slice | Tensor) -> Patches:
        return Patches(self.features[rows], self.blocks[rows], self.labels[rows])

    def __setitem__(self, rows: slice, other: Patches) -> None:
        self.features[rows], self.blocks[rows], self.labels[rows] = other.features, other.blocks, other.labels

    def __len__(self) -> int:
        return len(self.labels)


def standardise(features: Tensor, scaler: StandardScaler) -> None:
    """Standardise features (..., D) float32 in place, with the mean and deviation of a fitted scaler."""
    mean, deviation = torch.from_numpy(scaler.mean_).float(), torch.from_numpy(scaler.scale_).float()
    for part in features.view(-1, features.shape[-1]).split(CHUNK):
        part.sub_(mean).div_(deviation)
