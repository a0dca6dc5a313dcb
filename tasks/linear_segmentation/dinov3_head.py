"""The linear probe with BatchNorm: channel dropout, BatchNorm, 1x1 convolution, trained by AdamW. Pure functions.

As in facebookresearch/dinov3's linear segmentation, its schedule and its loss included. Dropout comes before BatchNorm
there, so that BatchNorm sees a larger variance in training than afterwards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neco_bench.core.errors import NOTHING_LABELLED, BadInputError, NumericalError
from neco_bench.core.rng import item_rng


@dataclass(frozen=True)
class BnProbeOptions:
    """AdamW, betas 0.9 and 0.999, decay on every parameter. Lengths in iterations; dropout: of whole channels.

    schedule: after the warm-up, the cosine of `dinov3-1`, or a linear decay to 0.
    """

    iterations: int
    learning_rate: float
    weight_decay: float
    warmup: int
    warmup_start: float
    dropout: float
    evaluate_every: int
    schedule: Literal["dinov3", "linear"] = "dinov3"


def learning_rate(step: int, options: BnProbeOptions) -> float:
    """Compute the rate at step 0..iterations-1 of the schedule.

    The warm-up is linear, times a linear decay to 0 over all iterations. Then that decay goes on, or under "dinov3"
    follows a cosine from the peak at step -1 to 0 at the last step, so that the rate jumps where they meet.
    """
    done = step / options.iterations
    if step < options.warmup:
        factor = (1 - (1 - step / options.warmup) * (1 - options.warmup_start)) * (1 - done)
    elif options.schedule == "linear":
        factor = 1 - done
    else:
        factor = (1 + math.cos(math.pi * (step + 1) / options.iterations)) / 2
    return options.learning_rate * factor


class BnHead(nn.Module):
    """BatchNorm and a 1x1 convolution, weights from N(0, 0.01^2), bias 0; the same for a seed."""

    def __init__(self, dimension: int, classes: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dimension)
        self.weight = nn.Parameter(torch.empty(classes, dimension))
        self.bias = nn.Parameter(torch.zeros(classes))
        nn.init.normal_(self.weight, std=0.01, generator=torch.Generator().manual_seed(seed))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, h, w) -> logits (B, C, h, w)."""
        return F.conv2d(self.norm(features), self.weight[:, :, None, None], self.bias)


def drop_channels(features: Tensor, probability: float, seed: int, iteration: int) -> Tensor:
    """Set whole channels of images (B, D, h, w) to 0, and scale the others by 1 / (1 - probability).

    Which ones depends on (seed, iteration) alone, on every device.
    """
    if not probability:
        return features
    stays = item_rng(seed, "dropout", iteration).random(features.shape[:2]) >= probability
    scale = torch.from_numpy(stays / (1 - probability)).to(features)
    return features * scale[:, :, None, None]


def add_gradient(logits: Tensor, target: Tensor, ignore: int) -> float:
    """Back-propagate the loss of logits (B, C, h, w) for a target (B, H, W) int64, and return the loss.

    Cross-entropy of the logits upsampled to H x W (bilinear, align_corners off), summed over the pixels that are not
    `ignore` and divided by the number of all pixels. Upsampled one image at a time: a batch would take gigabytes.
    """
    small = logits.detach().requires_grad_()
    losses = []
    for row, truth in zip(small, target, strict=True):
        large = F.interpolate(row[None], truth.shape, mode="bilinear", align_corners=False)
        loss = F.cross_entropy(large, truth[None], ignore_index=ignore, reduction="sum") / target.numel()
        loss.backward()
        losses.append(loss.detach())
    logits.backward(small.grad)
    return float(torch.stack(losses).sum())


def train_bn_probe(
    head: BnHead,
    batches: Iterable[tuple[Tensor, Tensor]],
    options: BnProbeOptions,
    seed: int,
    *,
    ignore: int = 255,
) -> dict[int, BnHead]:
    """Train `head` in place, one batch for each iteration.

    Args:
        head: the head to train.
        batches: features (B, D, h, w) with targets (B, H, W) int64.
        options: of the optimiser and its schedule.
        seed: of the dropout.
        ignore: id in the targets that is left out of the loss.

    Returns:
        {iterations done: copy of the head, in eval mode} at multiples of `evaluate_every` and at the end.

    Raises:
        NumericalError: where the loss is not finite.
        BadInputError: where no target has anything but `ignore`.
    """
    optimizer = torch.optim.AdamW(head.parameters(), options.learning_rate, weight_decay=options.weight_decay)
    heads, learned = {}, False
    head.train()
    for iteration, (features, target) in enumerate(batches):
        # dinov3's reference steps its schedule after every iteration but the first.
        step = max(0, iteration - 1) if options.schedule == "dinov3" else iteration
        optimizer.param_groups[0]["lr"] = learning_rate(step, options)
        optimizer.zero_grad()
        logits = head(drop_channels(features, options.dropout, seed, iteration))
        if not math.isfinite(add_gradient(logits, target, ignore)):
            raise NumericalError("The probe's loss is not finite. Lower the rate with --set learning_rate=0.0001.")
        optimizer.step()
        learned = learned or bool((target != ignore).any())
        done = iteration + 1
        if done % options.evaluate_every == 0 or done == options.iterations:
            heads[done] = copy.deepcopy(head).eval()
    if not learned:
        raise BadInputError(NOTHING_LABELLED)
    return heads
