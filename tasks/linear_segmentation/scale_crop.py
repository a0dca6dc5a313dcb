"""The training augmentation of mmseg: rescale, crop, flip, distort colours, pad. With the changes that DINOv3 made.

DINOv3 (facebookresearch/dinov3) resizes the short side, antialiased, and blends colours with grey to change the
saturation; mmseg resizes into a box, without antialiasing, and scales the saturation of HSV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from neco_bench.data.base import IGNORE, Sample
from neco_bench.features.transforms import resize_nearest_torch, to_tensor


def short_side_size(height: int, width: int, short: int) -> tuple[int, int]:
    """Scale (height, width) in proportion until the short side is `short` pixels; halves are rounded up."""
    low, high = sorted((height, width))
    long = (2 * short * high + low) // (2 * low)
    return (short, long) if height <= width else (long, short)


def resize_short_side(image: np.ndarray, short: int) -> np.ndarray:
    """Resize an image (H, W, 3) uint8 to a short side of `short` pixels, Pillow bilinear (antialiased)."""
    height, width = short_side_size(image.shape[0], image.shape[1], short)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def size_within(height: int, width: int, short: float, long: float) -> tuple[int, int]:
    """Scale (height, width) in proportion to the largest size whose sides do not exceed `short` and `long`; halves are
    rounded up."""
    factor = min(short / min(height, width), long / max(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (height, width, 3) uint8, bilinear without antialiasing, as OpenCV does."""
    if image.shape[:2] == (height, width):
        return image
    large = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(large, (height, width), mode="bilinear", align_corners=False)
    return resized[0].round_().to(torch.uint8).permute(1, 2, 0).numpy()


def varied(mask: np.ndarray, max_share: float) -> bool:
    """Return whether a mask has two or more classes, each with less than `max_share` of the labelled pixels."""
    counts = np.bincount(mask[mask != IGNORE])
    return bool(np.count_nonzero(counts) >= 2 and counts.max() < max_share * counts.sum())


def choose_crop(
    mask: np.ndarray, size: int, max_share: float, tries: int, rng: np.random.Generator
) -> tuple[slice, slice]:
    """Draw the rows and columns of a size x size crop, with uniform position; sides shorter than `size` stay whole.

    The crop is drawn again, at most `tries` times, until it is `varied`.
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
    """Photometric distortion of uint8 images: each step happens with `probability`, and its result is cut to uint8.

    brightness: half-range of the value that is added, of 255. contrast, saturation: ranges of factors. hue: half-range
    in turns. hsv: change colours in HSV as mmseg does; otherwise as torchvision does. Contrast changes before or after
    the colours, with equal probability.
    """

    probability: float
    brightness: float
    contrast: tuple[float, float]
    saturation: tuple[float, float]
    hue: float
    hsv: bool = False

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Distort an image (H, W, 3) uint8."""

        def chance() -> bool:
            return rng.random() < self.probability

        if chance():
            image = _linear(image, 1, rng.uniform(-self.brightness, self.brightness))
        contrast_first = rng.random() < 0.5
        if contrast_first and chance():
            image = _linear(image, rng.uniform(*self.contrast), 0)
        factor = rng.uniform(*self.saturation) if chance() else 1.0
        turn = rng.uniform(-self.hue, self.hue) if chance() else 0.0
        if factor != 1 or turn:
            image = (recolour_hsv if self.hsv else _recolour_torchvision)(image, factor, turn)
        if not contrast_first and chance():
            image = _linear(image, rng.uniform(*self.contrast), 0)
        return image


def _linear(image: np.ndarray, factor: float, shift: float) -> np.ndarray:
    return np.clip(image.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)


def recolour_hsv(image: np.ndarray, saturation: float, turn: float) -> np.ndarray:
    """Scale the saturation and turn the hue of an image (H, W, 3) uint8 in HSV."""
    hue, strength, value = Image.fromarray(image).convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + np.uint8(round(turn * 256) % 256))  # around the circle
    strength = Image.fromarray(_linear(np.asarray(strength), saturation, 0))
    return np.asarray(Image.merge("HSV", (hue, strength, value)).convert("RGB"))


def _recolour_torchvision(image: np.ndarray, saturation: float, turn: float) -> np.ndarray:
    """Blend an image (H, W, 3) uint8 with its grey version, then turn its hue."""
    import torchvision.transforms.v2.functional as tvf  # 1.3 s, and most protocols do not change colours

    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
    pixels = tvf.adjust_saturation(pixels, saturation) if saturation != 1 else pixels
    pixels = tvf.adjust_hue(pixels, turn) if turn else pixels
    return pixels.permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class ScaleCropDistort:
    """Rescale by a random factor, take a varied crop, flip, distort colours, and pad to size x size.

    box: the image is resized to the largest size within (short, long) times a factor in `scale`, without antialiasing,
    as mmseg does; None: its short side is resized to `size` times the factor, Pillow bilinear, as DINOv3 does. Masks
    are resized by PyTorch's nearest rule. Padding at the right and bottom is `fill` (RGB in [0, 1]) and void.
    """

    size: int
    scale: tuple[float, float]
    max_class_share: float
    crop_tries: int
    flip_probability: float
    distortion: Distortion
    fill: tuple[float, float, float]
    box: tuple[float, float] | None = None

    @classmethod
    def of(
        cls, settings: Any, size: int, fill: tuple[float, float, float], box: tuple[float, float] | None = None
    ) -> ScaleCropDistort:
        """Return the augmentation with the constants of a protocol."""
        s = settings
        colours = Distortion(s.distortion_probability, s.brightness, s.contrast, s.saturation, s.hue, hsv=bool(box))
        return cls(size, s.scale, s.max_class_share, s.crop_tries, s.flip_probability, colours, fill, box)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
        """Return the image (3, size, size) in [0, 1] and the mask (size, size), drawn by `rng`."""
        factor = rng.uniform(*self.scale)
        if self.box is None:
            image = resize_short_side(sample.image, max(1, int(self.size * factor)))
        else:
            height, width = sample.mask.shape
            short, long = (factor * side for side in self.box)
            image = resize_bilinear(sample.image, *size_within(height, width, short, long))
        mask = resize_nearest_torch(sample.mask, *image.shape[:2])
        crop = choose_crop(mask, self.size, self.max_class_share, self.crop_tries, rng)
        image, mask = image[crop], mask[crop]
        if rng.random() < self.flip_probability:
            image, mask = image[:, ::-1], mask[:, ::-1]
        height, width = mask.shape
        padded = torch.tensor(self.fill)[:, None, None].repeat(1, self.size, self.size)
        padded[:, :height, :width] = to_tensor(self.distortion(np.ascontiguousarray(image), rng))
        below, right = self.size - height, self.size - width
        return padded, np.pad(mask, ((0, below), (0, right)), constant_values=IGNORE)
