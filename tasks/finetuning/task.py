"""Full fine-tuning for segmentation, as in Segmenter: an encoder and a decoder are trained end to end.

Protocols of rstrudel/segmenter (Strudel et al., ICCV 2021): `segmenter-mask-1` and `segmenter-linear-1`, including
quirks; `segmenter-mask-ms-1` and `segmenter-linear-ms-1`, the same tested at several scales; and `clean-1`, without
quirks. README.md lists them. Images are scored by a sliding window, at their own resolution.

Known deviations from the reference: augmentation and order are drawn per (epoch, image), dropout and stochastic depth
per (step, place in the batch), not from global streams; positions are interpolated as the encoder does it; encoders
whose stride does not divide the crop get the nearest size that it divides, and other sizes change in proportion.
"""

from __future__ import annotations

import copy

import numpy as np
import torch.nn.functional as F
from neco_bench.tasks.finetuning.loop import fine_tune
from neco_bench.tasks.finetuning.segmenter import Segmenter
from neco_bench.tasks.finetuning.settings import Settings
from neco_bench.tasks.linear_segmentation.scale_crop import resize_bilinear, short_side_size, size_within
from neco_bench.tasks.linear_segmentation.windows import classify_views, crop_windows, merge_windows, window_starts
from neco_bench.tasks.segmentation import SegmentationScore
from torch import Tensor

from neco_bench.core import distributed
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.transforms import to_tensor

PASSES = 3  # forward passes in the time of a training step: the backward pass takes the time of two


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: forward and backward passes of every training crop, then windows over the val images.

    The memory of the encoder's activations, gradient and momentum, which depend on its kind, is not included.
    """
    s, window, classes = settings, settings.input_size_for(stride), len(data["val"].classes)
    crops, cells = s.epochs * len(data["train"]), (window // stride) ** 2
    step = s.input_size - s.window_overlap

    def windows_along(side: float) -> int:
        return len(window_starts(max(s.input_size, int(side)), s.input_size, step))

    # Images are assumed to be twice as wide as high.
    heights = [s.short_side * scale for scale in s.test_scales]
    windows = sum(windows_along(height) * windows_along(2 * height) for height in heights)
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
        + 3.0 * (s.short_side * s.scale[1]) ** 2,  # a square image before it is cropped
        unstored=PASSES * crops + images,
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the mIoU of an encoder and a decoder, trained on data["train"] and scored on data["val"]."""
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
    """Classify each pixel of an image (H, W, 3) uint8 by the views of the protocol, see `classify_views`."""
    s, ratio = settings, window / settings.input_size
    step = max(1, window - round(s.window_overlap * ratio))

    def logits_of(view: np.ndarray, scale: float) -> Tensor:
        factor = scale * ratio
        size = size_within(view.shape[0], view.shape[1], factor * s.short_side, factor * s.long_side)
        resized = to_tensor(resize_bilinear(view, *size))
        if min(size) < window:
            size = short_side_size(*size, window)
            resized = F.interpolate(resized[None], size, mode="bilinear", align_corners=False)[0]
        crops, corners = crop_windows(resized, window, step)
        return merge_windows(segmenter.scores(crops, context), corners, window)

    return classify_views(image, s.test_scales, s.test_flip, logits_of)
