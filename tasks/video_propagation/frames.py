"""How the frames of a clip become inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from neco_bench.tasks.video_propagation.settings import Settings
from PIL import Image
from torch import Tensor

from neco_bench.data.base import Sample
from neco_bench.data.video import Clip
from neco_bench.encoders.base import Encoder
from neco_bench.features.transforms import to_tensor


@dataclass(frozen=True)
class ResizeFrame:
    """Resize a frame to `size` (H, W) by OpenCV's bilinear rule or Pillow's bicubic one; the mask stays as it is."""

    size: tuple[int, int]
    rule: str  # "bilinear" or "bicubic"

    @property
    def pixels(self) -> str:
        """What a frame depends on besides its item, as `ResizeSquare.pixels`."""
        return repr(self)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
        """Return the frame (3, H, W) and its mask; `rng` is not used."""
        height, width = self.size
        image = sample.image
        if image.shape[:2] == self.size:
            return to_tensor(image), sample.mask
        if self.rule == "bilinear":
            import cv2  # takes 0.1 s

            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        else:
            image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        return to_tensor(image), sample.mask


def input_shape(encoder: Encoder, clip: Clip, settings: Settings) -> tuple[int, int]:
    """(H, W) of the input of a clip; encoders of a single square size get that, the aspect changed."""
    if encoder.only_size:
        return encoder.only_size, encoder.only_size
    return settings.input_shape(*clip.size, encoder.stride, encoder.size_multiple or encoder.stride)
