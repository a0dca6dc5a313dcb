"""Readers of images, masks, lists, JSON and MATLAB files, which all data sets use.

Error messages contain the file and, if known, the list that names it. `decoding` turns every error that wrong content
causes into a BadInputError.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError
from neco_bench.data.base import IGNORE
from neco_bench.data.matlab import parse_matlab
from neco_bench.data.png import GREY, RGB, read_plain_png

T = TypeVar("T")

RESTORE = "Restore it from the original archive."

# Pillow's modes with 8 bits per channel; converting them to RGB does not need a range of values.
_IMAGE_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


@contextlib.contextmanager
def decoding(wrong: str, fix: str = RESTORE) -> Iterator[None]:
    """Turn any error raised inside into BadInputError("<wrong>: <error>. <fix>").

    NecoBenchError and FileNotFoundError are not changed.
    """
    try:
        yield
    except (NecoBenchError, FileNotFoundError):
        raise
    except Exception as error:  # decoders raise anything on bad bytes
        text = str(error)
        if isinstance(error, OSError) and error.errno is not None:  # an error of the file system, not of a decoder
            text, fix = error.strerror or text, "Make it readable."
        raise BadInputError(f"{wrong}: {type(error).__name__}: {_shown(text)}. {fix}") from error


def _shown(text: str) -> str:
    """Return a text as one line of at most 300 characters."""
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split()).rstrip(".")
    return line if len(line) <= 300 else f"{line[:300]}..."


def read_image(path: Path, *, listed_in: Path | None = None) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 RGB.

    Grey, palette and CMYK images are converted; an alpha channel is dropped, not composited. EXIF orientation is NOT
    applied: annotations refer to the stored pixel grid. Raises MissingError (no such file; `listed_in` is the list
    that names it) and BadInputError (truncated, not an image, more than 8 bits per channel).
    """
    pixels = read_plain_png(path, RGB)
    if pixels is not None:
        return pixels
    image = open_image(path, "image", listed_in)
    if image.mode not in _IMAGE_MODES:
        raise BadInputError(
            f"Image {path} has pixel format {image.mode}, not 8 bits per channel. Convert it to 8-bit RGB."
        )
    with decoding(f"Cannot decode image {path}"):
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def read_size(path: Path, *, listed_in: Path | None = None) -> tuple[int, int]:
    """Read only the size (H, W) of an image file. Raises MissingError, and BadInputError if it is not an image."""
    width, height = open_image(path, "image", listed_in, whole=False).size
    return height, width


def id_table(classes: Mapping[int, int]) -> np.ndarray:
    """Return the class id of each file value, (n,) int16, from {file value: class id or IGNORE}; -1 for other values.

    n is 256, or 65,536 if a value needs 16 bits.
    """
    table = np.full(256 if max(classes) < 256 else 65536, -1, np.int16)
    table[list(classes)] = list(classes.values())
    return table


def read_mask(
    path: Path,
    *,
    table: np.ndarray,
    colours: np.ndarray | None = None,
    known_palette: bool = True,
    causes: Mapping[int, str] | None = None,
    size: tuple[int, int] | None = None,
    listed_in: Path | None = None,
) -> np.ndarray:
    """Read a mask file as (H, W) uint8 class ids.

    Args:
        path: a single-channel file of 8 bits (of 16 if the table has 65,536 entries); its values are grey levels or
            palette indices.
        table: class id of each file value, see `id_table`.
        colours: (256, 3) uint8, the data set's colour of each file value, for `check_palette`.
        known_palette: whether to check the palette of the file.
        causes: {wrong value: likely cause}, for messages.
        size: (H, W) that the mask must have.
        listed_in: the list that names the file, for messages.

    Raises MissingError and BadInputError.
    """
    levels = read_plain_png(path, GREY)
    if levels is not None:
        return map_ids(levels, path, table=table, causes=causes, size=size)
    image = open_image(path, "mask", listed_in)
    if image.mode not in ("L", "P", *(("I;16", "I") if len(table) > 256 else ())):
        kind = "a colour mask" if image.mode.startswith("RGB") else f"of pixel format {image.mode}"
        raise BadInputError(
            f"Mask {path} is {kind}, but class ids are needed: 8-bit grey levels or palette indices. Use the original "
            f"annotation file, not one that was converted or drawn in colours."
        )
    with decoding(f"Cannot decode mask {path}"):
        mask = np.array(image)
    mapped = map_ids(mask, path, table=table, causes=causes, size=size)
    if image.mode == "P" and known_palette:
        check_palette(image, np.flatnonzero(image.histogram()), path, colours)
    return mapped


def voc_colours(count: int) -> np.ndarray:
    """Return VOC's palette, (count, 3) uint8: the bits of octal digit b of an id are bit 7-b of red, green and blue."""
    ids = np.arange(count)[:, None]
    bits = [((ids >> (3 * b + np.arange(3))) & 1) << (7 - b) for b in range(3)]
    return np.sum(bits, axis=0).astype(np.uint8)


