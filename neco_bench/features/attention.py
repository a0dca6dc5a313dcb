"""Foreground by the class token's attention, as in DINO (Caron et al., ICCV 2021) and Leopart (CVPR 2022)."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

MIN_SIDE = 4  # minimum patches per side for the reflection padding of the 7 x 7 blur


def top_mass(attention: Tensor, mass: float) -> Tensor:
    """Return the patches (..., h, w) bool with the top share `mass` of the attention (..., h, w) of each map.

    Patches are summed in ascending order; those at which the sum exceeds 1 - `mass` are included.
    """
    ordered, order = attention.flatten(-2).sort(dim=-1)
    inside = (ordered / ordered.sum(-1, keepdim=True)).cumsum(-1) > 1 - mass
    return torch.empty_like(inside).scatter_(-1, order, inside).view_as(attention)


def foreground(attention: Tensor, mass: float) -> Tensor:
    """Return the patches (N, h, w) bool with the top `mass` of the attention (N, heads, h, w), mean of heads, blurred.

    Regions of one or two patches (of eight neighbours) are left out. h and w are at least `MIN_SIDE`.
    """
    import torchvision.transforms.functional as tf  # 1.3 s, and other tasks need none of it

    blurred = tf.gaussian_blur(attention.mean(1, keepdim=True), [7, 7], [0.6, 0.6]).squeeze(1)
    mask = top_mass(blurred, mass).cpu().numpy()
    for image in mask:
        regions, count = ndimage.label(image, np.ones((3, 3)))
        sizes = np.bincount(regions.ravel(), minlength=count + 1)
        image &= sizes[regions] >= 3
    return torch.from_numpy(mask).to(attention.device)
