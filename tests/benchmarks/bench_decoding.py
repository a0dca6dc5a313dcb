"""Decoding of images: which libraries give the pixels of Pillow and how fast, what loading gains, and changes of hue.

    python tests/benchmarks/bench_decoding.py [--data-root DIR] [--most 200] [--repeats 3] [--task NAME...]

Files: all PNG files of 8-bit RGB or grey levels and all JPEG files of RGB below the folder; palettes, CMYK, 16 bits
and grey JPEG are left to Pillow and not counted. Identical: files of which all pixels are Pillow's. Ratio: processor
seconds of Pillow by those of the library, over at most so many files of a kind, each decoded from memory.

Loading: processor milliseconds an item of all that loading does, decoding by Pillow alone against that of the readers,
and against that with JPEG by simplejpeg too. Tasks (--task): the phase `load` and the whole, in seconds that pass, a
cheap encoder and no worker processes.

Hue: images of 518 px by four changes; processor milliseconds an image.

Everything is one thread, the variants in turn; medians of the repeats. What is not installed has no row. The tables are
Markdown; docs/pages/precision.md holds them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import torch
import torchvision.transforms.functional as tf
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as on_tensors

import neco_bench
from neco_bench.data.io import read_image
from neco_bench.data.load import load_dataset
from neco_bench.features.loader import ItemDataset
from neco_bench.features.transforms import ResizeSquare
from neco_bench.results.schema import Result
from neco_bench.training.batches import ViewData
from neco_bench.training.images import open_images
from neco_bench.training.views import ViewSettings

Decoder = Callable[[bytes], np.ndarray]
HUES = (-0.2, -0.07, 0.11, 0.2)


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


@contextlib.contextmanager
def decoding_by(variant: str) -> Iterator[None]:
    """Let the readers decode by Pillow alone, as they do, or JPEG by simplejpeg too."""
    with contextlib.ExitStack() as stack:
        if variant == "Pillow":
            for module in ("io", "dense"):
                stack.enter_context(mock.patch(f"neco_bench.data.{module}.read_plain_png", return_value=None))
        elif variant == "JPEG too":
            import simplejpeg

            def fast(path: Path, **facts: Any) -> np.ndarray:
                with path.open("rb") as file:
                    if file.read(2) == b"\xff\xd8":
                        pixels: np.ndarray = simplejpeg.decode_jpeg(b"\xff\xd8" + file.read(), "RGB")
                        return pixels
                return read_image(path, **facts)

            for module in ("data.folder", "training.images"):
                stack.enter_context(mock.patch(f"neco_bench.{module}.read_image", fast))
        yield


def loading(root: Path, most: int, repeats: int) -> None:
    """Print the table of loading."""
    variants = ["Pillow", "as it is", *(["JPEG too"] if util.find_spec("simplejpeg") else [])]
    print("\n| loading | Pillow, ms | as it is, ms | times as fast | with JPEG by simplejpeg, ms | times as fast |")
    print(f"|{' --- |' * 6}")
    loaders: dict[str, tuple[Any, list[Any]]] = {}
    for name, images in (("camvid", root / "camvid" / "val"), ("voc2012", root / "voc2012")):
        dataset = load_dataset(name, "val", root=root)
        items = [(0, index) for index in range(min(most, len(dataset)))]
        for size in (224, 448):
            loaded = ItemDataset(dataset, items, ResizeSquare(size, "native"), 0)  # type: ignore[arg-type]
            loaders[f"{name}, image and mask, {size} px"] = (loaded, list(range(len(items))))
        files = open_images("voc", root) if name == "voc2012" else open_images(str(images))
        for size, local in ((224, 98), (518, 98)):
            views = ViewData(files, ViewSettings(global_size=size, local_size=local), 0)
            loaders[f"{name}, training views, {size} px"] = (views, items[: max(1, most // 3)])
    for title, (loaded, keys) in loaders.items():
        taken: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(repeats):
            for variant in variants:
                with decoding_by(variant):
                    start = time.process_time()
                    for key in keys:
                        loaded[key]
                    taken[variant].append(1000 * (time.process_time() - start) / len(keys))
        before, *after = (statistics.median(taken[variant]) for variant in variants)
        cells = [cell for value in after for cell in (f"{value:.2f}", f"{before / value:.2f}")]
        print(f"| {title} | {before:.2f} | {' | '.join(cells + [''] * (4 - len(cells)))} |", flush=True)


def run_tasks(root: Path, tasks: list[str], repeats: int) -> None:
    """Print the table of whole tasks."""
    print(
        "\n| task | `load` by Pillow, s | as it is, s | times as fast | whole task, s | as it is, s | times as fast |"
    )
    print(f"|{' --- |' * 7}")
    for task in tasks:
        taken: dict[str, list[float]] = {}
        for _ in range(repeats):
            for variant in ("Pillow", "as it is"):
                with tempfile.TemporaryDirectory() as folder, decoding_by(variant):
                    how: dict[str, Any] = {"data_root": root, "out": Path(folder), "features": "off", "workers": 0}
                    result = neco_bench.run("baseline_rgb", task, device="cpu", **how)
                assert isinstance(result, Result)
                for phase in ("load", "total"):
                    taken.setdefault(f"{phase} {variant}", []).append(result.timing[phase])
        values = [
            statistics.median(taken[f"{phase} {v}"]) for phase in ("load", "total") for v in ("Pillow", "as it is")
        ]
        cells = [f"{values[0]:.2f}", f"{values[1]:.2f}", f"{values[0] / values[1]:.2f}"]
        cells += [f"{values[2]:.1f}", f"{values[3]:.1f}", f"{values[2] / values[3]:.2f}"]
        print(f"| {task} | {' | '.join(cells)} |", flush=True)


def hues_by() -> dict[str, Callable[[np.ndarray, float], np.ndarray]]:
    """Ways to change the hue of (H, W, 3) uint8 RGB by a share of the circle."""

    def by_opencv(image: np.ndarray, change: float) -> np.ndarray:
        converted = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
        converted[..., 0] += np.uint8(int(change * 255) % 256)
        return cv2.cvtColor(converted, cv2.COLOR_HSV2RGB_FULL)

    def by_kornia(image: np.ndarray, change: float) -> np.ndarray:
        from kornia_rs import imgproc

        converted = np.floor(imgproc.hsv_from_rgb(image.astype(np.float32)))  # bytes, as Pillow's
        converted[..., 0] = (converted[..., 0] + int(change * 255) % 256) % 256
        return np.rint(imgproc.rgb_from_hsv(converted)).clip(0, 255).astype(np.uint8)

    return {
        "Pillow, by torchvision": lambda image, change: np.asarray(tf.adjust_hue(Image.fromarray(image), change)),
        "opencv, HSV of 8 bits": by_opencv,
        "torchvision, tensors": lambda image, change: (
            on_tensors.adjust_hue(torch.from_numpy(image).permute(2, 0, 1), change).permute(1, 2, 0).numpy()
        ),
        "kornia-rs, HSV of floats brought to bytes": by_kornia,
    }


def hue(root: Path, repeats: int) -> None:
    """Print the table of changes of hue."""
    files = sorted((root / "voc2012").rglob("JPEGImages/*.jpg"))[:10]
    images = [np.array(Image.fromarray(read_image(file)).resize((518, 518))) for file in files]
    ways = hues_by()
    first = next(iter(ways.values()))
    print(f"\n| hue by | pixels that differ, % | largest difference, levels | ms an image |\n|{' --- |' * 4}")
    for name, change in ways.items():
        apart = [np.abs(first(image, by).astype(int) - change(image, by)).max(2) for image in images for by in HUES]
        taken = []
        for _ in range(repeats):
            start = time.process_time()
            for image in images:
                change(image, 0.11)
            taken.append(1000 * (time.process_time() - start) / len(images))
        share, largest = 100 * np.mean([(part > 0).mean() for part in apart]), max(part.max() for part in apart)
        print(f"| {name} | {share:.1f} | {largest} | {statistics.median(taken):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("NECO_BENCH_DATA", "../shared/data"))
    parser.add_argument("--most", type=int, default=200, help="files of a kind that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--task", action="append", help="to time whole; default: camvid_cluster_gt, voc_cluster_gt")
    chosen = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    root = Path(chosen.data_root)
    kinds, libraries = files_of(root), decoders()
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
    loading(root, chosen.most, chosen.repeats)
    run_tasks(root, chosen.task or ["camvid_cluster_gt@clean-1", "voc_cluster_gt@clean-1"], chosen.repeats)
    hue(root, chosen.repeats)


if __name__ == "__main__":
    main()
