"""Plain PNG files by kornia-rs, which decodes them two to four times as fast as Pillow, to the same pixels.

A plain file leaves nothing to the decoder's choice: it has 8-bit RGB or grey levels, is not interlaced, has no
transparency, palette or animation, all its chunks are complete, and it is not so large that Pillow warns. Pillow
decodes all other files. One difference remains: kornia-rs does not verify the Adler-32 checksum inside the pixel data,
which the checksums of the PNG chunks cover too.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

GREY, RGB = 0, 2  # colour types of the PNG specification, section 11.2.1

_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_HEAD = 33  # bytes of the signature and the first chunk, IHDR

# Chunks that change no pixel in either library, with the lengths that Pillow takes without a word.
_HARMLESS = {
    b"gAMA": (4, 4),
    b"cHRM": (32, 32),
    b"sRGB": (1, 1),
    b"pHYs": (9, 9),
    b"tIME": (7, 7),
    b"bKGD": (1, 6),
    b"sBIT": (1, 4),
    b"tEXt": (3, 1000),
}


def read_plain_png(path: Path, colour_type: int) -> np.ndarray | None:
    """Read a plain PNG file of 8 bits as (H, W) grey levels or (H, W, 3) RGB, uint8; None for any other file.

    None too where it is absent or wrong in any way: Pillow then says what is the matter, or reads what it can.
    colour_type: GREY or RGB.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            size = _size(head, colour_type)
            if size is None:
                return None
            content = head + file.read()
    except (OSError, ValueError):
        return None
    if not _is_plain(content):
        return None
    from kornia_rs import io  # takes 20 ms, and listings read no image

    try:
        pixels: np.ndarray = io.decode_image_png_u8(content, size, "mono" if colour_type == GREY else "rgb")
    except BaseException as error:  # it raises nothing more specific, and a panic of Rust is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return None
    return pixels[..., 0] if colour_type == GREY else pixels


def _size(head: bytes, colour_type: int) -> tuple[int, int] | None:
    """(H, W) from the first bytes of a file, if it is a PNG of 8 bits and the colour type that is not interlaced."""
    if len(head) < _HEAD or not head.startswith(_SIGNATURE + b"\0\0\0\x0dIHDR"):
        return None
    width, height, *kind = struct.unpack_from(">IIBBBBB", head, 16)
    if kind != [8, colour_type, 0, 0, 0] or not 0 < width * height <= (Image.MAX_IMAGE_PIXELS or 0):
        return None
    return height, width


def _is_plain(content: bytes) -> bool:
    """Whether IHDR, harmless chunks, IDAT and IEND follow each other to the end of the file.

    Checksums of pixel data are left to the decoder.
    """
    kinds: list[bytes] = []
    at = len(_SIGNATURE)
    while at + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 12 + length
        if end > len(content):
            return False
        if kind != b"IDAT":
            (checksum,) = struct.unpack_from(">I", content, end - 4)
            least, most = _HARMLESS.get(kind, (0, 13))
            if zlib.crc32(content[at + 4 : end - 4]) != checksum or not least <= length <= most:
                return False
        if kind != b"IDAT" or kinds[-1:] != [kind]:
            kinds.append(kind)
        at = end
    inner = [kind for kind in kinds if kind not in _HARMLESS]
    return at == len(content) and inner == [b"IHDR", b"IDAT", b"IEND"]
