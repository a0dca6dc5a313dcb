"""PNG files by the faster decoder: pixels and errors are Pillow's, and all that is not plain is left to it."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from neco_bench.core.errors import NecoBenchError
from neco_bench.data import io as data_io
from neco_bench.data.dense import read_normals
from neco_bench.data.io import id_table, read_image, read_mask
from neco_bench.data.png import GREY, RGB, read_plain_png
from neco_bench.results.provenance import environment
from tests.data.data_helpers import image_of

ALL_IDS = id_table({value: value for value in range(256)})


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    rows: bytes, size: tuple[int, int], kind: tuple[int, ...], *before: bytes, level: int = 6, part: int = 0
) -> bytes:
    """A file of filtered rows. kind: bit depth, colour type, compression, filter and interlace method of IHDR."""
    data = zlib.compress(rows, level)
    parts = [data[at : at + (part or len(data))] for at in range(0, len(data), part or len(data))]
    header = chunk(b"IHDR", struct.pack(">II5B", *size[::-1], *kind))
    pixels = b"".join(chunk(b"IDAT", part) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + pixels + chunk(b"IEND", b"")


def saved(image: Image.Image, **how: Any) -> bytes:
    """A file as Pillow writes it."""
    stream = io.BytesIO()
    image.save(stream, "PNG", **how)
    return stream.getvalue()


def outcome(path: Path, colour_type: int) -> np.ndarray | str:
    """What the readers make of a file: pixels, or the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read_image(path) if colour_type == RGB else read_mask(path, table=ALL_IDS)
    except NecoBenchError as error:
        return str(error)


def check_as_by_pillow(path: Path, colour_type: int) -> None:
    """Compare what the readers make of a file with what they do without the faster decoder."""
    ours = outcome(path, colour_type)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_io, "read_plain_png", lambda *_: None)
        by_pillow = outcome(path, colour_type)
    assert type(ours) is type(by_pillow)
    if isinstance(ours, np.ndarray) and isinstance(by_pillow, np.ndarray):
        assert ours.dtype == by_pillow.dtype
    assert np.array_equal(ours, by_pillow)


def is_fast(path: Path, colour_type: int) -> bool:
    return read_plain_png(path, colour_type) is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("png")


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([GREY, RGB]), st.integers(0, 9), st.integers(0, 2000),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_any_filters_and_chunks_give_the_pixels_of_pillow(
    folder: Path, height: int, width: int, colour_type: int, level: int, part: int, random: Any
) -> None:
    bytes_of_row = width * (3 if colour_type == RGB else 1)
    rows = b"".join(bytes([random.randrange(5)]) + random.randbytes(bytes_of_row) for _ in range(height))
    path = folder / "x.png"
    path.write_bytes(png(rows, (height, width), (8, colour_type, 0, 0, 0), level=level, part=part))
    fast = read_plain_png(path, colour_type)
    assert fast is not None
    assert fast.flags.writeable
    assert np.array_equal(fast, np.array(Image.open(path)))
    check_as_by_pillow(path, colour_type)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([GREY, RGB]), st.booleans(), st.integers(0, 10**6), st.integers(1, 255), st.booleans())
def test_damaged_files_end_as_with_pillow(
    folder: Path, colour_type: int, with_facts: bool, place: int, change: int, cut: bool
) -> None:
    pixels = image_of(3, (9, 11))
    facts = {b"tIME": 7, b"pHYs": 9, b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"sBIT": 3, b"bKGD": 6}
    harmless = [*(chunk(kind, b"\1" * length) for kind, length in facts.items()), chunk(b"tEXt", b"Title\0a")]
    harmless = harmless if with_facts else []
    array = pixels if colour_type == RGB else pixels[..., 0]
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    content = bytearray(png(rows, (9, 11), (8, colour_type, 0, 0, 0), *harmless, part=50))
    at = place % len(content)
    path = folder / "damaged.png"
    path.write_bytes(content)
    assert is_fast(path, colour_type)
    content[at] ^= change
    path.write_bytes(bytes(content[:at]) if cut else bytes(content))
    check_as_by_pillow(path, colour_type)


