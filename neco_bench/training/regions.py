"""Foreground by the teacher's attention, for the ablations that train on part of the image (Pariza et al., ICLR 2025,
after Leopart, CVPR 2022).

Deviations from the official code: the attention is the softmax map of the class token over patches alone, with and
without registers, whatever computes attention; references are drawn from the cells of the mask.
"""

from __future__ import annotations

import numpy as np
import torch
import torchvision
import torchvision.transforms.functional as tf
from scipy import ndimage
from torch import Tensor

from neco_bench.core.errors import UsageError

MASS, MIN_REGION = 0.6, 3  # share of the attention in the mask; patches of its smallest region

MIN_SIDE = 4  # patches, that the blur's seven can be reflected


def foreground(attention: Tensor) -> Tensor:
    """Find the patches (N, h, w) bool that hold the top 60 % of the class token's attention (N, heads, h, w), blurred.

    Regions of one or two patches (of eight neighbours) are left out.
    """
    blurred = tf.gaussian_blur(attention.mean(1, keepdim=True), [7, 7], [0.6, 0.6]).squeeze(1)
    ordered, order = blurred.flatten(1).sort(dim=1)
    inside = (ordered / ordered.sum(1, keepdim=True)).cumsum(1) > 1 - MASS
    mask = torch.empty_like(inside).scatter_(1, order, inside).view_as(blurred).cpu().numpy()
    for image in mask:
        regions, count = ndimage.label(image, np.ones((3, 3)))
        sizes = np.bincount(regions.ravel(), minlength=count + 1)
        image &= sizes[regions] >= MIN_REGION
    return torch.from_numpy(mask).to(attention.device)


def align(features: Tensor, boxes: Tensor, stride: int, cells: int = 7) -> Tensor:
    """Pool (B, D, h, w) features of a view in boxes (B, R, 4), (x1, y1, x2, y2) in pixels of that view.

    Returns (B, R, cells * cells, D), cells row by row: means of bilinear samples, ceil(box / cells) per cell and axis,
    half a token of shift (`aligned`). stride: pixels per token. Not normalised again.
    For teacher view c the boxes are `gc[:, c]`, for student view v `all[:, v, c]` of `neco_bench.training.views`.
    """
    if boxes.dim() != 3 or boxes.shape[0] != len(features) or boxes.shape[2] != 4:
        raise UsageError(f"boxes must be ({len(features)}, regions, 4), not {tuple(boxes.shape)}.")
    in_tokens = boxes.to(features.dtype) / stride
    pooled = torchvision.ops.roi_align(features, list(in_tokens), cells, aligned=True)
    return pooled.flatten(2).transpose(1, 2).unflatten(0, boxes.shape[:2])
