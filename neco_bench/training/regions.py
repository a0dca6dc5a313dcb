"""Features of the same regions in two views (Pariza et al., ICLR 2025)."""

from __future__ import annotations

import torchvision
from torch import Tensor

from neco_bench.core.errors import UsageError


def align(features: Tensor, boxes: Tensor, stride: int, cells: int = 7) -> Tensor:
    """Pool (B, D, h, w) features of a view in boxes (B, R, 4), (x1, y1, x2, y2) in pixels of that view.

    Returns (B, R, cells * cells, D), cells in row-major order: means of bilinear samples, ceil(box / cells) per cell
    and axis, with a shift of half a token (`aligned`). stride: pixels per token. The result is not normalised again.
    For teacher view c the boxes are `gc[:, c]`, for student view v `all[:, v, c]` of `neco_bench.training.views`.
    """
    if boxes.dim() != 3 or boxes.shape[0] != len(features) or boxes.shape[2] != 4:
        raise UsageError(f"boxes must be ({len(features)}, regions, 4), not {tuple(boxes.shape)}.")
    in_tokens = boxes.to(features.dtype) / stride
    pooled = torchvision.ops.roi_align(features, list(in_tokens), cells, aligned=True)
    return pooled.flatten(2).transpose(1, 2).unflatten(0, boxes.shape[:2])
