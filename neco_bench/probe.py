"""The linear probe: one 1x1 convolution on patch features, trained by SGD. Pure functions on tensors.

Upsampling the C logits instead of the D features before the head, as the reference does, is the same function (a 1x1
convolution and bilinear interpolation commute, and the interpolation weights sum to 1, so the bias is kept).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neco_bench.errors import NumericalError


@dataclass(frozen=True)
class ProbeOptions:
    """SGD with momentum; the rate is multiplied by `decay` every `decay_epochs` epochs."""

    learning_rate: float
    momentum: float
    weight_decay: float
    decay: float
    decay_epochs: int


def logits_at(head: nn.Conv2d, features: Tensor, height: int, width: int) -> Tensor:
    """(B, C, height, width) logits of features (B, D, h, w), bilinear, align_corners off."""
    return F.interpolate(head(features), (height, width), mode="bilinear", align_corners=False)


def classify(heads: Sequence[nn.Conv2d], features: Tensor, height: int, width: int) -> Tensor:
    """(H, height, width) class ids by each of H heads of one image's features (D, h, w), in one pass."""
    weight = torch.cat([head.weight for head in heads])
    bias = torch.cat([head.bias for head in heads if head.bias is not None])
    logits = F.interpolate(
        F.conv2d(features[None], weight, bias), (height, width), mode="bilinear", align_corners=False
    )
    return logits.view(len(heads), -1, height, width).argmax(1)


def new_head(dimension: int, classes: int, seed: int, device: torch.device) -> nn.Conv2d:
    """A 1x1 convolution with PyTorch's default initialisation, the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Conv2d(dimension, classes, 1).to(device)


def train_probe(
    head: nn.Conv2d, epochs: Iterable[Iterable[tuple[Tensor, Tensor]]], options: ProbeOptions, *, ignore: int = 255
) -> list[nn.Conv2d]:
    """Copies of the head after each epoch; trains `head` in place.

    epochs: for each epoch its batches, features (B, D, h, w) with targets (B, height, width) int64; `ignore` in the
    target is left out of the mean cross-entropy. Raises NumericalError where the loss is not finite.
    """
    optimizer = torch.optim.SGD(
        head.parameters(), lr=options.learning_rate, momentum=options.momentum, weight_decay=options.weight_decay
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, options.decay_epochs, options.decay)
    heads = []
    for batches in epochs:
        for features, target in batches:
            loss = F.cross_entropy(logits_at(head, features, *target.shape[-2:]), target, ignore_index=ignore)
            if not torch.isfinite(loss):
                raise NumericalError("The probe's loss is not finite. Lower the rate with --set learning_rate=0.001.")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        heads.append(copy.deepcopy(head))
    return heads
