"""Linear segmentation as DINOv2 evaluates it (`dinov2-1`, `dinov2-ms-1`): BatchNorm and a 1x1 convolution on crops.

Protocol of facebookresearch/dinov2's ADE20K and VOC evaluations (Oquab et al., TMLR 2024, table 10), whose
configurations are known from copies. README.md lists the sources. Training is as in `dinov3-1`, except for the
schedule, the resizing and the colours, which are mmseg's.

Known deviations from the reference: those of `dinov3-1`. For patches of 14 pixels, the reference pads crops of 512
pixels to 518 and stretches the logits; here the crops are 518 pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from neco_bench.tasks.linear_segmentation import dinov3
from neco_bench.tasks.linear_segmentation.dinov2_settings import Settings
from neco_bench.tasks.linear_segmentation.dinov3_head import BnHead, train_bn_probe
from neco_bench.tasks.linear_segmentation.scale_crop import ScaleCropDistort, resize_bilinear, short_side_size
from neco_bench.tasks.linear_segmentation.windows import classify_views, crop_windows, merge_windows
from neco_bench.tasks.segmentation import SegmentationScore
from torch import Tensor

from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import SegmentationDataset
from neco_bench.encoders.adapters.layers import read_last
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.transforms import to_tensor


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: crops for every iteration, about two windows per val image, and more for larger views."""
    training = dinov3.cost(settings, data, stride, dimension * settings.last_layers)
    views = (1 + settings.test_flip) * sum(math.ceil(2 * scale**2) for scale in settings.test_scales)
    crops = settings.iterations * settings.batch_size
    return Cost(
        images=crops + views * len(data["val"]),
        size=training.size,
        width=training.width,
        operations=training.operations,
        memory=training.memory,
        unstored=views * len(data["val"]),
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the mIoU of a linear head trained on data["train"], scored on data["val"]."""
    s, val, window = settings, data["val"], settings.input_size_for(encoder.stride)
    encoder = read_last(encoder, s.last_layers)
    extractor = FeatureExtractor(encoder, context, final_norm=True, mean=s.mean, std=s.std)
    transform = ScaleCropDistort.of(s, window, s.mean or encoder.mean, (window, math.inf))
    batches = dinov3.training_batches(extractor, data["train"], transform, s)
    head = BnHead(encoder.embed_dim, len(val.classes), context.seed).to(encoder.device)
    last = train_bn_probe(head, batches, s, context.seed)[s.iterations]

    score = SegmentationScore(val, settings, context)
    for item in context.track(range(len(val)), "score"):
        with context.phase("load"):
            sample = val[item]
        score.add(item, sample.mask, classify(extractor, last, sample.image, window, settings))
    context.note(layers=encoder.layer, scored_images=len(val))
    return score.outcome(used_size=window, resize="short side, sliding window")


@torch.inference_mode()
def classify(
    extractor: FeatureExtractor, head: BnHead, image: np.ndarray, window: int, settings: Settings
) -> np.ndarray:
    """Classify each pixel of an image (H, W, 3) uint8 by the views of the protocol, see `classify_views`."""

    def logits_of(view: np.ndarray, scale: float) -> Tensor:
        size = short_side_size(view.shape[0], view.shape[1], max(window, round(window * scale)))
        step = max(1, int(window * settings.window_step))
        crops, corners = crop_windows(to_tensor(resize_bilinear(view, *size)), window, step)
        with extractor.context.phase("encode"):
            features = extractor.encode(crops)
        return merge_windows(head(features), corners, window)

    return classify_views(image, settings.test_scales, settings.test_flip, logits_of)
