"""The linear head: a 1x1 convolution on patch features, trained by SGD.

The reference upsamples the D features before the head. Upsampling the C logits instead is the same function: a 1x1
convolution and bilinear interpolation commute, and the interpolation weights sum to 1, so the bias stays the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from neco_bench.tasks.linear_segmentation.batches import Batches
from neco_bench.tasks.linear_segmentation.settings import Settings
from torch import Tensor, nn

from neco_bench.core.errors import NOTHING_LABELLED, BadInputError, NumericalError
from neco_bench.data.base import IGNORE
from neco_bench.features.transforms import upsample_argmax


def logits_at(heads: Sequence[nn.Conv2d], features: Tensor, height: int, width: int) -> Tensor:
    """Compute the logits (H, B, C, height, width) of features (B, D, h, w) by each of H heads, in one pass.

    Upsampling is bilinear, align_corners off.
    """
    weight = torch.cat([head.weight for head in heads])
    bias = torch.cat([head.bias for head in heads if head.bias is not None])
    logits = F.conv2d(features, weight, bias)
    logits = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
    return logits.unflatten(1, (len(heads), -1)).transpose(0, 1)


@torch.no_grad()
def classify(heads: Sequence[nn.Conv2d], features: Tensor, height: int, width: int) -> Tensor:
    """Classify each pixel of an image with features (D, h, w) by each of H heads: class ids (H, height, width)."""
    small = logits_at(heads, features[None], *features.shape[1:])[:, 0]
    return torch.stack([upsample_argmax(logits, height, width) for logits in small])


def new_head(dimension: int, classes: int, seed: int, device: torch.device) -> nn.Conv2d:
    """Create a 1x1 convolution with PyTorch's default initialisation, drawn by `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Conv2d(dimension, classes, 1).to(device)


def train_probe(
    heads: Sequence[nn.Conv2d], rates: Sequence[float], epochs: Iterable[Batches], settings: Settings
) -> list[list[nn.Conv2d]]:
    """Train all heads in place by SGD with momentum, on the same batches; no head depends on the others.

    The loss is the mean cross-entropy over the labelled pixels.

    Args:
        heads: the heads.
        rates: the learning rate of each head.
        epochs: the batches of each epoch.
        settings: settings of the protocol.

    Returns:
        Copies of the heads after each epoch.

    Raises:
        NumericalError: if a loss is not finite.
        BadInputError: if all targets of the first epoch contain only void.
    """
    groups = [{"params": list(head.parameters()), "lr": rate} for head, rate in zip(heads, rates, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, settings.decay_epochs, settings.decay)
    snapshots, learned = [], False
    for batches in epochs:
        for features, target in batches:
            logits = logits_at(heads, features, *target.shape[-2:])
            losses = torch.stack([F.cross_entropy(own, target, ignore_index=IGNORE) for own in logits])
            if not torch.isfinite(losses).all():
                if (target == IGNORE).all():  # nothing to learn from
                    continue
                rate = rates[int(torch.isfinite(losses).int().argmin())]
                raise NumericalError(
                    f"The probe's loss is not finite at learning_rate={rate:g}. Lower it with --set learning_rate=0.001"
                )
            learned = True
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
        if not learned:
            raise BadInputError(NOTHING_LABELLED)
        schedule.step()
        snapshots.append(copy.deepcopy(list(heads)))
    return snapshots
