"""Training augmentation of hummingbird's evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance
from torch import Tensor

from neco_bench.data.base import Sample
from neco_bench.features.transforms import crop_box, resize_nearest_torch, resize_tensor, to_tensor


# These four functions are what torchvision does with Pillow's images. It is not imported for them: that takes 1.3 s, as
# it brings PyTorch's compiler.
def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Multiply all pixels by `factor`."""
    return ImageEnhance.Brightness(image).enhance(factor)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Multiply the distances to the mean grey level by `factor`."""
    return ImageEnhance.Contrast(image).enhance(factor)


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Multiply the distances to the pixels' own grey levels by `factor`."""
    return ImageEnhance.Color(image).enhance(factor)


def adjust_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turn the hue by `turn` of the circle, in steps of 1/256, towards zero."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turn * 255)  # 255 as in torchvision
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


@dataclass(frozen=True)
class HummingbirdTrain:
    """Memory-side augmentation of open-hummingbird-eval v2: four independent jitters, then a random resized crop.

    The crop acts on the float image (bilinear, antialias) after the jitter, as there; normalising before or after the
    crop is the same up to rounding, since both are affine. Saturation and hue are changed in the crop alone.
    """

    size: int
    jitter: float  # half-range of the brightness, contrast, saturation and hue factors
    jitter_probability: float
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
        """Return the image (3, size, size) in [0, 1] and the mask (size, size) of one draw of `rng`."""
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
            if step == 2:  # contrast depends on the mean of the whole image, the later steps on each pixel alone
                image = image.crop((left, top, left + width, top + height))
            if apply:
                image = adjust(image, factor)
        tensor = resize_tensor(to_tensor(np.asarray(image)), self.size, self.size)
        mask = sample.mask[top : top + height, left : left + width]
        return tensor, resize_nearest_torch(mask, self.size, self.size)