def check_palette(image: Image.Image, used: np.ndarray, path: Path, colours: np.ndarray | None = None) -> None:
    """Raise BadInputError if a used palette index has neither VOC's colour, nor its grey level, nor that in `colours`.

    A program that saves a mask again may remove unused colours and number the others from 0; the colours are then
    right, but the indices are wrong.
    """
    with decoding(f"Cannot decode mask {path}"):
        palette = np.full((256, 3), -1, np.int16)
        stored = np.array(image.getpalette("RGB") or [], np.int16).reshape(-1, 3)
        palette[: len(stored)] = stored
    grey_levels = np.repeat(np.arange(256)[:, None], 3, axis=1)
    known = [voc_colours(256), grey_levels, *(() if colours is None else (colours,))]
    right = np.any([(palette[used] == table[used]).all(axis=1) for table in known], axis=0)
    if not right.all():
        index = used[~right][0]
        colour = tuple(palette[index].tolist()) if index < len(stored) else "none"
        expected = " or ".join(dict.fromkeys(str(tuple(table[index].tolist())) for table in known))
        raise BadInputError(
            f"Mask {path} is a palette image whose colours are not those of the data set: index {index} has the colour "
            f"{colour}, expected {expected}. It was likely saved again with another palette, so that its indices are "
            f"no class ids. Use the original annotation file."
        )


def map_ids(
    mask: np.ndarray,
    path: Path,
    *,
    table: np.ndarray,
    causes: Mapping[int, str] | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Return the class ids (H, W) uint8 of the values in a mask file. Arguments and errors: see `read_mask`."""
    if size is not None:
        check_shape(path, mask.shape, size, "Mask")
    if mask.dtype == np.uint8:
        mapped = table.take(mask)
    else:
        mapped = np.where((mask < 0) | (mask >= len(table)), -1, table.take(mask, mode="clip"))
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


def check_shape(path: Path, shape: tuple[int, ...], size: tuple[int, ...], what: str) -> None:
    """Raise BadInputError if a mask or map (`what`) has another shape than its image."""
    if shape != size:
        raise BadInputError(
            f"{what} {path} is {shape[1]}x{shape[0]} pixels (width x height), but its image is {size[1]}x{size[0]}. "
            f"One of the two was resized or belongs to another item: restore both from the original archive."
        )


def _ranges(values: np.ndarray) -> str:
    """Return sorted numbers as text, such as "0..2, 255"."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def read_mat(path: Path, parse: Callable[[dict[str, Any]], T], what: str = "MATLAB file") -> T:
    """Return the result of `parse` for the variables of a MATLAB file (`parse_matlab`).

    Any error in `parse` means that the file is not a `what`. Raises MissingError and BadInputError.
    """
    try:
        with decoding(f"{path} is no readable {what}"):
            return parse(parse_matlab(path.read_bytes()))
    except FileNotFoundError:
        raise no_file("file", path) from None


def read_json(path: Path, parse: Callable[[Any], T], what: str) -> T:
    """Return the result of `parse` for a JSON document.

    Any error in `parse` means that the file is not a `what`. Raises FileNotFoundError and BadInputError.
    """
    with decoding(f"{path} is not a {what}"):
        return parse(json.loads(path.read_bytes()))


def read_text(path: Path, what: str) -> str:
    """Read a text file in UTF-8, or in UTF-16 from Windows. Raises FileNotFoundError and BadInputError."""
    with decoding(f"{what} {path} is not a readable text file"):
        content = path.read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            text = content.decode("utf-16")
        elif content[1::2].count(0) > len(content) // 4:  # UTF-16 without a byte-order mark: ASCII has zero bytes
            text = content.decode("utf-16-le")
        else:
            text = content.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it contains a NUL character")
        return text


def valid_name(name: Any) -> str:
    """Return a file name from an annotation. Raises ValueError if no file can have this name."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{name!r} is not a file name")
    name.encode()  # raises for half a surrogate pair
    return name


def no_file(what: str, path: Path, listed_in: Path | None = None) -> MissingError:
    """Return the error for a missing file, with a hint on a similar file if there is one."""
    named = f", which {listed_in} names" if listed_in else ""
    return MissingError(f"There is no {what} {path}{named}. {near_files(path) or RESTORE}")


def near_files(path: Path) -> str:
    """Return a sentence on a similar file in the folder of `path`: another suffix or case, or a second copy; or ""."""
    try:
        with os.scandir(path.parent) as entries:  # a folder `train` does not replace `train.txt`
            names = sorted(entry.name for entry in entries if not (path.suffix and entry.is_dir()))
    except (OSError, ValueError):
        return ""
    stem = path.stem.lower()
    for name in names:
        other, ending = os.path.splitext(name)
        if other.lower() == stem and name != path.name:
            count = sum(os.path.splitext(name)[1] == ending for name in names)
            alike = f" ({count} files there end in {ending!r})" if ending else ""
            return f"{name!r} is there instead: name it {path.name!r}{alike}."
        if re.fullmatch(re.escape(stem) + r"( ?\(\d+\)| - copy)", other.lower()):
            return f"{name!r} is there, which looks like a second download: name it {path.name!r}."
    return ""


def open_image(path: Path, what: str, listed_in: Path | None, *, whole: bool = True) -> Image.Image:
    """Open a file as a Pillow image, and decode it if `whole`. what: its kind, for messages.

    Raises MissingError and BadInputError.
    """
    # Pillow supports more formats, but for some of them it runs other programs or reads other files.
    formats = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
    try:
        wrong = decoding(f"Cannot decode {what} {path}", "The file is truncated or not an image: restore it.")
        with wrong, Image.open(path, formats=formats) as image:
            if whole:
                image.load()
            return image
    except FileNotFoundError:
        raise no_file(what, path, listed_in) from None
