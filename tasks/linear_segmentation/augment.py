"""Training augmentation of the `neco-1` linear probe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from neco_bench.data.base import Sample
from neco_bench.features.transforms import crop_box, resize_image, resize_nearest_pil


@dataclass(frozen=True)
class CropFlip:
    """Random resized crop (image Pillow bilinear, mask Pillow nearest) and horizontal flip, as NeCo trains its head."""

    size: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip_probability: float

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
        """Return the image (3, size, size) in [0, 1] and the mask (size, size), drawn by `rng`."""
        top, left, height, width = crop_box(rng, sample.mask.shape, self.crop_scale, self.crop_ratio)
        crop = slice(top, top + height), slice(left, left + width)
        image = resize_image(sample.image[crop], self.size, self.size)
        mask = resize_nearest_pil(sample.mask[crop], self.size, self.size)
        if rng.random() < self.flip_probability:
            return image.flip(-1), mask[:, ::-1].copy()
        return image, mask
