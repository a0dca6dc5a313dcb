"""Image and mask transforms. They return images (3, H, W) float32 RGB in [0, 1], and masks (h, w) uint8 class ids.

The reference code has two nearest rules, which differ on 1.5 % of CamVid's mask pixels: PyTorch's legacy `nearest`
(source index floor(i * in/out), computed in float32), and Pillow's, which samples cell centres.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from neco_bench.data.base import Sample

Transform = Callable[[Any, np.random.Generator], tuple[Tensor, np.ndarray]]  # of a Sample or a DenseSample


@functools.lru_cache(maxsize=256)
def _torch_index(source: int, target: int) -> np.ndarray:
    scale = np.float32(source) / np.float32(target)
    return np.minimum((np.arange(target, dtype=np.float32) * scale).astype(np.int64), source - 1)


def resize_nearest_torch(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (..., H, W) to (..., height, width) by PyTorch's `nearest` rule."""
    return mask[..., _torch_index(mask.shape[-2], height), :][..., _torch_index(mask.shape[-1], width)]


def resize_nearest_pil(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W) ids up to 255 to (height, width) uint8 by Pillow's nearest rule, which samples cell centres."""
    image = Image.fromarray(mask.astype(np.uint8, copy=False))
    return np.asarray(image.resize((width, height), Image.Resampling.NEAREST))


def resize_tensor(image: Tensor, height: int, width: int) -> Tensor:
    """Resize (C, H, W) floats to (C, height, width), bilinear and antialiased, as torchvision does."""
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]


@torch.no_grad()
def upsample_argmax(maps: Tensor, height: int, width: int) -> Tensor:
    """Return the index of the largest of the maps (C, h, w) at each pixel of their bilinear upsampling.

    Args:
        maps: any floating-point values, such as logits or class shares.
        height: height of the result in pixels.
        width: width of the result in pixels.

    Returns:
        (height, width) int64 indices of maps, the first in a tie; align_corners off, up to its rounding.

    Maps that cannot be the largest anywhere are excluded first, and a few of the others are upsampled at a time: with
    150 classes this takes 24 ms instead of 978 ms per image.
    """
    highest, window = maps.amax((1, 2)), [min(2, side) for side in maps.shape[1:]]
    # A pixel mixes at most 2 x 2 cells. Its largest value is at least the minimum of any map over these cells and, if
    # nothing is negative, at least a quarter of the value of any map in one of them.
    least = F.max_pool2d(-maps[None], window, 1)[0].neg().amax(0).min()
    if maps.min() >= 0:
        least = torch.maximum(least, maps.amax(0).min() / 4)
    rounding = 1e-5 * highest.abs().max()  # of the interpolation
    candidates = (~(highest < least - rounding)).nonzero()[:, 0]
    best = most = torch.empty(0)
    for number, ids in enumerate(candidates.split(16)):  # more maps at a time exceed a CPU's cache
        large = F.interpolate(maps[ids][None], (height, width), mode="bilinear", align_corners=False)[0]
        values, which = large.max(0)  # 30 times as fast as argmax() along the first axis
        if number:
            best, most = torch.where(values > most, ids[which], best), torch.maximum(most, values)
        else:
            best, most = ids[which], values
    return best


def to_tensor(image: np.ndarray) -> Tensor:
    """Convert (H, W, 3) uint8 to (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C")).float().div_(255)


def resize_image(
    image: np.ndarray, height: int, width: int, rule: Image.Resampling = Image.Resampling.BILINEAR
) -> Tensor:
    """Resize (H, W, 3) uint8 to (3, height, width) float32 in [0, 1] by a rule of Pillow (antialiased, in uint8)."""
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), rule))
    return to_tensor(image)


def pad_with(image: Tensor, colour: Sequence[float], sides: tuple[int, int, int, int]) -> Tensor:
    """Pad an image (3, H, W) by (left, right, top, bottom) pixels of a colour; the mean is 0 after normalisation."""
    shift = torch.tensor(colour).view(3, 1, 1)
    return F.pad(image - shift, sides) + shift


def crop_size(
    rng: np.random.Generator, size: tuple[int, ...], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, bool]:
    """Draw (height, width) of a crop of an image of size (height, width) like torchvision's RandomResizedCrop.

    scale: range of the share of the area; ratio: range of width / height. After ten attempts, the largest size within
    the range of the ratio is returned, with False: that crop is central.
    """
    height, width = size
    area = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target = area * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return h, w, True
    return min(height, max(1, round(width / ratio[0]))), min(width, max(1, round(height * ratio[1]))), False


def crop_box(
    rng: np.random.Generator, size: tuple[int, ...], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw a crop (top, left, height, width), see `crop_size`."""
    height, width = size
    h, w, drawn = crop_size(rng, size, scale, ratio)
    if drawn:
        return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class ResizeSquare:
    """Resize image and mask to size x size (aspect ratio not kept).

    mask: a nearest rule, or "native" for the unchanged mask. bicubic: resize the image by Pillow's bicubic rule;
    otherwise by its bilinear rule.
    """

    size: int
    mask: Literal["torch", "pil", "native"]
    bicubic: bool = False

    @property
    def pixels(self) -> str:
        """Identify the processing of the image, on which it depends in addition to its item; it draws no randomness."""
        return f"{type(self).__name__}({self.size}{', bicubic' if self.bicubic else ''})"

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
        """Return the image (3, size, size) and the mask; `rng` is not used."""
        rule = Image.Resampling.BICUBIC if self.bicubic else Image.Resampling.BILINEAR
        image = resize_image(sample.image, self.size, self.size, rule)
        if self.mask == "native":
            return image, sample.mask
        resize = resize_nearest_torch if self.mask == "torch" else resize_nearest_pil
        return image, resize(sample.mask, self.size, self.size)
