"""Student, teacher, objective and optimizer of one process, and one step of training."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from neco_bench.core import distributed
from neco_bench.core.distributed import RankShard
from neco_bench.core.errors import BadInputError, NumericalError, UsageError
from neco_bench.core.files import write_whole
from neco_bench.core.reduce import mean_over_processes
from neco_bench.encoders.base import Encoder
from neco_bench.encoders.load import load_encoder, resolve_device
from neco_bench.encoders.options import PRECISIONS
from neco_bench.encoders.spec import architecture
from neco_bench.encoders.trainable import StochasticDepth, seeded, set_training
from neco_bench.training import limits
from neco_bench.training.batches import TrainBatch
from neco_bench.training.collapse import effective_rank
from neco_bench.training.images import Images
from neco_bench.training.mim import MaskedImages
from neco_bench.training.neco import NeCo
from neco_bench.training.networks import Network, make_trainable, parameter_groups
from neco_bench.training.options import TrainOptions
from neco_bench.training.recipe import Recipe

log = logging.getLogger("neco_bench")

RANK_EVERY = 50  # steps between computations of the effective rank

# An objective is called with a batch, student and teacher, and returns the loss of the images of this process;
# gradients are averaged over processes. Its state between steps is in its `state_dict`.
OBJECTIVES = {"neco": NeCo, "mim": MaskedImages}


@dataclass
class StepFacts:
    """Facts about a step other than its loss.

    grad_norm: norm over all trained parameters, before clipping. data_seconds: time waiting for batches.
    effective_rank: of the student's patch features, see `collapse.effective_rank`; NaN if not computed.
    """

    grad_norm: float = math.nan
    data_seconds: float = 0.0
    effective_rank: float = math.nan


@dataclass(frozen=True)
class Processes:
    """The processes that train together: number and device of this one. group: used to wait without a time limit."""

    device: torch.device
    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for the other processes without a time limit."""
        if self.world > 1:
            dist.barrier(self.group)

    def mean(self, value: float) -> float:
        """Return the mean of a number over the processes."""
        return float(mean_over_processes(torch.tensor(value, dtype=torch.float64, device=self.device)))

    def sharing(self) -> contextlib.AbstractContextManager[None]:
        """Divide evaluations among the processes."""
        return distributed.sharing(self.group) if self.world > 1 else contextlib.nullcontext()


@contextlib.contextmanager
def joined_processes(device_name: str | None) -> Iterator[Processes]:
    """Join the group of processes that torchrun describes, if it started this one."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = resolve_device(device_name)
    if world == 1:
        yield Processes(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(device, rank, world, dist.new_group(timeout=distributed.NO_LIMIT))
    finally:
        dist.destroy_process_group()


def cosine(first: float, last: float, step: int, steps: int) -> float:
    """Return the value at `step` of half a cosine from `first` at step 0 to `last` at `steps`."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


