"""Training of a linear head by AdamW, with the schedules of the references."""

from __future__ import annotations

import copy
import math

import torch
from neco_bench.tasks.dense_regression.heads import DenseHead, predict
from neco_bench.tasks.dense_regression.inputs import InputGrid
from neco_bench.tasks.dense_regression.losses import angular_loss, cosine_loss, sig_loss
from neco_bench.tasks.dense_regression.settings import Settings
from neco_bench.tasks.linear_segmentation.batches import Batches
from torch import Tensor

from neco_bench.core.errors import BadInputError, NumericalError

BASE_MOMENTUM, MAX_MOMENTUM = 0.85, 0.95  # range of beta1 in the schedules "dinov2" and "dinov3"

WARMUP_START = 1e-3  # share of the rate at the first step of the schedules "dinov2" and "dinov3"


def _cosine(start: float, end: float, done: float) -> float:
    """Return the value at `done`, from 0 to 1, of half a cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def rates_at(step: int, total: int, settings: Settings) -> tuple[float, float]:
    """Return the learning rate and beta1 of step 0..total-1.

    "dinov3": linear warm-up times a cosine over all steps, plus a thousandth of the rate, with beta1 0; then the cosine
    to 1/25,000 of the rate, with beta1 from 0.85 to 0.95. "dinov2": mmcv's cosine to 1e-8 of the rate, linear warm-up
    from a thousandth, and its one-cycle momentum, from 0.95 to 0.85 in the first 30 % and back. "probe3d": linear from
    0.01 to 1, then a quarter of a cosine to 0.01. "cosine": linear warm-up, then a cosine to 0. In the last two, beta1
    is 0.9.
    """
    s, peak, warmup = settings, settings.learning_rate, round(settings.warmup * total)
    if s.schedule == "dinov3":
        if step < warmup:
            rate, beta1 = peak * WARMUP_START + _cosine(peak, 0, step / total) * step / warmup, 0.0
        else:
            least = peak / 25 / 1000
            rate = _cosine(peak, least, (step + 1) / total)
            beta1 = _cosine(BASE_MOMENTUM, MAX_MOMENTUM, (step - warmup) / (total - warmup))
    elif s.schedule == "dinov2":
        rate = _cosine(peak, 1e-8 * peak, step / total)
        rate *= 1 - (1 - min(1.0, step / max(1, warmup))) * (1 - WARMUP_START)
        turn = max(1.0, 0.3 * total - 1)
        down = step <= turn
        done = step / turn if down else (step - turn) / max(1.0, total - 1 - turn)
        ends = (MAX_MOMENTUM, BASE_MOMENTUM) if down else (BASE_MOMENTUM, MAX_MOMENTUM)
        beta1 = _cosine(*ends, done)
    else:
        rate, beta1 = peak, 0.9
        if step < warmup:
            low = 0.01 if s.schedule == "probe3d" else 0.0
            rate *= low + (1 - low) * (step + (s.schedule == "cosine")) / warmup
        elif s.schedule == "probe3d":
            rate *= 0.99 * math.cos(math.pi / 2 * (step - warmup) / (total - warmup)) + 0.01
        else:
            rate = _cosine(peak, 0, (step - warmup) / (total - warmup))
    return rate, beta1 if s.beta1 is None else s.beta1


def loss_of(prediction: Tensor, target: Tensor, settings: Settings, call: int) -> Tensor | None:
    """Return the loss of a batch of predictions, the mean over groups of `loss_images`; None if no pixel has a target.

    Args:
        prediction: depth (B, H, W) or directions (B, H, W, 3 or 4).
        target: (B, H, W) or (B, H, W, 3), 0 where there is none.
        settings: settings of the protocol.
        call: number of the batch.
    """
    s = settings
    size, losses = s.loss_images or len(target), []
    for predicted, true in zip(prediction.split(size), target.split(size), strict=True):
        valid = true > 0 if s.target == "depth" else (true != 0).any(-1)
        if s.target == "depth" and s.train_max_depth is not None:
            valid &= true < s.train_max_depth
        if valid.sum() < 2:
            continue
        if s.target == "depth":
            losses.append(sig_loss(predicted, true, valid, with_variance=call >= s.loss_warmup))
        else:
            losses.append((angular_loss if s.confidence else cosine_loss)(predicted, true, valid))
    return torch.stack(losses).mean() if losses else None


def train_head(head: DenseHead, batches: Batches, grid: InputGrid, total: int) -> dict[int, DenseHead]:
    """Train `head` in place, one batch per iteration.

    Args:
        head: the head to train.
        batches: features (B, D, h, w) with targets (B, H, W) or (B, H, W, 3).
        grid: position of crops in their inputs.
        total: number of batches.

    Returns:
        {iterations done: copy of the head, in eval mode}, `evaluations` of them, the last one at the end.

    Raises:
        NumericalError: if the loss is not finite.
        BadInputError: if no pixel has a target.
    """
    s = head.settings
    optimizer = torch.optim.AdamW(head.parameters(), lr=s.learning_rate, weight_decay=s.weight_decay)
    every = max(1, total // s.evaluations)
    heads, learned = {}, False
    head.train()
    for iteration, (features, target) in enumerate(batches):
        rate, beta1 = rates_at(iteration, total, s)
        optimizer.param_groups[0].update(lr=rate, betas=(beta1, s.beta2))
        optimizer.zero_grad()
        prediction = predict(head, features, grid, tuple(target.shape[1:3]))  # type: ignore[arg-type]
        loss = loss_of(prediction, target, s, iteration)
        if loss is not None:
            if not torch.isfinite(loss):
                raise NumericalError("The head's loss is not finite. Lower the rate with --set learning_rate=0.00001.")
            loss.backward()
            if s.clip is not None:
                torch.nn.utils.clip_grad_norm_(head.parameters(), s.clip)
            optimizer.step()
            learned = True
        done = iteration + 1
        if done == total or (done % every == 0 and done // every < s.evaluations):
            heads[done] = copy.deepcopy(head).eval()
    if not learned:
        raise BadInputError(
            "No pixel of the training images has a target, so there is nothing to learn from. Check them: neco-bench "
            "data check."
        )
    return heads
