"""Linear segmentation as DINOv3 evaluates it (`dinov3-1`): BatchNorm and a 1x1 convolution, trained on augmented crops.

Protocol of facebookresearch/dinov3's linear segmentation on ADE20K (Simeoni et al., DINOv3, 2025), quirks included.
README.md lists them. Images are scored by a sliding window, at their own resolution.

Known deviations from the reference: augmentation is drawn per (epoch, image) and dropout per iteration, not from global
streams; encoders whose stride does not divide 512 get the nearest size that it does (518 for 14), all else in
proportion; data sets other than ADE20K take the same constants.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from neco_bench.tasks.linear_segmentation.batches import batched, labelled
from neco_bench.tasks.linear_segmentation.dinov3_augment import Distortion, ScaleCropDistort, resize_short_side
from neco_bench.tasks.linear_segmentation.dinov3_head import BnHead, BnProbeOptions, train_bn_probe
from neco_bench.tasks.linear_segmentation.dinov3_settings import Settings
from neco_bench.tasks.linear_segmentation.heads import Batches
from neco_bench.tasks.segmentation import SegmentationScore
from torch import Tensor

from neco_bench.core.errors import UsageError
from neco_bench.core.rng import item_rng
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import IGNORE, SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.transforms import to_tensor, upsample_argmax


def window_starts(length: int, window: int, step: int) -> list[int]:
    """Place windows along an axis of `length` >= `window` pixels: first pixels of each; the last ends with the axis."""
    count = max(length - window + step - 1, 0) // step + 1
    return [min(k * step, length - window) for k in range(count)]


def merge_windows(logits: Tensor, corners: list[tuple[int, int]], window: int) -> Tensor:
    """Average the logits (n, C, h, w) of windows, upsampled to their place: (C, H, W); corners: (top, left) of each."""
    height, width = (max(side) + window for side in zip(*corners, strict=True))
    total, visits = logits.new_zeros(logits.shape[1], height, width), logits.new_zeros(height, width)
    for part, (top, left) in zip(logits, corners, strict=True):
        place = (..., slice(top, top + window), slice(left, left + window))
        total[place] += F.interpolate(part[None], (window, window), mode="bilinear", align_corners=False)[0]
        visits[place] += 1
    return total / visits


def encode_windows(
    extractor: FeatureExtractor, image: np.ndarray, window: int, step: int
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Encode windows, `step` apart, over an image (H, W, 3) uint8, its short side resized to one of them.

    Returns features (n, D, h, w) and corners.
    """
    resized = to_tensor(resize_short_side(image, window))
    rows, columns = (window_starts(side, window, step) for side in resized.shape[1:])
    corners = list(itertools.product(rows, columns))
    crops = torch.stack([resized[:, top : top + window, left : left + window] for top, left in corners])
    with extractor.context.phase("encode"):
        return extractor.encode(crops), corners


@torch.inference_mode()
def classify_windows(
    head: BnHead, features: Tensor, corners: list[tuple[int, int]], window: int, shape: tuple[int, ...]
) -> Tensor:
    """Classify the pixels of an image of `shape` (H, W) from what `encode_windows` returns, by mean logits."""
    merged = merge_windows(head(features), corners, window)
    return upsample_argmax(merged, *shape)


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: crops for every iteration, about two windows per val image."""
    window, classes = settings.input_size_for(stride), len(data["val"].classes)
    crops = settings.iterations * settings.batch_size
    return Cost(
        images=crops + 2 * len(data["val"]),
        size=window,
        width=dimension,
        operations=crops * classes * (6.0 * dimension * (window // stride) ** 2 + 24.0 * window**2),
        memory=4.0 * (settings.batch_size * dimension * (window // stride) ** 2 + 4 * classes * window**2)
        + 4.0 * len(data["val"]) * classes**2
        + 8.0 * (window * settings.scale[1]) ** 2,  # an image before it is cropped, a square one
        unstored=2 * len(data["val"]),
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the mIoU of a linear head trained on data["train"], scored on data["val"]."""
    val, window = data["val"], settings.input_size_for(encoder.stride)
    if settings.batch_size == 1 and window == encoder.stride:
        raise UsageError(
            "BatchNorm needs more than one patch in a batch: use --set batch_size=2, or a larger input_size."
        )
    head = BnHead(encoder.embed_dim, len(val.classes), context.seed).to(encoder.device)
    options = BnProbeOptions(**settings.model_dump(include=set(BnProbeOptions.__dataclass_fields__)))
    extractor = FeatureExtractor(encoder, context, final_norm=True, mean=settings.mean, std=settings.std)
    batches = training_batches(extractor, data["train"], window, settings)
    trained = train_bn_probe(head, batches, options, context.seed, ignore=IGNORE)
    iterations = list(trained) if settings.select == "best" else list(trained)[-1:]

    score = SegmentationScore(val, settings, context, shape=(len(iterations),))
    step = max(1, int(window * settings.window_step))
    for item in context.track(range(len(val)), "score"):
        with context.phase("load"):
            sample = val[item]
        features, corners = encode_windows(extractor, sample.image, window, step)
        with context.phase("predict"):
            shape = sample.mask.shape
            maps = [classify_windows(trained[i], features, corners, window, shape).cpu().numpy() for i in iterations]
            score.add(item, sample.mask, np.stack(maps))

    scores = score.mean_ious()
    best = int(scores.argmax())
    context.note(iteration_reported=iterations[best], scored_images=len(val))
    return score.outcome(
        used_size=window,
        resize="short side, sliding window",
        select=(best,),
        metrics={"mIoU_last": float(scores[-1])},
    )


def training_order(count: int, settings: Settings, seed: int) -> list[tuple[int, int]]:
    """Order the items (epoch, index) of all iterations: each epoch is a permutation; batches may span two epochs."""
    total = settings.iterations * settings.batch_size
    items: list[tuple[int, int]] = []
    for epoch in range(-(-total // count)):
        items += [(epoch, int(i)) for i in item_rng(seed, "order", epoch).permutation(count)]
    return items[:total]


def training_batches(extractor: FeatureExtractor, train: SegmentationDataset, size: int, settings: Settings) -> Batches:
    """Yield features (B, D, h, w) and targets (B, size, size) of the probe's batches, one for each iteration."""
    s = settings
    distortion = Distortion(s.distortion_probability, s.brightness, s.contrast, s.saturation, s.hue)
    fill = s.mean or extractor.encoder.mean
    transform = ScaleCropDistort(size, s.scale, s.max_class_share, s.crop_tries, s.flip_probability, distortion, fill)
    items = training_order(len(train), s, extractor.context.seed)
    batches = extractor.stream(train, transform, "train", items=items)
    return batched(labelled(batches, train.eval_mask), s.batch_size)