def others() -> dict[str, bytes]:
    """Files that are not plain, by what they have."""
    colours = image_of(1, (12, 10))
    levels = np.ascontiguousarray(colours[..., 0])
    rows = b"".join(b"\0" + row.tobytes() for row in colours)
    size, plain = (12, 10), (8, RGB, 0, 0, 0)
    bits = b"".join(b"\0" + bytes(2) for _ in range(12))
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"b" * 100))
    whole = png(rows, size, plain)
    first, second = Image.fromarray(colours), Image.fromarray(colours[::-1])
    return {
        "palette": saved(Image.fromarray(levels // 8).convert("P")),
        "16 bits": saved(Image.fromarray(levels.astype(np.uint16) * 200)),
        "alpha": saved(Image.fromarray(np.dstack((colours, levels)))),
        "grey alpha": saved(first.convert("LA")),
        "1 bit": png(bits, size, (1, 0, 0, 0, 0)),
        "one transparent colour": png(rows, size, plain, chunk(b"tRNS", bytes(6))),
        "suggested palette": png(rows, size, plain, chunk(b"PLTE", bytes(6))),
        "text": png(rows, size, plain, text),
        "short gamma": png(rows, size, plain, chunk(b"gAMA", bytes(3))),
        "interlaced": png(rows, size, (8, RGB, 0, 0, 1)),
        "unknown filter method": png(rows, size, (8, RGB, 0, 1, 0)),
        "animated": saved(first, save_all=True, append_images=[second]),
        "bytes behind its end": whole + b"x",
        "no end": whole[:-12],
        "two ends": whole + chunk(b"IEND", b""),
        "two headers": whole[:33] + whole[8:],
        "too many pixels": png(b"", (20000, 20000), plain),
        "no pixels": png(b"", (0, 10), plain),
        "rows lacking": png(rows[:-31], size, plain),
        "checksum of a date": png(rows, size, plain, chunk(b"tIME", bytes(7))[:-1] + b"\0"),
        "checksum of pixels": whole[:-13] + bytes([whole[-13] ^ 1]) + whole[-12:],
        "unknown row filter": png(b"\x07" + rows[1:], size, plain),
        "empty": b"",
        "signature alone": whole[:8],
    }


def test_the_checksum_inside_pixel_data_is_the_one_difference(tmp_path: Path) -> None:
    """A file with a right checksum of its chunk and a wrong one of zlib's stream inside, as no writer makes."""
    colours = image_of(1, (12, 10))
    data = bytearray(zlib.compress(b"".join(b"\0" + row.tobytes() for row in colours)))
    data[-1] ^= 1
    header = chunk(b"IHDR", struct.pack(">II5B", 10, 12, 8, RGB, 0, 0, 0))
    path = tmp_path / "x.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", bytes(data)) + chunk(b"IEND", b""))
    assert np.array_equal(read_image(path), colours)


@pytest.mark.parametrize("what", others())
def test_what_is_not_plain_is_left_to_pillow(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(others()[what])
    for colour_type in (GREY, RGB):
        assert not is_fast(path, colour_type)
        check_as_by_pillow(path, colour_type)


def test_absent_files_and_folders_end_as_with_pillow(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.png", tmp_path):
        assert read_plain_png(path, RGB) is None
        check_as_by_pillow(path, RGB)


def test_the_version_of_the_decoder_is_recorded() -> None:
    assert {"kornia-rs", "pillow"} <= set(environment()["packages"])


def test_normals_are_read_by_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(saved(Image.fromarray(image_of(5, (6, 7)))))
    assert is_fast(path, RGB)
    fast = read_normals(path, (6, 7))
    monkeypatch.setattr("neco_bench.data.dense.read_plain_png", lambda *_: None)
    assert np.array_equal(fast, read_normals(path, (6, 7)))


def test_sample_files_have_the_pixels_of_pillow(samples: Path) -> None:
    fast = 0
    for path in sorted(samples.rglob("*.png"))[::4]:  # bench_decoding.py compares all
        with Image.open(path) as image:
            if image.mode not in ("L", "RGB"):
                continue
            pixels = read_plain_png(path, GREY if image.mode == "L" else RGB)
            assert pixels is not None, path
            assert np.array_equal(pixels, np.array(image)), path
            fast += 1
    assert fast > 200
