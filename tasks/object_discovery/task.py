"""Object discovery: one box for each image from its features only; CorLoc, the share of images with a correct box.

`tokencut-1` and `lost-1` are the protocols of TokenCut (Wang et al., CVPR 2022, section 4.1) and LOST (Simeoni et al.,
BMVC 2021, section 4.1), on the keys of the last block. `clean-1` is TokenCut on the encoder's usual features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from neco_bench.tasks.normalised_cut import LANCZOS
from neco_bench.tasks.object_discovery.discovery import box_iou, lost, tokencut
from neco_bench.tasks.object_discovery.settings import Settings
from torch import Tensor

from neco_bench.core import distributed
from neco_bench.core.errors import UsageError
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import BoxDataset, BoxSample
from neco_bench.encoders.base import Encoder
from neco_bench.features.loader import load_chunks
from neco_bench.features.transforms import pad_with, resize_image, to_tensor


def check_encoder(encoder: Encoder, settings: Settings) -> None:
    """Raise UsageError for an encoder without the keys, or without the sizes, that the protocol needs."""
    if settings.features == "keys" and not encoder.has_keys:
        raise UsageError(
            f"features=keys needs the keys of the last block, which {encoder.name!r} does not return. Use "
            f"@clean-1, which works with any encoder, or --set features=patches."
        )
    if encoder.only_size:
        raise UsageError(
            f"Images keep their aspect ratio here; {encoder.name!r} accepts {encoder.only_size}x{encoder.only_size} "
            f"only. Use an encoder that accepts other sizes."
        )


def cost(settings: Settings, data: dict[str, BoxDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: each image once, and the similarities and the cut of its patches."""
    images, size = len(data["test"]), settings.input_size_for(stride)
    patches = (size // stride) ** 2
    products = dimension + (LANCZOS if settings.method == "tokencut" else 2)
    return Cost(
        images=images,
        size=size,
        width=dimension,
        operations=2.0 * images * patches**2 * products,
        memory=32.0 * patches**2,
        unstored=images,
    )


def run(encoder: Encoder, data: dict[str, BoxDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the CorLoc on data["test"]; images without an object are left out."""
    check_encoder(encoder, settings)
    dataset = data["test"]
    rows: dict[int, tuple[float, np.ndarray]] = {}
    for item, sample in context.track(read(dataset, context), "discover", len(dataset)):
        if not len(sample.boxes):
            continue
        image, scale = prepare(sample.image, encoder, settings)
        with context.phase("encode"):
            keys = settings.features == "keys"
            features = encoder.encode(image[None], keys=keys, mean=settings.mean, std=settings.std)
            maps = (features.map if features.keys is None else features.keys)[0].cpu().numpy()
        with context.phase("discover"):
            tau, patches = settings.tau, settings.patches
            discovery = tokencut(maps, tau) if settings.method == "tokencut" else lost(maps, patches)
        box = to_pixels(discovery.cells, encoder.stride, scale, sample.image.shape)
        truth = np.rint(sample.boxes) if settings.round_boxes else sample.boxes
        best = float(box_iou(box, truth).max())
        rows[item] = best, box
        context.record(sample.id, box=box, boxes=truth, iou=best, score=discovery.score, region=discovery.region)
    return outcome(dataset, rows, settings, context)


def read(dataset: BoxDataset, context: Context) -> Iterator[tuple[int, BoxSample]]:
    """Return the samples that this process computes, with their indices."""
    items = range(distributed.rank(), len(dataset), distributed.world())
    samples = itertools.chain.from_iterable(load_chunks(dataset.__getitem__, items, context))
    return zip(items, samples, strict=True)


def prepare(image: np.ndarray, encoder: Encoder, settings: Settings) -> tuple[Tensor, tuple[float, float]]:
    """Convert an image (H, W, 3) uint8 to an input of a size that the encoder accepts.

    Returns:
        The input (3, H', W') RGB in [0, 1], and the height and width of one of its pixels in pixels of the image.
    """
    height, width = image.shape[:2]
    multiple = encoder.size_multiple or encoder.stride
    if settings.image == "native":
        sides = (0, -width % multiple, 0, -height % multiple)
        # The reference pads with 0 after normalisation.
        return pad_with(to_tensor(image), settings.mean or encoder.mean, sides), (1.0, 1.0)
    ratio = settings.input_size / max(height, width)
    rows, columns = (max(1, round(side * ratio / multiple)) * multiple for side in (height, width))
    return resize_image(image, rows, columns), (height / rows, width / columns)


def to_pixels(cells: tuple[int, ...], stride: int, scale: tuple[float, float], size: tuple[int, ...]) -> np.ndarray:
    """Convert a box of cells to pixels of an image of `size` (height, width): (x1, y1, x2, y2), cut at its border."""
    top, left, bottom, right = (stride * cell for cell in cells)
    box = np.array([left, top, right, bottom]) * (scale[1], scale[0], scale[1], scale[0])
    return np.minimum(box, (size[1], size[0], size[1], size[0]))


def outcome(
    dataset: BoxDataset, rows: dict[int, tuple[float, np.ndarray]], settings: Settings, context: Context
) -> Outcome:
    """Gather the best IoU and the box of each image from all processes, and return the CorLoc."""
    rows = {item: row for part in distributed.gather(rows) for item, row in part.items()}
    items = sorted(rows)
    if not items:
        raise UsageError(f"None of the {len(dataset)} images of {dataset.name!r} has an object. Raise --limit.")
    ious = np.array([rows[item][0] for item in items])
    hits = (ious >= settings.iou).astype(np.float64)
    context.note(images_without_objects=len(dataset) - len(items))
    return Outcome(
        metrics={"CorLoc": float(hits.mean()), "best_IoU": float(ious.mean())},
        per_class={},
        ci95={},  # the runner computes them from the statistics
        n_images=len(items),
        statistics={
            "image_id": np.array([dataset.ids[item] for item in items]),
            "score/CorLoc": hits,
            "score/best_IoU": ious,
            "box": np.stack([rows[item][1] for item in items]),
        },
        features={
            "resize": settings.image,
            "final_norm": settings.features == "patches",
            "features": settings.features,
        },
    )
