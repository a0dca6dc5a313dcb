"""Full fine-tuning for segmentation as Segmenter does it: the encoder and a decoder, end to end.

Protocols of rstrudel/segmenter (Strudel et al., ICCV 2021): `segmenter-mask-1` and `segmenter-linear-1`, quirks
included; the same tested at several scales, `segmenter-mask-ms-1` and `segmenter-linear-ms-1`; and without quirks
(`clean-1`). README.md lists them. Images are scored by a sliding window, at their own resolution.

Known deviations from the reference: augmentation and order are drawn per (epoch, image), dropout and stochastic depth
per (step, place in the batch), not from global streams; positions are interpolated as the encoder does it; encoders
whose stride does not divide the crop get the nearest size that it does, all else in proportion.
"""

from __future__ import annotations

import copy
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from neco_bench.tasks.finetuning.augment import resize_bilinear, size_within
from neco_bench.tasks.finetuning.loop import fine_tune
from neco_bench.tasks.finetuning.segmenter import Segmenter
from neco_bench.tasks.finetuning.settings import Settings
from neco_bench.tasks.linear_segmentation.dinov3 import merge_windows, window_starts
from neco_bench.tasks.linear_segmentation.dinov3_augment import short_side_size
from neco_bench.tasks.segmentation import SegmentationScore
from torch import Tensor

from neco_bench.core import distributed
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.transforms import to_tensor, upsample_argmax

PASSES = 3  # forward passes that a training step takes the time of: one forward, one backward of twice its work


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: forward and backward passes of every training crop, then windows over the val images.

    Memory is without the encoder's activations, gradient and momentum, which depend on its kind.
    """
    s, window, classes = settings, settings.input_size_for(stride), len(data["val"].classes)
    crops, cells = s.epochs * len(data["train"]), (window // stride) ** 2
    views = [
        (s.short_side * scale, 2 * s.short_side * scale) for scale in s.test_scales
    ]  # images twice as long as high
    step = s.input_size - s.window_overlap
    windows = sum(
        len(window_starts(max(s.input_size, int(high)), s.input_size, step))
        * len(window_starts(max(s.input_size, int(long)), s.input_size, step))
        for high, long in views
    )
    tokens = cells + classes
    blocks = s.decoder_layers * (24.0 * tokens * dimension**2 + 4.0 * tokens**2 * dimension) * (s.decoder == "mask")
    decoder = blocks + 2.0 * classes * dimension * cells
    images = windows * (1 + s.test_flip) * len(data["val"])
    batch = min(s.batch_size, len(data["train"]))
    return Cost(
        images=PASSES * crops + images,
        size=window,
        width=dimension,
        operations=(PASSES * crops + images) * (decoder + 8.0 * classes * window**2),
        memory=4.0 * (batch * (3 * window**2 + classes * cells) + 4 * classes * window**2)
        + 8.0 * len(data["val"]) * classes**2
        + 3.0 * (s.short_side * s.scale[1]) ** 2,  # an image before it is cropped, a square one
        unstored=PASSES * crops + images,
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the mIoU of an encoder with a decoder, both trained on data["train"], scored on data["val"]."""
    val, window = data["val"], settings.input_size_for(encoder.stride)
    segmenter = Segmenter(copy.deepcopy(encoder), len(val.classes), settings, context.seed)
    fine_tune(segmenter, data["train"], window, settings, context)

    segmenter.eval()
    score = SegmentationScore(val, settings, context)
    for item in context.track(range(distributed.rank(), len(val), distributed.world()), "score"):
        with context.phase("load"):
            sample = val[item]
        with context.phase("predict"):
            classes = classify(segmenter, sample.image, window, settings, context)
        score.add(item, sample.mask, classes)
    return score.outcome(used_size=window, resize="short side, sliding window")


def classify(segmenter: Segmenter, image: np.ndarray, window: int, settings: Settings, context: Context) -> np.ndarray:
    """Classify each pixel of an image (H, W, 3) uint8, from one view of it or the mean probabilities of several."""
    height, width = image.shape[:2]
    views = list(itertools.product(settings.test_scales, (False, True) if settings.test_flip else (False,)))
    mean = torch.zeros(())
    for scale, flipped in views:
        view = np.ascontiguousarray(image[:, ::-1]) if flipped else image
        scores = score_view(segmenter, view, scale, window, settings, context)
        if len(views) == 1:
            return upsample_argmax(scores, height, width).cpu().numpy()
        large = F.interpolate(scores[None], (height, width), mode="bilinear", align_corners=False)[0].softmax(0)
        mean = mean.to(large.device) + (large.flip(-1) if flipped else large) / len(views)
    return mean.argmax(0).cpu().numpy()


def score_view(
    segmenter: Segmenter, image: np.ndarray, scale: float, window: int, settings: Settings, context: Context
) -> Tensor:
    """Compute scores (K, h, w) of an image at `scale` times the card's size, as the mean over overlapping windows."""
    factor = scale * window / settings.input_size
    height, width = image.shape[:2]
    size = size_within(height, width, factor * settings.short_side, factor * settings.long_side)
    resized = to_tensor(resize_bilinear(image, *size))
    if min(size) < window:
        size = short_side_size(*size, window)
        resized = F.interpolate(resized[None], size, mode="bilinear", align_corners=False)[0]
    overlap = round(settings.window_overlap * window / settings.input_size)
    rows, columns = (window_starts(side, window, max(1, window - overlap)) for side in size)
    corners = list(itertools.product(rows, columns))
    crops = torch.stack([resized[:, top : top + window, left : left + window] for top, left in corners])
    return merge_windows(segmenter.scores(crops, context), corners, window)
