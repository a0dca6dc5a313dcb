"""Decoding of images by other libraries than Pillow: which give the same pixels, and how fast.

    python tests/benchmarks/bench_decoding.py [--data-root DIR] [--most 200] [--repeats 3]

All PNG files of 8-bit RGB or grey levels and all JPEG files of RGB below the folder; palettes, CMYK, 16 bits and grey
JPEG are left to Pillow and not counted. Identical: files of which all pixels are Pillow's. Ratio: processor seconds of
Pillow by those of the library, over at most so many files of a kind, each decoded from memory by one after the other;
the median of the repeats. What is not installed has no row. The table is Markdown; docs/pages/precision.md holds it.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

Decoder = Callable[[bytes], np.ndarray]


def by_pillow(content: bytes) -> np.ndarray:
    """As the readers of data sets do."""
    return np.array(Image.open(io.BytesIO(content)))


def by_opencv(content: bytes) -> np.ndarray:
    """Its flag keeps the stored pixel grid, as Pillow does."""
    flags = cv2.IMREAD_UNCHANGED if content[25:26] == b"\0" else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    assert image is not None
    return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def by_torchvision(content: bytes) -> np.ndarray:
    """As it stores them, channels last."""
    image = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return image.permute(1, 2, 0).numpy().squeeze()


def decoders() -> dict[str, dict[str, Decoder]]:
    """The libraries that are here, by kind of file."""
    found: dict[str, dict[str, Decoder]] = {
        name: {f"opencv-python-headless {cv2.__version__}": by_opencv, _named("torchvision"): by_torchvision}
        for name in ("PNG RGB", "PNG L", "JPEG RGB")
    }
    if util.find_spec("kornia_rs"):
        from kornia_rs import io as kornia

        def by_kornia(content: bytes) -> np.ndarray:
            height, width = (int.from_bytes(content[at : at + 4], "big") for at in (20, 16))
            mode = "mono" if content[25] == 0 else "rgb"
            return np.asarray(kornia.decode_image_png_u8(content, (height, width), mode)).squeeze()

        found["PNG RGB"][_named("kornia-rs")] = found["PNG L"][_named("kornia-rs")] = by_kornia
        found["JPEG RGB"][_named("kornia-rs")] = lambda content: np.asarray(
            kornia.decode_image_jpegturbo(content, "rgb")
        )
    if util.find_spec("simplejpeg"):
        import simplejpeg

        found["JPEG RGB"][_named("simplejpeg")] = lambda content: simplejpeg.decode_jpeg(content, "RGB")
    return found


def _named(name: str) -> str:
    return f"{name} {metadata.version(name)}"


def files_of(root: Path) -> dict[str, list[Path]]:
    """Paths by kind."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(path for end in ("png", "jpg") for path in root.rglob(f"*.{end}")):
        with Image.open(path) as image:
            kinds.setdefault(f"{image.format} {image.mode}", []).append(path)
    return kinds


def seconds(decode: Decoder, contents: list[bytes]) -> float:
    """Of the processor, for all of them."""
    start = time.process_time()
    for content in contents:
        decode(content)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("NECO_BENCH_DATA", "../shared/data"))
    parser.add_argument("--most", type=int, default=200, help="files of a kind that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    cv2.setNumThreads(1)
    kinds, libraries = files_of(Path(chosen.data_root)), decoders()
    left = {kind: len(paths) for kind, paths in kinds.items() if kind not in libraries}
    print(f"Pillow {metadata.version('pillow')}; left to it: {left}\n")
    print(f"| files | library | identical | times as fast as Pillow |\n|{' --- |' * 4}")
    for kind, named in libraries.items():
        paths = kinds.get(kind, [])
        contents = [path.read_bytes() for path in paths[:: max(1, len(paths) // chosen.most)]]
        for name, decode in named.items():
            same = sum(np.array_equal(by_pillow(path.read_bytes()), decode(path.read_bytes())) for path in paths)
            ratios = [seconds(by_pillow, contents) / seconds(decode, contents) for _ in range(chosen.repeats)]
            print(f"| {kind} | {name} | {same} of {len(paths)} | {statistics.median(ratios):.2f} |", flush=True)


if __name__ == "__main__":
    main()
