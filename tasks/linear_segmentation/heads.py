"""The linear probe: one 1x1 convolution on patch features, trained by SGD. Pure functions on tensors.

Upsampling the C logits instead of the D features before the head, as the reference does, is the same function (a 1x1
convolution and bilinear interpolation commute, and the interpolation weights sum to 1, so the bias stays the same).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neco_bench.core.errors import NOTHING_LABELLED, BadInputError, NumericalError
from neco_bench.features.transforms import upsample_argmax

# Features (B, D, h, w) with targets (B, H, W) int64.
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ProbeOptions:
    """SGD with momentum; rates are multiplied by `decay` every `decay_epochs` epochs."""

    momentum: float
    weight_decay: float
    decay: float
    decay_epochs: int


def logits_at(heads: Sequence[nn.Conv2d], features: Tensor, height: int, width: int) -> Tensor:
    """Compute logits (H, B, C, height, width) by each of H heads of features (B, D, h, w), in one pass.

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
    """Make a 1x1 convolution with PyTorch's default initialisation, the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Conv2d(dimension, classes, 1).to(device)


def train_probe(
    heads: Sequence[nn.Conv2d],
    rates: Sequence[float],
    epochs: Iterable[Batches],
    options: ProbeOptions,
    *,
    ignore: int = 255,
) -> list[list[nn.Conv2d]]:
    """Train all heads in place, each with its own learning rate, on the same batches in one pass.

    Args:
        heads: H of them; none depends on the others.
        rates: the learning rate of each.
        epochs: for each epoch its batches.
        options: of the optimiser.
        ignore: id in the targets that is left out of the mean cross-entropy.

    Returns:
        Copies of the heads after each epoch.

    Raises:
        NumericalError: where a loss is not finite.
        BadInputError: where no target of the first epoch has anything but `ignore`.
    """
    groups = [{"params": list(head.parameters()), "lr": rate} for head, rate in zip(heads, rates, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=options.momentum, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, options.decay_epochs, options.decay)
    snapshots, learned = [], False
    for batches in epochs:
        for features, target in batches:
            logits = logits_at(heads, features, *target.shape[-2:])
            losses = torch.stack([F.cross_entropy(own, target, ignore_index=ignore) for own in logits])
            if not torch.isfinite(losses).all():
                if (target == ignore).all():  # nothing to learn from
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
