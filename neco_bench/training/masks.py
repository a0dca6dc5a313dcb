"""Foreground by the teacher's attention, for the ablations that train on part of the image (Pariza et al., ICLR 2025,
after Leopart, CVPR 2022).

Deviations from the official code: the attention is the softmax map of the class token over patches alone, with and
without registers, whatever computes attention; references are drawn from the cells of the mask.
"""

from __future__ import annotations

import numpy as np
import torch
import torchvision.transforms.functional as tf
from scipy import ndimage
from torch import Tensor

MASS, SMALLEST = 0.6, 3  # share of the attention kept; patches of the smallest region kept
LEAST_SIDE = 4  # patches, that the blur's seven can be reflected


def foreground(attention: Tensor) -> Tensor:
    """Patches (N, h, w) bool that hold the top 60 % of the class token's attention (N, heads, h, w), blurred; regions
    of one or two patches (of eight neighbours) are left out."""
    blurred = tf.gaussian_blur(attention.mean(1, keepdim=True), [7, 7], [0.6, 0.6]).squeeze(1)
    ordered, order = blurred.flatten(1).sort(dim=1)
    kept = (ordered / ordered.sum(1, keepdim=True)).cumsum(1) > 1 - MASS
    mask = torch.empty_like(kept).scatter_(1, order, kept).view_as(blurred).cpu().numpy()
    for image in mask:
        regions, count = ndimage.label(image, np.ones((3, 3)))
        sizes = np.bincount(regions.ravel(), minlength=count + 1)
        image &= sizes[regions] >= SMALLEST
    return torch.from_numpy(mask).to(attention.device)
