"""Convert frames with targets to inputs of an encoder: crop, size, padding, and augmentation.

Targets are converted to bytes, (H, 4 W) uint8 for depth or (H, 12 W) for normals, because the feature store stores
masks as bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from neco_bench.tasks.dense_regression.settings import Settings
from PIL import Image
from torch import Tensor

from neco_bench.core.errors import BadInputError, UsageError
from neco_bench.data.dense import DenseDataset, DenseSample
from neco_bench.encoders.base import Encoder
from neco_bench.features.transforms import resize_image, resize_tensor, to_tensor

KB_SIZE = (352, 1216)  # height and width in KITTI's benchmark; frames are cropped to it at the bottom, in the middle

# The region of NYU frames that BTS uses for training: rows and columns of 480 x 640.
NYU_REGION = ((45, 472), (43, 608))


def pack(target: np.ndarray) -> np.ndarray:
    """Return depth (H, W) or normals (H, W, 3), float32, as rows of bytes."""
    return np.ascontiguousarray(target, np.float32).reshape(len(target), -1).view(np.uint8)


def unpack(packed: np.ndarray, kind: str) -> np.ndarray:
    """Invert `pack`."""
    values = np.ascontiguousarray(packed).view(np.float32)
    return values if kind == "depth" else values.reshape(len(values), -1, 3)


def crop_frame(array: np.ndarray, frame: str) -> np.ndarray:
    """Return the used part of a frame (H, W, ...): "whole", "kb" (KB_SIZE) or "centre_square" (side: its height).

    Raises BadInputError if the frame is smaller.
    """
    height, width = array.shape[:2]
    if frame == "kb":
        top, left = height - KB_SIZE[0], int((width - KB_SIZE[1]) / 2)
        if top < 0 or width < KB_SIZE[1]:
            raise BadInputError(f"A frame is {width}x{height} pixels, smaller than the crop of KITTI, 1216x352.")
        return array[top:, left : left + KB_SIZE[1]]
    if frame == "centre_square":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return array[top : top + side, left : left + side]
    return array


@dataclass(frozen=True)
class InputGrid:
    """Position of an image in the input of an encoder; sizes are (height, width) in pixels.

    inner: size of the image. size: size of the input, rounded up to a multiple that the encoder needs. The image is
    centred; its surroundings have the mean colour, which is 0 after normalisation.
    """

    inner: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def of(cls, inner: tuple[int, int], encoder: Encoder) -> InputGrid:
        """Return the grid for images of a size; for encoders with a single input size, images are resized to it."""
        if encoder.only_size:
            return cls((encoder.only_size,) * 2, (encoder.only_size,) * 2)
        multiple = encoder.size_multiple or encoder.stride
        return cls(inner, tuple(side + -side % multiple for side in inner))  # type: ignore[arg-type]

    @property
    def corner(self) -> tuple[int, int]:
        """Position (top, left) of the image in the input."""
        return (self.size[0] - self.inner[0]) // 2, (self.size[1] - self.inner[1]) // 2

    def place(self, image: Tensor, fill: tuple[float, float, float]) -> Tensor:
        """Put an image (3, H, W) into an input; resize it first (bilinear, antialiased) if it has another size."""
        if image.shape[1:] != self.inner:
            image = resize_tensor(image, *self.inner)
        if self.inner == self.size:
            return image
        (top, left), (height, width) = self.corner, self.inner
        placed = torch.tensor(fill)[:, None, None].repeat(1, *self.size)
        placed[:, top : top + height, left : left + width] = image
        return placed


@dataclass(frozen=True)
class Frame:
    """The used part of frames, resized to `height` pixels, with the same aspect ratio.

    part: see `crop_frame`. cropped: size (height, width) of the part before resizing, the same for all items.
    """

    part: str
    cropped: tuple[int, int]
    height: int

    @classmethod
    def of(cls, dataset: DenseDataset, settings: Settings, stride: int) -> Frame:
        """Return the frame of a data set, whose items must have the same size after `crop_frame`."""
        height, width = crop_frame(dataset[0].image, settings.frame).shape[:2]
        return cls(settings.frame, (height, width), settings.used_height(stride))

    @property
    def scale(self) -> float:
        """Factor from the original to the resized frame."""
        return self.height / self.cropped[0]

    @property
    def resized(self) -> tuple[int, int]:
        """Size (height, width) of the resized frame."""
        return self.height, max(1, round(self.cropped[1] * self.scale))

    def cut(self, sample: DenseSample) -> tuple[np.ndarray, np.ndarray]:
        """Return the used part of image and target. Raises BadInputError if its size is not `cropped`."""
        image, target = (crop_frame(array, self.part) for array in (sample.image, sample.target))
        if image.shape[:2] != self.cropped:
            raise BadInputError(
                f"Frame {sample.id!r} is {image.shape[1]}x{image.shape[0]} pixels, but others of its data set are "
                f"{self.cropped[1]}x{self.cropped[0]}: all must have the same size. Restore the original files."
            )
        return image, target


@dataclass(frozen=True)
class FrameInput:
    """Make the input of a frame, and its target at the frame's size."""

    frame: Frame
    grid: InputGrid
    fill: tuple[float, float, float]

    @property
    def size(self) -> tuple[int, int]:
        """Size (height, width) of the input, for the feature store."""
        return self.grid.size

    @property
    def pixels(self) -> str:
        """Identify the processing of the frame, see `ResizeSquare.pixels`."""
        return repr(self)

    def __call__(self, sample: DenseSample, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
        """Return the input (3, H, W) in [0, 1] and the packed target; `rng` is not used."""
        image, target = self.frame.cut(sample)
        return self.grid.place(resize_image(image, *self.frame.resized), self.fill), pack(target)


@dataclass(frozen=True)
class Augment:
    """Random rotation, flip, crop and colours of a frame and its target, in the order of BTS (Lee et al., 2019).

    grid: position of the crop in the input. The target has the size of the crop.
    """

    frame: Frame
    grid: InputGrid
    fill: tuple[float, float, float]
    crop: tuple[int, int]
    settings: Settings

    @property
    def size(self) -> tuple[int, int]:
        """Size (height, width) of the input, for the feature store."""
        return self.grid.size

    def __call__(self, sample: DenseSample, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
        """Return the input (3, H, W) in [0, 1] and the packed target, drawn by `rng`."""
        s = self.settings
        image, target = self.frame.cut(sample)
        image, target = _resized(image, self.frame.resized), resize_target(target, self.frame.resized)
        if s.train_region == "nyu":
            rows, columns = region_slices(NYU_REGION, target.shape)
            image, target = image[rows, columns], target[rows, columns]
        if rng.random() < s.rotation_probability:
            angle = rng.uniform(-s.rotation_degrees, s.rotation_degrees)
            image = np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR))
            target = np.asarray(Image.fromarray(target).rotate(angle, Image.Resampling.NEAREST))
        if rng.random() < s.flip_probability:
            image, target = image[:, ::-1], mirrored(target)
        top, left = (int(rng.integers(side - used + 1)) for side, used in zip(target.shape[:2], self.crop, strict=True))
        place = (slice(top, top + self.crop[0]), slice(left, left + self.crop[1]))
        image, target = image[place], target[place]
        pixels = self._coloured(np.ascontiguousarray(image), rng)
        if rng.random() < s.resized_crop_probability:
            pixels, target = _resized_crop(pixels, target, s.resized_crop_area, rng)
        return self.grid.place(pixels, self.fill), pack(target)

    def _coloured(self, image: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Change the colours of an image (H, W, 3) uint8: (3, H, W) float32 in [0, 1]."""
        s, pixels = self.settings, to_tensor(image)
        if s.colour == "none" or rng.random() >= s.colour_probability:
            return pixels
        if s.colour == "jitter":
            return _jittered(pixels, s.jitter, rng)
        values = (255 * pixels).pow(rng.uniform(*s.gamma)) * rng.uniform(*s.brightness)
        values *= torch.from_numpy(rng.uniform(*s.channels, 3).astype(np.float32))[:, None, None]
        return values.clamp(0, 255) / 255


def train_crop(frame: Frame, settings: Settings) -> tuple[int, int]:
    """Return the size (height, width) of crops of a resized frame. Raises UsageError if they do not fit in it."""
    height, width = frame.resized
    if settings.train_region == "nyu":
        rows, columns = region_slices(NYU_REGION, frame.resized)
        height, width = rows.stop - rows.start, columns.stop - columns.start
    if settings.crop is None:
        return height, width
    used = tuple(round(side * frame.scale) for side in settings.crop)
    if used[0] > height or used[1] > width or not all(used):
        raise UsageError(
            f"crop={used[0]},{used[1]} does not fit into {height}x{width} pixels. Lower it with --set crop."
        )
    return used  # type: ignore[return-value]


def region_slices(region: tuple[tuple[int, int], tuple[int, int]], shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Return rows and columns of a region of 480 x 640, scaled for other shapes."""
    scales = shape[0] / 480, shape[1] / 640
    rows, columns = (slice(*(round(end * scale) for end in ends)) for ends, scale in zip(region, scales, strict=True))
    return rows, columns


def resize_target(target: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize depth (H, W) or normals (H, W, 3) by the nearest rule that samples cell centres."""
    if target.shape[:2] == size:
        return target
    index = [
        np.minimum(((np.arange(side) + 0.5) * own / side).astype(int), own - 1)
        for own, side in zip(target.shape[:2], size, strict=True)
    ]
    return target[index[0]][:, index[1]]


def mirrored(target: np.ndarray) -> np.ndarray:
    """Return the target of the mirrored image; the x of normals changes its sign."""
    flipped = target[:, ::-1]
    return flipped if target.ndim == 2 else flipped * np.array([-1, 1, 1], np.float32)


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def _jittered(pixels: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue by up to `strength`, in random order, as torchvision does."""
    import torchvision.transforms.v2.functional as tvf  # 1.3 s, and most protocols do not change colours

    low, high = 1 - strength, 1 + strength
    steps = (
        lambda image: tvf.adjust_brightness(image, rng.uniform(low, high)),
        lambda image: tvf.adjust_contrast(image, rng.uniform(low, high)),
        lambda image: tvf.adjust_saturation(image, rng.uniform(low, high)),
        lambda image: tvf.adjust_hue(image, rng.uniform(-strength, strength)),
    )
    for number in rng.permutation(len(steps)):
        pixels = steps[number](pixels)
    return pixels


def _resized_crop(
    pixels: Tensor, target: np.ndarray, area: tuple[float, float], rng: np.random.Generator
) -> tuple[Tensor, np.ndarray]:
    """Crop a square with a share of the area, and resize it back by the nearest rule; depths are not changed."""
    height, width = target.shape[:2]
    side = min(height, width, max(1, round((height * width * rng.uniform(*area)) ** 0.5)))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    cut = pixels[:, top : top + side, left : left + side].permute(1, 2, 0).numpy()
    image = torch.from_numpy(np.ascontiguousarray(resize_target(cut, (height, width)))).permute(2, 0, 1)
    return image.contiguous(), resize_target(target[top : top + side, left : left + side], (height, width))
