"""The training augmentation and the resizing rule of Segmenter, which are mmseg's of its time.

Resizing is bilinear without antialiasing, as OpenCV's is. (Pillow's, which other families use, is antialiased.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from neco_bench.tasks.linear_segmentation.dinov3_augment import choose_crop
from PIL import Image
from torch import Tensor

from neco_bench.data.base import IGNORE, Sample
from neco_bench.features.transforms import resize_nearest_torch, to_tensor


def size_within(height: int, width: int, short: float, long: float) -> tuple[int, int]:
    """Scale (height, width), aspect kept, to the largest size within a box `short` by `long`, halves rounded up."""
    factor = min(short / min(height, width), long / max(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (height, width, 3) uint8, bilinear, not antialiased."""
    if image.shape[:2] == (height, width):
        return image
    large = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(large, (height, width), mode="bilinear", align_corners=False)
    return resized[0].round_().to(torch.uint8).permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class Distortion:
    """Photometric distortion, each step with `probability`, its result cut down to uint8.

    brightness: half-range of what is added, of 255. contrast, saturation: ranges of factors, the latter of HSV's
    saturation. hue: half-range in turns. Contrast comes before or after the two steps on colours, with equal
    probability.
    """

    probability: float
    brightness: float
    contrast: tuple[float, float]
    saturation: tuple[float, float]
    hue: float

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
            image = _recolour(image, factor, turn)
        if not contrast_first and chance():
            image = _linear(image, rng.uniform(*self.contrast), 0)
        return image


def _linear(image: np.ndarray, factor: float, shift: float) -> np.ndarray:
    return np.clip(image.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)


def _recolour(image: np.ndarray, saturation: float, turn: float) -> np.ndarray:
    """Scale the saturation of HSV, and turn its hue."""
    hue, strength, value = Image.fromarray(image).convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + np.uint8(round(turn * 256) % 256))  # around the circle
    strength = Image.fromarray(_linear(np.asarray(strength), saturation, 0))
    return np.asarray(Image.merge("HSV", (hue, strength, value)).convert("RGB"))


@dataclass(frozen=True)
class ScaleCropDistort:
    """Resize within a box times a factor in `scale`, a varied crop, a flip, distorted colours, padding to size x size.

    Padding is right and below: `fill` (RGB on [0, 1]) and void.
    """

    size: int
    box: tuple[float, float]
    scale: tuple[float, float]
    max_class_share: float
    crop_tries: int
    flip_probability: float
    distortion: Distortion
    fill: tuple[float, float, float]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
        """Return the image (3, size, size) in [0, 1] and the mask (size, size) of one draw of `rng`."""
        factor = rng.uniform(*self.scale)
        height, width = sample.mask.shape
        height, width = size_within(height, width, factor * self.box[0], factor * self.box[1])
        image = resize_bilinear(sample.image, height, width)
        mask = resize_nearest_torch(sample.mask, height, width)
        crop = choose_crop(mask, self.size, self.max_class_share, self.crop_tries, rng)
        image, mask = image[crop], mask[crop]
        if rng.random() < self.flip_probability:
            image, mask = image[:, ::-1], mask[:, ::-1]
        height, width = mask.shape
        padded = torch.tensor(self.fill)[:, None, None].repeat(1, self.size, self.size)
        padded[:, :height, :width] = to_tensor(self.distortion(np.ascontiguousarray(image), rng))
        below, right = self.size - height, self.size - width
        return padded, np.pad(mask, ((0, below), (0, right)), constant_values=IGNORE)
