"""Views of one image: overlapping crops, colour augmentation, and the boxes of the overlaps (Pariza et al., ICLR 2025,
based on Leopart's transforms, with the choices of the official code).

There are two global and four local crops, without flip or solarisation. The first two views are always the global ones.
Boxes are (x1, y1, x2, y2), x right, y down, corners and not pixel centres. All randomness comes from the given
generator, so a view depends on (seed, epoch, image id) if the caller seeds it by these (`core.rng.item_rng`).

Deviations from the official code: for images that are too thin for sufficiently overlapping crops, rejection sampling
ends with an error, while the official code loops forever; one generator is used for all draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.functional as tf
from PIL import Image, ImageFilter
from torch import Tensor

from neco_bench.core.errors import BadInputError
from neco_bench.features.transforms import crop_size

GLOBALS = 2
ATTEMPTS = 1000


@dataclass(frozen=True)
class ViewSettings:
    """Sizes in pixels, scales as shares of the image's area, probabilities per view; defaults are the paper's."""

    global_size: int = 518
    local_size: int = 98
    locals: int = 4
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.25)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    min_overlap: float = 0.01
    jitter_probability: float = 0.8
    jitter_strength: float = 1.0
    gray_probability: float = 0.2
    blur_probability: float = 0.5
    blur_strength: float = 1.0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Output size of each view."""
        return (self.global_size,) * GLOBALS + (self.local_size,) * self.locals


@dataclass(frozen=True)
class Views:
    """Views of one image. global_views: (2, 3, g, g), local_views: (V - 2, 3, l, l), uint8 RGB.

    gc: (2, V, 4), [i, j] is the intersection of crops i and j, in pixels of view i, a global one.
    all: (V, 2, 4), [j, i] is the same in pixels of view j.
    """

    global_views: Tensor
    local_views: Tensor
    gc: Tensor
    all: Tensor


def shared_boxes(crops: np.ndarray, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Compute `gc` (2, V, 4) and `all` (V, 2, 4) of `Views`, float64, from crops (V, 4) in pixels of the image."""
    first = crops[:GLOBALS, None]
    shared = np.concatenate((np.maximum(first[..., :2], crops[:, :2]), np.minimum(first[..., 2:], crops[:, 2:])), -1)
    corner, spans = np.tile(crops[:, :2], 2), np.tile(crops[:, 2:] - crops[:, :2], 2)
    size = np.array(sizes)[:, None]
    in_global = (shared - corner[:GLOBALS, None]) * size[:GLOBALS, None] / spans[:GLOBALS, None]
    in_each = (shared - corner) * size / spans
    return in_global, in_each.swapaxes(0, 1)


def random_crop(
    width: int, height: int, scale: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a box (x1, y1, x2, y2), see `crop_size`; unlike `crop_box`, x is drawn first."""
    h, w, drawn = crop_size(rng, (height, width), scale, aspect)
    x, y = (width - w) // 2, (height - h) // 2
    if drawn:
        x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return x, y, x + w, y + h


def sample_crops(width: int, height: int, settings: ViewSettings, rng: np.random.Generator) -> np.ndarray:
    """Draw (V, 4) integer boxes in pixels of the image, each overlapping enough with every previous global one.

    With m = floor(min_overlap * width * height), a local crop shares more than m pixels with both global ones, and the
    second global one more than 2 m with the first. Raises BadInputError if `ATTEMPTS` attempts fail.
    """
    least = math.floor(settings.min_overlap * width * height)
    crops: list[tuple[int, int, int, int]] = []
    for view in range(GLOBALS + settings.locals):
        scale, needed = (settings.global_scale, 2 * least) if view < GLOBALS else (settings.local_scale, least)
        for _ in range(ATTEMPTS):
            x1, y1, x2, y2 = random_crop(width, height, scale, settings.aspect, rng)
            shared = (
                max(0, min(x2, b[2]) - max(x1, b[0])) * max(0, min(y2, b[3]) - max(y1, b[1])) for b in crops[:GLOBALS]
            )
            if all(area > needed for area in shared):
                crops.append((x1, y1, x2, y2))
                break
        else:
            raise BadInputError(
                f"no crops of this {width} x {height} image overlap enough in {ATTEMPTS} attempts: it is too thin for "
                f"crops of aspect {settings.aspect[0]:.2f} to {settings.aspect[1]:.2f}. Leave it out of the data."
            )
    return np.array(crops)


def vary_colours(image: Image.Image, settings: ViewSettings, rng: np.random.Generator) -> Image.Image:
    """Apply colour jitter (its four parts in random order), grayscale and Gaussian blur, each with its probability."""
    if rng.random() < settings.jitter_probability:
        spread = 0.8 * settings.jitter_strength
        most = min(0.5, 0.2 * settings.jitter_strength)
        brightness, contrast, saturation = rng.uniform(max(0, 1 - spread), 1 + spread, 3)
        hue = rng.uniform(-most, most)
        parts = (
            lambda im: tf.adjust_brightness(im, brightness),
            lambda im: tf.adjust_contrast(im, contrast),
            lambda im: tf.adjust_saturation(im, saturation),
            lambda im: tf.adjust_hue(im, hue),
        )
        for part in rng.permutation(len(parts)):
            image = parts[part](image)
    if rng.random() < settings.gray_probability:
        image = tf.rgb_to_grayscale(image, num_output_channels=3)
    if rng.random() < settings.blur_probability:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * settings.blur_strength))
    return image


def make_views(image: np.ndarray, settings: ViewSettings, rng: np.random.Generator) -> Views:
    """Return the views of an image (H, W, 3) uint8 RGB. Raises BadInputError for images too thin to crop."""
    picture = Image.fromarray(image)
    crops = sample_crops(picture.width, picture.height, settings, rng)
    views = []
    for (x1, y1, x2, y2), size in zip(crops.tolist(), settings.sizes, strict=True):
        crop = picture.crop((x1, y1, x2, y2)).resize((size, size), Image.Resampling.BILINEAR)
        views.append(tf.pil_to_tensor(vary_colours(crop, settings, rng)))
    gc, every = (torch.from_numpy(boxes).float() for boxes in shared_boxes(crops, settings.sizes))
    none = torch.empty(0, 3, settings.local_size, settings.local_size, dtype=torch.uint8)
    local_views = torch.stack(views[GLOBALS:]) if settings.locals else none
    return Views(torch.stack(views[:GLOBALS]), local_views, gc, every)
