"""The linear head with BatchNorm: channel dropout, BatchNorm, 1x1 convolution, trained by AdamW.

Head, schedule and loss are those of facebookresearch/dinov3's linear segmentation. Dropout comes before BatchNorm, so
BatchNorm gets a larger variance in training than afterwards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from neco_bench.tasks.linear_segmentation.batches import Batches
from neco_bench.tasks.linear_segmentation.dinov3_settings import Settings
from torch import Tensor, nn

from neco_bench.core.errors import NOTHING_LABELLED, BadInputError, NumericalError
from neco_bench.core.rng import item_rng
from neco_bench.data.base import IGNORE


def learning_rate(step: int, settings: Settings) -> float:
    """Compute the learning rate at step 0..iterations-1.

    The warm-up is linear, times a linear decay to 0 over all iterations. After it, the schedule "linear" continues the
    decay; "dinov3" uses a cosine from the peak at step -1 to 0 at the last step, so the rate jumps after the warm-up.
    """
    s, done = settings, step / settings.iterations
    if step < s.warmup:
        factor = (1 - (1 - step / s.warmup) * (1 - s.warmup_start)) * (1 - done)
    elif s.schedule == "linear":
        factor = 1 - done
    else:
        factor = (1 + math.cos(math.pi * (step + 1) / s.iterations)) / 2
    return s.learning_rate * factor


class BnHead(nn.Module):
    """BatchNorm and a 1x1 convolution, with weights from N(0, 0.01²), drawn by `seed`, and bias 0."""

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

    The selection depends only on (seed, iteration), on every device.
    """
    if not probability:
        return features
    stays = item_rng(seed, "dropout", iteration).random(features.shape[:2]) >= probability
    scale = torch.from_numpy(stays / (1 - probability)).to(features)
    return features * scale[:, :, None, None]


def add_gradient(
    logits: Tensor, target: Tensor, divisor: float, scale: Callable[[Tensor], Tensor] = lambda loss: loss
) -> float:
    """Back-propagate the loss of logits (B, C, h, w) for a target (B, H, W) int64, and return the loss.

    The loss is the cross-entropy of the logits upsampled to H x W (bilinear, align_corners off), summed over the pixels
    that are not void, and divided by `divisor`. Images are upsampled one at a time: a batch would need gigabytes.
    scale: is applied to the loss before it is back-propagated, as `GradScaler.scale`.
    """
    small = logits.detach().requires_grad_()
    losses = []
    for row, truth in zip(small, target, strict=True):
        large = F.interpolate(row[None], truth.shape, mode="bilinear", align_corners=False)
        loss = F.cross_entropy(large, truth[None], ignore_index=IGNORE, reduction="sum") / divisor
        scale(loss).backward()
        losses.append(loss.detach())
    logits.backward(small.grad)
    return float(torch.stack(losses).sum())


def train_bn_probe(head: BnHead, batches: Batches, settings: Settings, seed: int) -> dict[int, BnHead]:
    """Train `head` in place by AdamW (betas 0.9 and 0.999, weight decay of all parameters), one batch per iteration.

    Args:
        head: the head to train.
        batches: the batches of all iterations.
        settings: settings of the protocol.
        seed: seed of the dropout.

    Returns:
        {iterations done: copy of the head, in eval mode} at multiples of `evaluate_every` and at the end.

    Raises:
        NumericalError: if the loss is not finite.
        BadInputError: if all targets contain only void.
    """
    s = settings
    optimizer = torch.optim.AdamW(head.parameters(), s.learning_rate, weight_decay=s.weight_decay)
    heads, learned = {}, False
    head.train()
    for iteration, (features, target) in enumerate(batches):
        # dinov3's reference does not advance its schedule after the first iteration.
        step = max(0, iteration - 1) if s.schedule == "dinov3" else iteration
        optimizer.param_groups[0]["lr"] = learning_rate(step, s)
        optimizer.zero_grad()
        logits = head(drop_channels(features, s.dropout, seed, iteration))
        if not math.isfinite(add_gradient(logits, target, target.numel())):
            raise NumericalError("The probe's loss is not finite. Lower the rate with --set learning_rate=0.0001.")
        optimizer.step()
        learned = learned or bool((target != IGNORE).any())
        done = iteration + 1
        if done % s.evaluate_every == 0 or done == s.iterations:
            heads[done] = copy.deepcopy(head).eval()
    if not learned:
        raise BadInputError(NOTHING_LABELLED)
    return heads