class Trainer:
    """The trained networks, and one step of training. unusable: {image: reason} of the images left out so far."""

    def __init__(self, recipe: Recipe, options: TrainOptions, images: Images, processes: Processes) -> None:
        """Raise UsageError for inconsistent or too large settings, MissingError for missing weights."""
        self.recipe, self.options, self.images, self.processes = recipe, options, images, processes
        self.device, self.steps = processes.device, recipe.total_steps(len(images))
        self.unusable: dict[str, str] = {}
        self.facts = StepFacts()
        self.skipped_steps = 0
        if recipe.accumulate > 1 and recipe.objective == "neco" and processes.first:
            log.warning(
                "accumulate=%d: each part of %d images is a separate batch, from which NeCo draws its references; "
                "this is not the same as training on %d images at once.",
                recipe.accumulate,
                recipe.batch_size // recipe.accumulate,
                recipe.batch_size,
            )
        encoder = load_encoder(recipe.base, weights=options.weights, device=str(self.device))
        self.architecture = architecture(recipe.base)
        _check_sizes(recipe, encoder)
        count = recipe.batch_size // processes.world // recipe.accumulate
        self.shard = RankShard(recipe.seed, count, processes.rank * count, processes.world * count)
        self.workers = limits.default_workers(recipe, self.shard) if options.workers is None else options.workers
        limits.check(recipe, encoder, self.shard, self.steps, self.workers)
        self._make_networks(encoder)
        self.objective = OBJECTIVES[recipe.objective](recipe, self.student).to(self.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.student), lr=recipe.lr_backbone)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")

    def _make_networks(self, encoder: Encoder) -> None:
        recipe, compiled = self.recipe, self.options.compiled
        teacher = copy.deepcopy(encoder)
        make_trainable(encoder, recipe, self.shard, self.options.checkpointing)
        if compiled and any(isinstance(module, StochasticDepth) for module in encoder.modules()):
            raise UsageError(
                "--compile: stochastic depth cannot be compiled. Add --set drop_path=0, or omit --compile."
            )
        self.student = Network(encoder, recipe, recipe.seed, compiled).to(self.device)
        self.teacher: Network | None = None
        if recipe.use_teacher:
            self.teacher = Network(teacher, recipe, recipe.seed + (not recipe.same_heads), compiled).to(self.device)
            self.teacher.requires_grad_(False).eval()
        set_training(self.student)
        self.embed: Any = self.student
        if self.processes.world > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.embed = DistributedDataParallel(self.student, device_ids=ids)

    @property
    def encoders(self) -> dict[str, Encoder]:
        """The encoders by role, "student" and optionally "teacher"."""
        teacher = {} if self.teacher is None else {"teacher": self.teacher.encoder}
        return {"student": self.student.encoder, **teacher}

    @property
    def parts(self) -> dict[str, Any]:
        """Objects with a `state_dict` other than the encoders."""
        heads = {"student_head": self.student.projection_head}
        if self.teacher is not None:
            heads["teacher_head"] = self.teacher.projection_head
        return {**heads, "objective": self.objective, "optimizer": self.optimizer, "scaler": self.scaler}

    def check_features(self, step: int) -> None:
        """Raise NumericalError if the features are not finite after the last update, so that it is not saved."""
        encoder, size = self.student.encoder, self.recipe.local_size
        try:
            encoder.encode(torch.zeros(1, 3, size, size))
        except NumericalError as error:
            raise NumericalError(
                f"after step {step} the features are not finite, so this state is not saved. Continue from the "
                f"last checkpoint with --resume and a smaller --set lr_backbone."
            ) from error
        set_training(self.student)

    def schedule(self, step: int) -> dict[str, float]:
        """Set the learning rates and weight decay of a step in the optimizer; return them and the momentum."""
        recipe = self.recipe
        warm = min(1.0, (step + 1) / (recipe.warmup_steps + 1))
        after, steps = max(0, step - recipe.warmup_steps), self.steps - recipe.warmup_steps
        values = {
            "lr_backbone": warm * cosine(recipe.lr_backbone, recipe.final_lr, after, steps),
            "lr_head": warm * cosine(recipe.lr_head, recipe.final_lr, after, steps),
            "weight_decay": cosine(recipe.weight_decay, recipe.final_weight_decay, step, self.steps),
            "momentum": cosine(recipe.momentum, recipe.final_momentum, step, self.steps),
        }
        for group in self.optimizer.param_groups:
            summands = group.get("summands", 1)  # older checkpoints lack it
            group["lr"] = values[f"lr_{group['part']}"] * summands
            group["weight_decay"] = values["weight_decay"] * group["decays"] / summands
        return values

    def step(self, step: int, batches: Iterator[Any], momentum: float) -> float:
        """Do one optimizer step on the next batches, one for each part, and return the loss; sets `facts`.

        Raises BadInputError (too many unusable images) and NumericalError (a loss that is not finite; its batch is
        saved).
        """
        recipe, total = self.recipe, 0.0
        self.facts = StepFacts()
        self.student.record_features = step % RANK_EVERY == 0 and self.processes.first
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(recipe.accumulate):
            start = time.perf_counter()
            batch = next(batches)
            self.facts.data_seconds += time.perf_counter() - start
            total += self._backward(step, part, batch) / recipe.accumulate
        if self.student.features is not None:
            self.facts.effective_rank = effective_rank(self.student.features.permute(0, 2, 3, 1).flatten(0, 2))
            self.student.features = None
        if self.teacher is not None:  # before the optimizer's step, as in the official code
            average = get_ema_multi_avg_fn(momentum)
            average(list(self.teacher.parameters()), [p.detach() for p in self.student.parameters()], None)
        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self.student.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if recipe.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(trained, recipe.clip_norm, norm)
        self.facts.grad_norm, scale = float(norm), self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped_steps += self.scaler.get_scale() < scale
        return self.processes.mean(total)

    def _backward(self, step: int, part: int, batch: TrainBatch | BadInputError) -> float:
        """Add the gradients of one part of a step's batch, and return its loss."""
        if isinstance(batch, BadInputError):
            raise batch
        recipe = self.recipe
        self._count_unusable(batch)
        batch = batch.normalised(self.student.encoder, self.device)
        self.shard.batch_number = step * recipe.accumulate + part
        more = self.processes.world > 1 and part + 1 < recipe.accumulate
        dtype = getattr(torch, PRECISIONS[recipe.precision])
        with self.embed.no_sync() if more else contextlib.nullcontext():
            autocast = torch.autocast(self.device.type, dtype, enabled=recipe.precision != "fp32")
            with autocast, seeded(self.shard, self.device):
                loss = self.objective(batch, self.embed, self.teacher, self.teacher or self.student, self.shard)
            value = float(loss.detach())
            if not math.isfinite(value):
                self._save_batch(step, value, batch)
            self.scaler.scale(loss / recipe.accumulate).backward()
        return value

    def _count_unusable(self, batch: TrainBatch) -> None:
        for name, reason in batch.unusable:
            if name not in self.unusable:
                log.warning("training image %s is left out: %s", name, reason)
            self.unusable[name] = reason
        if len(self.unusable) > self.recipe.max_unreadable * len(self.images):
            name, reason = next(iter(self.unusable.items()))
            raise BadInputError(
                f"{len(self.unusable)} of {len(self.images)} training images cannot be used, more than "
                f"max_unreadable={self.recipe.max_unreadable:g} allows; the first is {name}: {reason} Fix the data, "
                f"or allow more with --set max_unreadable=SHARE."
            )

    def _save_batch(self, step: int, value: float, batch: TrainBatch) -> None:
        """Save the batch of a step whose loss is not finite, and raise NumericalError."""
        path = self.options.out / f"not-finite-step-{step + 1}-rank-{self.processes.rank}.pt"
        content = io.BytesIO()
        torch.save({**vars(batch), "step": step + 1, "loss": value}, content)
        write_whole(path, content.getvalue())
        raise NumericalError(
            f"the loss of step {step + 1} is {value}. Its images are in {path}; the last checkpoint is unchanged. "
            f"Continue from it with --resume and --set precision=fp32 or a smaller --set lr_backbone."
        )


def _check_sizes(recipe: Recipe, encoder: Encoder) -> None:
    for name in ("global_size", "local_size"):
        size = getattr(recipe, name)
        if size % encoder.stride:
            low = size // encoder.stride * encoder.stride
            raise UsageError(
                f"{name}={size} is not a multiple of the patch size {encoder.stride} of --base {encoder.name!r}. "
                f"Use --set {name}={low or encoder.stride} or {low + encoder.stride}."
            )
