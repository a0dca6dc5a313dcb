"""Linear segmentation as DINOv2 evaluates it (`dinov2-1`, `dinov2-ms-1`): BatchNorm and a 1x1 convolution on crops.

Protocol of facebookresearch/dinov2's ADE20K and VOC evaluations (Oquab et al., TMLR 2024, table 10), whose
configurations are known from copies. README.md lists what is from where. Training is that of `dinov3-1` but for the
schedule, the resizing and the colours, which are mmseg's.

Known deviations from the reference: those of `dinov3-1`. Its 512 pixels are padded to 518 for patches of 14, and the
logits stretched; here the crop is 518.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from neco_bench.tasks.finetuning.augment import Distortion, ScaleCropDistort, resize_bilinear
from neco_bench.tasks.linear_segmentation import dinov3
from neco_bench.tasks.linear_segmentation.batches import batched, labelled
from neco_bench.tasks.linear_segmentation.dinov2_settings import Settings
from neco_bench.tasks.linear_segmentation.dinov3_augment import short_side_size
from neco_bench.tasks.linear_segmentation.dinov3_head import BnHead, BnProbeOptions, train_bn_probe
from neco_bench.tasks.segmentation import SegmentationScore

from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import IGNORE, SegmentationDataset
from neco_bench.encoders.adapters.layers import read_last
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.transforms import to_tensor, upsample_argmax


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: crops for every iteration, about two windows per val image, more of larger views."""
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
    distortion = Distortion(s.distortion_probability, s.brightness, s.contrast, s.saturation, s.hue)
    crops = s.max_class_share, s.crop_tries, s.flip_probability
    transform = ScaleCropDistort(window, (window, math.inf), s.scale, *crops, distortion, s.mean or encoder.mean)
    items = dinov3.training_order(len(data["train"]), s, context.seed)
    batches = extractor.stream(data["train"], transform, "train", items=items)
    head = BnHead(encoder.embed_dim, len(val.classes), context.seed).to(encoder.device)
    options = BnProbeOptions(**s.model_dump(include=set(BnProbeOptions.__dataclass_fields__)))
    trained = train_bn_probe(
        head, batched(labelled(batches, data["train"].eval_mask), s.batch_size), options, context.seed, ignore=IGNORE
    )
    last = trained[s.iterations]

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
    """Classify each pixel of an image (H, W, 3) uint8, from one view of it or the mean probabilities of several."""
    height, width = image.shape[:2]
    views = list(itertools.product(settings.test_scales, (False, True) if settings.test_flip else (False,)))
    step, mean = max(1, int(window * settings.window_step)), torch.zeros(())
    for scale, flipped in views:
        size = short_side_size(height, width, max(window, round(window * scale)))
        view = to_tensor(resize_bilinear(image[:, ::-1] if flipped else image, *size))
        rows, columns = (dinov3.window_starts(side, window, step) for side in size)
        corners = list(itertools.product(rows, columns))
        crops = torch.stack([view[:, top : top + window, left : left + window] for top, left in corners])
        with extractor.context.phase("encode"):
            features = extractor.encode(crops)
        logits = dinov3.merge_windows(head(features), corners, window)
        if len(views) == 1:
            return upsample_argmax(logits, height, width).cpu().numpy()
        large = F.interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)[0].softmax(0)
        mean = mean.to(large.device) + (large.flip(-1) if flipped else large) / len(views)
    return mean.argmax(0).cpu().numpy()
