"""The training augmentation of mmseg-style linear probes, as DINOv3 has it: rescale, crop, flip, colours, padding.

Constants and order are those of facebookresearch/dinov3, whose port differs from mmseg's in the hue (the full circle,
where mmseg turns by 36 degrees) and the saturation (a blend with grey, where mmseg scales that of HSV).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from neco_bench.data.base import IGNORE, Sample
from neco_bench.features.transforms import resize_nearest_torch


def short_side_size(height: int, width: int, short: int) -> tuple[int, int]:
    """Scale (height, width) to a short side of `short` pixels, the long one in proportion, halves rounded up."""
    low, high = sorted((height, width))
    long = (2 * short * high + low) // (2 * low)
    return (short, long) if height <= width else (long, short)


def resize_short_side(image: np.ndarray, short: int) -> np.ndarray:
    """Resize an image (H, W, 3) uint8 to a short side of `short` pixels, Pillow bilinear (antialiased)."""
    height, width = short_side_size(image.shape[0], image.shape[1], short)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def varied(mask: np.ndarray, max_share: float) -> bool:
    """Say whether a mask has two classes or more, none with `max_share` or more of the pixels that are not void."""
    counts = np.bincount(mask[mask != IGNORE])
    return bool(np.count_nonzero(counts) >= 2 and counts.max() < max_share * counts.sum())


def choose_crop(
    mask: np.ndarray, size: int, max_share: float, tries: int, rng: np.random.Generator
) -> tuple[slice, slice]:
    """Draw the rows and columns of a size x size crop (a side shorter than `size`: all of it), uniform in its place.

    Drawn again until it is `varied`, `tries` times at most; the last one is taken as it is.
    """
    height, width = mask.shape

    def draw() -> tuple[slice, slice]:
        top, left = (int(rng.integers(max(0, side - size) + 1)) for side in (height, width))
        return slice(top, top + size), slice(left, left + size)

    crop = draw()
    for _ in range(tries):
        if varied(mask[crop], max_share):
            break
        crop = draw()
    return crop


@dataclass(frozen=True)
class Distortion:
    """Photometric distortion of uint8 images: each step with `probability`, its result cut down to uint8.

    brightness: half-range of what is added, of 255. contrast, saturation: ranges of factors. hue: half-range in turns.
    Contrast comes before or after the two steps on colours, with equal probability.
    """

    probability: float
    brightness: float
    contrast: tuple[float, float]
    saturation: tuple[float, float]
    hue: float

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Distort an image (3, H, W) uint8."""
        import torchvision.transforms.v2.functional as tvf  # 1.3 s, and most protocols vary no colours

        if self._chance(rng):
            image = _linear(image, 1, rng.uniform(-self.brightness, self.brightness))
        contrast_first = rng.random() < 0.5
        if contrast_first and self._chance(rng):
            image = _linear(image, rng.uniform(*self.contrast), 0)
        if self._chance(rng):
            image = tvf.adjust_saturation(image, rng.uniform(*self.saturation))
        if self._chance(rng):
            image = tvf.adjust_hue(image, rng.uniform(-self.hue, self.hue))
        if not contrast_first and self._chance(rng):
            image = _linear(image, rng.uniform(*self.contrast), 0)
        return image

    def _chance(self, rng: np.random.Generator) -> bool:
        return rng.random() < self.probability


def _linear(image: Tensor, factor: float, shift: float) -> Tensor:
    return (image.float() * factor + shift).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class ScaleCropDistort:
    """Short side at `size` times a factor in `scale`, a varied crop, a flip, distorted colours, padding to size x size.

    Image Pillow bilinear, mask PyTorch's nearest: in the reference the mask is a tensor before it is resized. Padding
    is right and below: `fill` (RGB on [0, 1]) and void.
    """

    size: int
    scale: tuple[float, float]
    max_class_share: float
    crop_tries: int
    flip_probability: float
    distortion: Distortion
    fill: tuple[float, float, float]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
        """Return the image (3, size, size) in [0, 1] and the mask (size, size) of one draw of `rng`."""
        image = resize_short_side(sample.image, max(1, int(self.size * rng.uniform(*self.scale))))
        mask = resize_nearest_torch(sample.mask, image.shape[0], image.shape[1])
        crop = choose_crop(mask, self.size, self.max_class_share, self.crop_tries, rng)
        image, mask = image[crop], mask[crop]
        if rng.random() < self.flip_probability:
            image, mask = image[:, ::-1], mask[:, ::-1]
        height, width = mask.shape
        padded = torch.tensor(self.fill)[:, None, None].repeat(1, self.size, self.size)
        padded[:, :height, :width] = self.distortion(torch.from_numpy(image.copy()).permute(2, 0, 1), rng) / 255
        below, right = self.size - height, self.size - width
        return padded, np.pad(mask, ((0, below), (0, right)), constant_values=IGNORE)
