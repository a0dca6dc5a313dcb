"""Conversion of the frames of a clip to inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from neco_bench.tasks.video_propagation.settings import Settings
from PIL import Image
from torch import Tensor

from neco_bench.data.base import Sample
from neco_bench.data.video import Clip
from neco_bench.encoders.base import Encoder
from neco_bench.features.transforms import resize_image, to_tensor


@dataclass(frozen=True)
class ResizeFrame:
    """Resize a frame to `size` (H, W) by OpenCV's bilinear or Pillow's bicubic rule; the mask is not changed."""

    size: tuple[int, int]
    rule: Literal["bilinear", "bicubic"]

    @property
    def pixels(self) -> str:
        """Identify the processing of the frame, see `ResizeSquare.pixels`."""
        return repr(self)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
        """Return the frame (3, H, W) and its mask; `rng` is not used."""
        if self.rule == "bicubic":
            return resize_image(sample.image, *self.size, Image.Resampling.BICUBIC), sample.mask
        import cv2  # takes 0.1 s

        resized = cv2.resize(sample.image, self.size[::-1], interpolation=cv2.INTER_LINEAR)
        return to_tensor(resized), sample.mask


def input_shape(encoder: Encoder, clip: Clip, settings: Settings) -> tuple[int, int]:
    """Return the size (H, W) of inputs of a clip; for encoders with a single input size, the aspect ratio changes."""
    if encoder.only_size:
        return encoder.only_size, encoder.only_size
    return settings.input_shape(*clip.size, encoder.stride, encoder.size_multiple or encoder.stride)
