"""Attention maps: the Jaccard index of the class token's attention with the objects of an image, mean over images.

`neco-1` is the value that NeCo's and Leopart's trainers report for their teacher (`evaluate_attn_maps`), after DINO's
figure 3; `clean-1` is the same without its quirks.
"""

from __future__ import annotations

import numpy as np
from neco_bench.tasks.attention_maps.settings import Settings
from neco_bench.tasks.segmentation import images_used

from neco_bench.core import distributed
from neco_bench.core.errors import UsageError
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import IGNORE, SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.attention import MIN_SIDE, foreground, top_mass
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.transforms import ResizeSquare, resize_nearest_torch


def check_encoder(encoder: Encoder, settings: Settings) -> None:
    """Raise UsageError for an encoder without class-token attention, or with too few patches to blur it."""
    if not encoder.attentions:
        raise UsageError(
            f"The task measures the class token's attention, which {encoder.name!r} does not return. Use a plain ViT "
            f"with a class token, of timm or torch.hub."
        )
    if settings.input_size_for(encoder.stride) < MIN_SIDE * encoder.stride:
        raise UsageError(f"Attention is blurred over {MIN_SIDE} x {MIN_SIDE} patches or more: raise input_size.")


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: each image once."""
    size = settings.input_size_for(stride)
    images = len(data["val"])
    return Cost(images=images, size=size, width=dimension, memory=64.0 * size**2, unstored=images)


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the Jaccard index of the averaged heads, and that of each object's best head, on data["val"]."""
    check_encoder(encoder, settings)
    val, size = data["val"], settings.input_size_for(encoder.stride)
    count = images_used(len(val), settings.drop_last or 1, "drop_last=0")
    extractor = FeatureExtractor(encoder, context, output="attention", mean=settings.mean, std=settings.std)
    transform = ResizeSquare(size, "native" if settings.native else "pil")
    items = [(0, i) for i in range(count)]
    scores: dict[int, tuple[float, float]] = {}
    for batch in extractor.stream(val, transform, "attention", items=items, own=True):
        with context.phase("score"):
            merged = foreground(batch.features, settings.mass).cpu().numpy()
            heads = top_mass(batch.features, settings.mass).cpu().numpy()
            means = batch.features.mean(1).cpu().numpy()
            rows = zip(batch.positions, batch.masks, merged, heads, means, strict=True)
            for position, mask, one, several, mean in rows:
                own = jaccards(mask, one, several, settings)
                if own is not None:
                    scores[position] = own
                    large = resize_nearest_torch(one, *mask.shape)
                    context.record(val.ids[position], truth=mask, region=large, score=mean, jaccard=own[0])
    return outcome(val, scores, size, settings, context)


def jaccards(mask: np.ndarray, merged: np.ndarray, heads: np.ndarray, settings: Settings) -> tuple[float, float] | None:
    """Compare the foreground of an image's attention with its mask.

    Args:
        mask: (H, W) class ids.
        merged: (h, w) bool, foreground of the averaged heads.
        heads: (heads, h, w) bool, foreground of each head.
        settings: settings of the protocol.

    Returns:
        The Jaccard index of `merged` and all pixels that are not background, and the mean over objects (all pixels of a
        class) of the Jaccard index of the best head; None for an image without an object, which `clean-1` leaves out.
    """
    known = mask != IGNORE if settings.native else np.ones_like(mask, bool)
    ids = np.unique(mask)
    objects = ids[(ids > 0) & (ids != IGNORE)] if settings.native else ids[1:-1]
    if settings.native and not len(objects):
        return None
    one, several = (resize_nearest_torch(maps, *mask.shape) & known for maps in (merged, heads))
    best = [max(_jaccard(mask == kind, head) for head in several) for kind in objects]
    return _jaccard((mask > 0) & known, one), float(np.mean(best)) if best else 0.0


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def outcome(
    val: SegmentationDataset, scores: dict[int, tuple[float, float]], size: int, settings: Settings, context: Context
) -> Outcome:
    """Gather the scores of all processes and return their means; in `neco-1`, dropped images count as 0."""
    scores = {item: own for part in distributed.gather(scores) for item, own in part.items()}
    items = sorted(scores)
    if not items:
        raise UsageError(f"None of the {len(val)} images of {val.name!r} has an object. Raise --limit.")
    if not settings.native:
        scores |= {item: (0.0, 0.0) for item in range(len(val)) if item not in scores}
    context.note(scored_images=len(items))
    items = sorted(scores)
    values = np.array([scores[item] for item in items])
    names = ("Jaccard", "Jaccard_best_head")
    return Outcome(
        metrics={name: float(column.mean()) for name, column in zip(names, values.T, strict=True)},
        per_class={},
        ci95={},  # the runner computes them from the statistics
        n_images=len(items),
        statistics={
            "image_id": np.array([val.ids[item] for item in items]),
            **{f"score/{name}": column for name, column in zip(names, values.T, strict=True)},
        },
        features={"input_size": settings.input_size, "used_size": size, "resize": "squash", "final_norm": True},
    )
