"""Training augmentation of hummingbird's evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance
from torch import Tensor

from neco_bench.data.base import Sample
from neco_bench.features.transforms import crop_box, resize_nearest_torch, resize_tensor, to_tensor


# These four functions do the same as torchvision's for Pillow images, without its import, which takes 1.3 s.
def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Multiply all pixels by `factor`."""
    return ImageEnhance.Brightness(image).enhance(factor)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Multiply the differences to the mean grey level by `factor`."""
    return ImageEnhance.Contrast(image).enhance(factor)


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Multiply the differences to the grey level of each pixel by `factor`."""
    return ImageEnhance.Color(image).enhance(factor)


def adjust_hue(image: Image.Image, turn: float) -> Image.Image:
    """Rotate the hue by `turn` of the circle, rounded towards zero to steps of 1/256."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turn * 255)  # 255 as in torchvision
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


@dataclass(frozen=True)
class HummingbirdTrain:
    """Augmentation of memory images in open-hummingbird-eval v2: four independent jitters, then a random resized crop.

    As there, the crop is resized as a float image (bilinear, antialiased) after the jitter. jitter: half-range of the
    factors of brightness, contrast and saturation, and of the rotation of the hue. To save time, saturation and hue are
    changed only in the crop.
    """

    size: int
    jitter: float
    jitter_probability: float
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
        """Return the image (3, size, size) in [0, 1] and the mask (size, size), drawn by `rng`."""
        jitters = [
            (adjust, rng.random() < self.jitter_probability, centre + rng.uniform(-self.jitter, self.jitter))
            for adjust, centre in (
                (adjust_brightness, 1.0),
                (adjust_contrast, 1.0),
                (adjust_saturation, 1.0),
                (adjust_hue, 0.0),
            )
        ]
        top, left, height, width = crop_box(rng, sample.mask.shape, self.crop_scale, self.crop_ratio)
        image = Image.fromarray(sample.image)
        for step, (adjust, apply, factor) in enumerate(jitters):
            if step == 2:  # contrast depends on the mean of the whole image, the next steps only on each pixel
                image = image.crop((left, top, left + width, top + height))
            if apply:
                image = adjust(image, factor)
        tensor = resize_tensor(to_tensor(np.asarray(image)), self.size, self.size)
        mask = sample.mask[top : top + height, left : left + width]
        return tensor, resize_nearest_torch(mask, self.size, self.size)
