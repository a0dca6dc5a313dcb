"""An FCN head on frozen patch features, as Leopart evaluates it (`leopart-fcn-1`): three 3x3 convolutions and a 1x1.

Protocol of MkuuWaUjinga/leopart's `linear_finetune.py` with `head_type: fcn` (Ziegler and Asano, CVPR 2022, table 4):
the linear protocol that NeCo adopted, with another head. README.md states what could not be verified.

Known deviations from the reference: those of `neco-1`, and dropout is drawn per iteration.
"""

from __future__ import annotations

import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from neco_bench.tasks.linear_segmentation.dinov3_head import drop_channels
from neco_bench.tasks.linear_segmentation.fcn_settings import Settings
from neco_bench.tasks.linear_segmentation.task import add_images, training_epochs
from neco_bench.tasks.segmentation import SegmentationScore
from torch import Tensor, nn

from neco_bench.core.errors import NOTHING_LABELLED, BadInputError, NumericalError
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import IGNORE, SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureExtractor

PART = 8  # images that the head processes at once: their activations are large


class FcnHead(nn.Module):
    """Two 3x3 convolutions, a third one on features and their output, and a 1x1; ReLU after each except the last."""

    def __init__(self, dimension: int, channels: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(dimension, channels), _convolution(channels, channels)
        self.joined = _convolution(dimension + channels, channels)
        self.classify = nn.Conv2d(channels, classes, 1)

    def hidden(self, features: Tensor) -> Tensor:
        """Compute the input (B, channels, h, w) of the last convolution from features (B, D, h, w)."""
        inner = self.second(self.first(features).relu()).relu()
        return self.joined(torch.cat([features, inner], 1)).relu()

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits (B, C, h, w) from features (B, D, h, w)."""
        return self.classify(self.hidden(features))


def _convolution(before: int, after: int) -> nn.Conv2d:
    layer = nn.Conv2d(before, after, 3, padding=1)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def new_fcn_head(dimension: int, channels: int, classes: int, seed: int) -> FcnHead:
    """Create a head with initial weights drawn by `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FcnHead(dimension, channels, classes)


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: every training image once per epoch, with the head's forward and backward pass."""
    size, classes, c = settings.input_size_for(stride), len(data["val"].classes), settings.channels
    weights = 9 * (dimension * c + c * c + (dimension + c) * c) + c * classes
    views, side = settings.epochs * len(data["train"]), settings.train_mask_size
    heads = settings.epochs if settings.select == "best" else 1
    return Cost(
        images=views + len(data["val"]),
        size=size,
        width=dimension,
        operations=2.0 * weights * side**2 * (3 * views + heads * len(data["val"])),
        memory=4.0 * (heads + 3) * weights + 8.0 * PART * side**2 * (2 * dimension + 5 * c + classes),
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the mIoU of an FCN head trained on data["train"], scored on data["val"]."""
    s, val, size = settings, data["val"], settings.input_size_for(encoder.stride)
    extractor = FeatureExtractor(encoder, context, mean=s.mean, std=s.std)
    head = new_fcn_head(encoder.embed_dim, s.channels, len(val.classes), context.seed).to(encoder.device)
    optimizer = torch.optim.SGD(head.parameters(), s.learning_rate, s.momentum, weight_decay=s.weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, s.decay_epochs, s.decay)
    heads, iteration, learned = [], 0, False
    for batches in training_epochs(extractor, data["train"], s, size):
        for features, target in batches:
            optimizer.zero_grad()
            ones = torch.ones(len(features), s.channels, 1, 1)
            loss = add_gradient(head, features, target, drop_channels(ones, s.dropout, context.seed, iteration))
            if not math.isfinite(loss):
                raise NumericalError("The head's loss is not finite. Lower the rate with --set learning_rate=0.001")
            optimizer.step()
            iteration, learned = iteration + 1, learned or bool((target != IGNORE).any())
        if not learned:
            raise BadInputError(NOTHING_LABELLED)
        schedule.step()
        heads += [copy.deepcopy(head)]
        heads = heads if s.select == "best" else heads[-1:]

    score = SegmentationScore(val, settings, context, shape=(len(heads),))
    add_images(score, extractor, len(val), partial(_classify, heads))
    scores = score.mean_ious()
    best = int(scores.argmax())
    context.note(epoch_reported=s.epochs - len(heads) + best + 1, scored_images=len(val))
    metrics = {"mIoU_last_epoch": float(scores[-1])}
    return score.outcome(used_size=size, resize="squash", select=(best,), metrics=metrics)


def add_gradient(head: FcnHead, features: Tensor, target: Tensor, dropped: Tensor) -> float:
    """Back-propagate the mean cross-entropy over the labelled pixels of a batch, in parts, and return it.

    Args:
        head: the head, on the features' device.
        features: (B, D, h, w); they are upsampled to the target before the head (bilinear, align_corners off).
        target: (B, H, W) int64, with IGNORE.
        dropped: (B, channels, 1, 1) factors of the input channels of the last convolution.
    """
    labelled, total = max(1, int((target != IGNORE).sum())), 0.0
    for rows, truth, factors in zip(features.split(PART), target.split(PART), dropped.split(PART), strict=True):
        large = F.interpolate(rows, truth.shape[1:], mode="bilinear", align_corners=False)
        logits = head.classify(head.hidden(large) * factors.to(large))
        loss = F.cross_entropy(logits, truth, ignore_index=IGNORE, reduction="sum") / labelled
        loss.backward()
        total += float(loss.detach())
    return total


@torch.no_grad()
def _classify(heads: list[FcnHead], features: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Classify each pixel of an image with features (D, h, w) by each of H heads: class ids (H, height, width)."""
    large = F.interpolate(features[None], shape, mode="bilinear", align_corners=False)
    return torch.stack([head(large)[0].argmax(0) for head in heads])
