"""Linear segmentation as DINOv3 evaluates it (`dinov3-1`): BatchNorm and a 1x1 convolution, trained on augmented crops.

Protocol of facebookresearch/dinov3's linear segmentation on ADE20K (Simeoni et al., DINOv3, 2025), including quirks.
README.md lists them. Images are scored by a sliding window, at their own resolution.

Known deviations from the reference: augmentation is drawn per (epoch, image) and dropout per iteration, not from global
streams; encoders whose stride does not divide 512 get the nearest size that it divides (518 for 14), and other sizes
change in proportion; other data sets than ADE20K have the same constants.
"""

from __future__ import annotations

import numpy as np
import torch
from neco_bench.tasks.linear_segmentation.batches import Batches, batched, training_order, with_targets
from neco_bench.tasks.linear_segmentation.dinov3_head import BnHead, train_bn_probe
from neco_bench.tasks.linear_segmentation.dinov3_settings import Settings
from neco_bench.tasks.linear_segmentation.scale_crop import ScaleCropDistort, resize_short_side
from neco_bench.tasks.linear_segmentation.windows import Corners, crop_windows, merge_windows
from neco_bench.tasks.segmentation import SegmentationScore
from torch import Tensor

from neco_bench.core.errors import UsageError
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.transforms import to_tensor, upsample_argmax


def encode_windows(extractor: FeatureExtractor, image: np.ndarray, window: int, step: int) -> tuple[Tensor, Corners]:
    """Resize the short side of an image (H, W, 3) uint8 to `window`, and encode windows that are `step` pixels apart.

    Returns features (n, D, h, w) and corners.
    """
    crops, corners = crop_windows(to_tensor(resize_short_side(image, window)), window, step)
    with extractor.context.phase("encode"):
        return extractor.encode(crops), corners


@torch.inference_mode()
def classify_windows(head: BnHead, features: Tensor, corners: Corners, window: int, shape: tuple[int, ...]) -> Tensor:
    """Classify each pixel of an image of `shape` (H, W) by mean logits, from the return value of `encode_windows`."""
    return upsample_argmax(merge_windows(head(features), corners, window), *shape)


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
        + 8.0 * (window * settings.scale[1]) ** 2,  # a square image before it is cropped
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
    extractor = FeatureExtractor(encoder, context, final_norm=True, mean=settings.mean, std=settings.std)
    transform = ScaleCropDistort.of(settings, window, settings.mean or encoder.mean)
    batches = training_batches(extractor, data["train"], transform, settings)
    trained = train_bn_probe(head, batches, settings, context.seed)
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


def training_batches(
    extractor: FeatureExtractor, train: SegmentationDataset, transform: ScaleCropDistort, settings: Settings
) -> Batches:
    """Return the batches of augmented crops, one for each iteration."""
    items = training_order(len(train), settings.iterations * settings.batch_size, extractor.context.seed)
    stream = extractor.stream(train, transform, "train", items=items)
    return batched(with_targets(stream, train.eval_mask), settings.batch_size)
