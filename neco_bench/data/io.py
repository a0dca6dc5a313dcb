"""The one reader of images, masks and MATLAB files. Every error names the file and, where known, the list naming it."""

from __future__ import annotations

from collections.abc import Mapping
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
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def read_size(path: Path, *, listed_in: Path | None = None) -> tuple[int, int]:
    """(H, W) of an image file, of which nothing more is read. Raises like `read_image` where it is not an image."""
    width, height = _open(path, "image", listed_in, whole=False).size
    return height, width


def id_table(classes: Mapping[int, int]) -> np.ndarray:
    """(n,) int16 class id of each file value from {file value: class id or IGNORE}; -1 for values not in it.

    n is 256, or 65,536 where a value needs 16 bits.
    """
    table = np.full(256 if max(classes) < 256 else 65536, -1, np.int16)
    table[list(classes)] = list(classes.values())
    return table


def read_mask(
    path: Path,
    *,
    table: np.ndarray,
    causes: Mapping[int, str] | None = None,
    size: tuple[int, int] | None = None,
    listed_in: Path | None = None,
) -> np.ndarray:
    """A mask file as (H, W) uint8 class ids, `table[file value]` (see `id_table`).

    Only single-channel files of 8 bits, or of 16 bits where the table has 65,536 entries: grey levels or palette
    indices are the values; colours are never interpreted. causes: {wrong value: what the file then is}, for messages.
    size: (H, W) that the mask must have. Raises MissingError and BadInputError.
    """
    image = _open(path, "mask", listed_in)
    if image.mode not in ("L", "P", *(("I;16", "I") if len(table) > 256 else ())):
        kind = "a colour mask" if image.mode.startswith("RGB") else f"of pixel format {image.mode}"
        raise BadInputError(
            f"Mask {path} is {kind}, but class ids are needed: 8-bit grey levels or palette indices. Use the original "
            f"annotation file, not one that was converted or drawn in colours."
        )
    return map_ids(np.array(image), path, table=table, causes=causes, size=size)


def map_ids(
    mask: np.ndarray,
    path: Path,
    *,
    table: np.ndarray,
    causes: Mapping[int, str] | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """What `read_mask` does with the values of a mask once `path` is read."""
    if size is not None and mask.shape != size:
        raise BadInputError(
            f"Mask {path} is {mask.shape[1]}x{mask.shape[0]} pixels (width x height), its image {size[1]}x{size[0]}. "
            f"One of the two was resized or belongs to another item: restore both from the original archive."
        )
    mapped = table.take(mask)
    if (mapped < 0).any():
        wrong = np.unique(mask[mapped < 0])
        shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
        allowed = np.flatnonzero(table >= 0)
        classes = sum(table[allowed] != IGNORE)
        cause = (
            "it is a grey picture, or was resized with interpolation or saved as JPEG"
            if len(wrong) > classes
            else "it follows another id mapping (another version of the data set, or ids shifted by one)"
        )
        cause = next((text for value, text in (causes or {}).items() if value in wrong), cause)
        raise BadInputError(
            f"Mask {path} holds the values {shown} in {(mapped < 0).sum()} pixels; allowed are {_ranges(allowed)}. "
            f"Likely {cause}: restore the original file."
        )
    return mapped.astype(np.uint8)


def _ranges(values: np.ndarray) -> str:
    """0, 1, 2, 255 as "0..2, 255"."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def read_mat(path: Path) -> dict[str, np.ndarray]:
    """The variables of a MATLAB file. Raises MissingError and BadInputError."""
    from scipy.io import loadmat

    try:
        return loadmat(str(path), appendmat=False)
    except FileNotFoundError:
        raise MissingError(f"There is no file {path}. Restore it from the original archive.") from None
    except Exception as error:  # scipy raises anything on bad bytes
        raise BadInputError(f"{path} is not a readable MATLAB file: {error}. Restore it.") from error


def _open(path: Path, what: str, listed_in: Path | None, *, whole: bool = True) -> Image.Image:
    try:
        with Image.open(path) as image:
            if whole:
                image.load()
            return image
    except FileNotFoundError:
        named = f", which {listed_in} names" if listed_in else ""
        raise MissingError(f"There is no {what} {path}{named}. Restore it from the original archive.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises on bad bytes
        raise BadInputError(
            f"Cannot decode {what} {path}: {error}. The file is truncated or not an image: restore it."
        ) from error
