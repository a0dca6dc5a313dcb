"""Interpolation of learned position embeddings to another grid, by the rule of the code a model comes from.

scale_offset: bicubic by the scale factor (n + 0.1) / n_train on each axis, no antialias; the sampling points follow the
factor, not the ratio of sizes. DINO, DINOv2 without registers (torch.hub), and all of NeCo.
size_antialias: bicubic to the target size with antialias. DINOv2 with registers (torch.hub); timm's own rule too.
Both leave the training grid as it is, and work in float32.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def interpolate_positions(positions: Tensor, grid: tuple[int, int], size: tuple[int, int], rule: str) -> Tensor:
    """Patch positions (1, rows * columns of `grid`, D) at another `size` (rows, columns): (1, rows * columns, D)."""
    if size == grid:
        return positions
    image = positions.float().unflatten(1, grid).permute(0, 3, 1, 2)
    if rule == "scale_offset":
        factor = ((size[0] + 0.1) / grid[0], (size[1] + 0.1) / grid[1])
        image = F.interpolate(image, scale_factor=factor, mode="bicubic")
    else:
        image = F.interpolate(image, size=size, mode="bicubic", antialias=True)
    return image.flatten(2).transpose(1, 2).to(positions.dtype)
