"""Training steps of a Segmenter, their schedule, and the order of batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from neco_bench.tasks.finetuning.segmenter import Segmenter
from neco_bench.tasks.finetuning.settings import Settings
from torch import Tensor

from neco_bench.core import distributed
from neco_bench.core.errors import NecoBenchError, NumericalError, is_out_of_memory
from neco_bench.core.reduce import sum_in_place
from neco_bench.core.rng import item_rng
from neco_bench.core.task import Context
from neco_bench.data.base import IGNORE
from neco_bench.encoders.base import Encoder


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Compute the rate at step 0..steps-1: a polynomial decay from `learning_rate` to `final_rate`."""
    factor = (1 - step / steps) ** settings.power
    return (settings.learning_rate - settings.final_rate) * factor + settings.final_rate


class Epochs(Sequence[tuple[int, int]]):
    """The items (epoch, index) of all epochs; each epoch is another permutation."""

    def __init__(self, images: int, epochs: int, seed: int) -> None:
        self.images, self.epochs, self.seed = images, epochs, seed

    def __len__(self) -> int:
        return self.images * self.epochs

    def __getitem__(self, position: Any) -> Any:
        epoch, place = divmod(int(position), self.images)
        return epoch, int(_order(self.images, epoch, self.seed)[place])

    def batch(self, step: int, size: int) -> range:
        """Return the positions of a step's batch; the last batch of an epoch may be smaller."""
        epoch, number = divmod(step, -(-self.images // size))
        first = epoch * self.images
        return range(first + number * size, first + min((number + 1) * size, self.images))


@lru_cache(maxsize=2)
def _order(count: int, epoch: int, seed: int) -> np.ndarray:
    return item_rng(seed, "order", epoch).permutation(count)


def share_of_process(batch: range) -> range:
    """Return the part of a batch that this process computes."""
    rank, world = distributed.rank(), distributed.world()
    return batch[rank * len(batch) // world : (rank + 1) * len(batch) // world]


class Trainer:
    """Training of a Segmenter, step by step. labelled: number of labelled pixels so far."""

    def __init__(self, segmenter: Segmenter, settings: Settings, context: Context, steps: int) -> None:
        self.segmenter, self.settings, self.context, self.steps = segmenter, settings, context, steps
        s, device = settings, segmenter.encoder.device
        self.optimizer = torch.optim.SGD(
            segmenter.trained, s.learning_rate, s.momentum, weight_decay=s.weight_decay, nesterov=s.nesterov
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=segmenter.encoder.precision == "fp16")
        self.labelled = 0

    @property
    def parts(self) -> dict[str, Any]:
        """Objects with a `state_dict`, except the encoder."""
        return {"decoder": self.segmenter.decoder, "optimizer": self.optimizer, "scaler": self.scaler}

    @property
    def encoders(self) -> dict[str, Encoder]:
        """The encoder, by its name in checkpoints."""
        return {"student": self.segmenter.encoder}

    def step(self, number: int, start: int, total: int, batch: tuple[Tensor, Tensor] | None) -> float:
        """Do a step on this process's part of a batch, and return the loss of the whole batch.

        The loss is the mean over the labelled pixels of the whole batch, so it does not depend on the number of
        processes or on the parts that fit in memory. A batch without a labelled pixel does not change weights.

        Args:
            number: number of the step, from 0.
            start: place of the part in the batch.
            total: number of images of the batch.
            batch: images (B, 3, H, W) in [0, 1] and masks (B, H, W) int64; None for an empty part.

        Raises:
            NumericalError: if the loss is not finite.
        """
        self.segmenter.shard.batch_number, self.segmenter.shard.total = number, total
        rate = learning_rate(number, self.steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        labelled = round(self.total(0.0 if batch is None else float((batch[1] != IGNORE).sum())))
        loss = self.total(self._gradient(start, max(1, labelled), batch))
        if distributed.world() > 1:
            for parameter in self.segmenter.trained:  # a process without an image has no gradient
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            sum_in_place(p.grad for p in self.segmenter.trained if p.grad is not None)
        if not math.isfinite(loss):
            raise NumericalError(
                f"The loss of step {number + 1} of fine-tuning is not finite. Lower the rate with "
                f"--set learning_rate={self.settings.learning_rate / 10:g}, or use --precision fp32."
            )
        if labelled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.labelled += labelled
        return loss

    def total(self, value: float) -> float:
        """Sum a number over the processes."""
        return sum(distributed.gather(value))

    def _gradient(self, start: int, labelled: int, batch: tuple[Tensor, Tensor] | None) -> float:
        """Compute the gradient of a batch, in smaller parts after an out-of-memory error, and return the loss."""
        context, shard = self.context, self.segmenter.shard
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            loss, first, size = 0.0, 0, context.batch_size_used
            try:
                for images, masks in zip(*(part.split(size) for part in batch or ()), strict=True):
                    shard.start, shard.images = start + first, len(images)
                    loss += self.segmenter.backward(images, masks, labelled, self.scaler.scale)
                    first += len(images)
                return loss
            except (RuntimeError, MemoryError, NecoBenchError) as error:
                if size == 1 or distributed.world() > 1 or not is_out_of_memory(error):
                    raise
            context.run.batch_size = min(size, len(batch[0]) if batch else 1) // 2 or 1
            torch.cuda.empty_cache()
