"""The one reader of images, masks and split lists. Every error names the file and, where known, the list naming it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from neco_bench.data.base import IGNORE
from neco_bench.errors import BadInputError, MissingError

# PIL modes with 8 bits per channel, which convert to RGB without a choice of range.
_IMAGE_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


def read_image(path: Path, *, listed_in: Path | None = None) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB.

    Grey, palette and CMYK images are converted; an alpha channel is dropped, not composited. EXIF orientation is NOT
    applied: annotations refer to the stored pixel grid. Raises MissingError (no such file; `listed_in` is the list
    that names it) and BadInputError (truncated, not an image, more than 8 bits per channel).
    """
    image = _open(path, "image", listed_in)
    if image.mode not in _IMAGE_MODES:
        raise BadInputError(
            f"Image {path} has pixel format {image.mode}, not 8 bits per channel. Convert it to 8-bit RGB."
        )
    return np.array(image.convert("RGB"))


def read_mask(
    path: Path,
    *,
    classes: int,
    void: int = IGNORE,
    size: tuple[int, int] | None = None,
    listed_in: Path | None = None,
) -> np.ndarray:
    """A mask file as (H, W) uint8 class ids 0..classes-1, IGNORE where the file holds `void`.

    Only single-channel 8-bit files: grey levels (PIL mode L) or palette indices (mode P) are the ids; colours are
    never interpreted. size: (H, W) that the mask must have. Raises MissingError and BadInputError.
    """
    image = _open(path, "mask", listed_in)
    if image.mode not in ("L", "P"):
        kind = "a colour mask" if image.mode.startswith("RGB") else f"of pixel format {image.mode}"
        raise BadInputError(
            f"Mask {path} is {kind}, but class ids are needed: 8-bit grey levels or palette indices. Use the original "
            f"annotation file, not one that was converted or drawn in colours."
        )
    mask = np.array(image)
    if size is not None and mask.shape != size:
        raise BadInputError(
            f"Mask {path} is {mask.shape[1]}x{mask.shape[0]} pixels (width x height), its image {size[1]}x{size[0]}. "
            f"One of the two was resized or belongs to another item: restore both from the original archive."
        )
    counts = np.bincount(mask.ravel(), minlength=256)
    counts[:classes] = counts[void] = 0
    wrong = np.flatnonzero(counts)
    if len(wrong):
        shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
        cause = (
            "it is a grey picture, or was resized with interpolation or saved as JPEG"
            if len(wrong) > classes
            else "it follows another id mapping (another version of the data set, or ids shifted by one)"
        )
        raise BadInputError(
            f"Mask {path} holds the values {shown} in {counts.sum()} pixels; allowed are class ids 0..{classes - 1} "
            f"and {void} for void. Likely {cause}: restore the original file."
        )
    if void != IGNORE:
        mask[mask == void] = IGNORE
    return mask


def _open(path: Path, what: str, listed_in: Path | None) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        named = f", which {listed_in} names" if listed_in else ""
        raise MissingError(f"There is no {what} {path}{named}. Restore it from the original archive.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises on bad bytes
        raise BadInputError(
            f"Cannot decode {what} {path}: {error}. The file is truncated or not an image: restore it."
        ) from error
