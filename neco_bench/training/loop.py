"""The training loop: from a recipe to a run folder that `neco-bench run --model` takes.

A run folder holds

    recipe.json                the recipe with every value, the base, the data, and versions
    checkpoint-<step>/         see `checkpoints`; encoder.json says which is the newest
    log.csv                    one line per step
    eval.csv, results/         scores on task cards, where they were asked for

On one process a resumed run gives the same weights, bit for bit, as one that was never interrupted. Started by torchrun
(`torchrun --nproc-per-node 2 -m neco_bench train ...`) a step's batch is shared by the processes, and gradients are
averaged (DistributedDataParallel).
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from neco_bench.encoders.base import Encoder
from neco_bench.encoders.run_folder import architecture
from neco_bench.encoders.specs import load_encoder, resolve_device
from neco_bench.encoders.zoo import PRECISIONS
from neco_bench.errors import BadInputError, MissingError, NecoBenchError, NumericalError, UsageError
from neco_bench.protocol import find_tasks
from neco_bench.results.files import write_whole
from neco_bench.results.provenance import environment, peak_memory_mb
from neco_bench.runner import Options as RunOptions
from neco_bench.training import checkpoints
from neco_bench.training.batches import Order, loader
from neco_bench.training.images import Images, open_images
from neco_bench.training.networks import Network, Place, StochasticDepth, make_trainable, parameter_groups, set_training
from neco_bench.training.objectives import OBJECTIVES, Batch, mean_over_processes
from neco_bench.training.recipe import Recipe

log = logging.getLogger("neco_bench")


@dataclass(frozen=True)
class Options:
    """How to train, none of which the result hangs on but for rounding. evaluate: tasks scored every `eval_every`
    steps and at the end. save_every: steps between checkpoints. None: the best device, cores - 1 workers."""

    out: Path
    data: str
    data_root: Path | None = None
    weights: Path | None = None
    device: str | None = None
    workers: int | None = None
    resume: bool = False
    save_every: int = 500
    evaluate: tuple[str, ...] = ()
    eval_every: int = 1000
    compiled: bool = False
    checkpointing: bool = False
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--save-every", self.save_every, 1),
            ("--eval-every", self.eval_every, 1),
            ("--workers", self.workers, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}.")


class Interrupted(NecoBenchError):
    """The run was stopped by a signal, after its state was saved."""

    exit_code = 130


def cosine(first: float, last: float, step: int, steps: int) -> float:
    """Half a cosine from `first` at step 0 to `last` at `steps`."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


def train(recipe: Recipe, options: Options) -> Path:
    """Train by a recipe and return the run folder.

    Raises UsageError (settings that do not fit each other, a folder that holds another run), MissingError (images,
    weights), BadInputError (too many unusable images, a broken checkpoint), NumericalError (a loss that is not finite;
    its batch is saved), Interrupted (SIGINT or SIGTERM, state saved), NecoBenchError (a full disk).
    """
    with _processes(options) as (rank, world, device):
        return _Run(recipe, options, rank, world, device).run()


@contextlib.contextmanager
def _processes(options: Options) -> Iterator[tuple[int, int, torch.device]]:
    """Rank, number of processes and device of this one; joins the group that torchrun describes."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = resolve_device(options.device)
    if world == 1:
        yield 0, 1, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield rank, world, device
    finally:
        dist.destroy_process_group()


class _Run:
    def __init__(self, recipe: Recipe, options: Options, rank: int, world: int, device: torch.device) -> None:
        self.recipe, self.options, self.rank, self.world, self.device = recipe, options, rank, world, device
        if recipe.batch_size % (world * recipe.accumulate):
            raise UsageError(
                f"batch_size={recipe.batch_size} cannot be shared by {world} processes in {recipe.accumulate} parts. "
                f"Use a multiple of {world * recipe.accumulate}."
            )
        for task in options.evaluate:  # what cannot be scored is an error now
            if len(find_tasks([task])) > 1:
                raise UsageError(f"--eval {task!r} names several tasks. Give --eval once for each.")
        if options.evaluate and "?" in str(options.out):
            raise UsageError(f"--out {options.out}: a '?' begins the options of a model, so --eval cannot name it.")
        self.images: Images = open_images(options.data, options.data_root)
        self.overlap = self.images.overlap(options.data_root)
        self.steps = recipe.total_steps(len(self.images))
        encoder = load_encoder(recipe.base, weights=options.weights, device=str(device))
        self.architecture = architecture(recipe.base)
        self._check_sizes(encoder)
        count = recipe.batch_size // world // recipe.accumulate
        self.place = Place(recipe.seed, count, rank * count, world * count)
        teacher = copy.deepcopy(encoder)
        make_trainable(encoder, recipe, self.place, options.checkpointing)
        if options.compiled and any(isinstance(module, StochasticDepth) for module in encoder.modules()):
            raise UsageError("--compile: stochastic depth cannot be compiled. Add --set drop_path=0, or leave it out.")
        self.student = Network(encoder, recipe, recipe.seed, options.compiled).to(device)
        self.objective = OBJECTIVES[recipe.objective](recipe, self.student).to(device)
        self.teacher: Network | None = None
        if recipe.use_teacher:
            self.teacher = (
                Network(teacher, recipe, recipe.seed + (not recipe.same_heads), options.compiled)
                .to(device)
                .requires_grad_(False)
                .eval()
            )
        set_training(self.student)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.student), lr=recipe.lr_backbone)
        self.dtype = getattr(torch, PRECISIONS[recipe.precision])
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.embed: Any = self.student
        if world > 1:
            on = [device] if device.type == "cuda" else None
            self.embed = DistributedDataParallel(self.student, device_ids=on)
        self.unusable: dict[str, str] = {}
        self.stop: int | None = None

    def _check_sizes(self, encoder: Encoder) -> None:
        for name in ("global_size", "local_size"):
            size = getattr(self.recipe, name)
            if size % encoder.stride:
                low = size // encoder.stride * encoder.stride
                raise UsageError(
                    f"{name}={size} is not a multiple of the patch size {encoder.stride} of --base {encoder.name!r}. "
                    f"Use --set {name}={low or encoder.stride} or {low + encoder.stride}."
                )

    # Settings of a step ------------------------------------------------------------------------------------------

    def _schedule(self, step: int) -> dict[str, float]:
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
            group["lr"] = values[f"lr_{group['part']}"]
            group["weight_decay"] = values["weight_decay"] * group["decays"]
        return values

    # State --------------------------------------------------------------------------------------------------------

    @property
    def _encoders(self) -> dict[str, Encoder]:
        teacher = {} if self.teacher is None else {"teacher": self.teacher.encoder}
        return {"student": self.student.encoder, **teacher}

    @property
    def _parts(self) -> dict[str, Any]:
        """What has a `state_dict` besides the encoders."""
        heads = {"student_head": self.student.projection_head}
        if self.teacher is not None:
            heads["teacher_head"] = self.teacher.projection_head
        return {**heads, "objective": self.objective, "optimizer": self.optimizer, "scaler": self.scaler}

    def _save(self, step: int) -> None:
        if self.rank:
            return
        self._check_features(step)
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {"step": step, "unusable": self.unusable}
        encoder = self.student.encoder
        facts = {
            "base": self.architecture,
            "mean": encoder.mean,
            "std": encoder.std,
            "layers": None,
            "embed_dim": encoder.embed_dim,
            "stride": encoder.stride,
            "training_data": self._training_data(),
            "overlap": {**(encoder.overlap or {}), **self.overlap},
        }
        checkpoints.save(self.options.out, step, self._encoders, state, facts)

    def _check_features(self, step: int) -> None:
        """Raise NumericalError rather than save an encoder that the last update ruined."""
        encoder, size = self.student.encoder, self.recipe.local_size
        try:
            encoder.encode(torch.zeros(1, 3, size, size))
        except NumericalError as error:
            raise NumericalError(
                f"after step {step} the features are not finite, so that this state is not saved. Use a smaller "
                f"--set lr_backbone; --resume goes on from the last checkpoint."
            ) from error
        set_training(self.student)

    def _training_data(self) -> str:
        start = self.student.encoder.training_data
        before = f"{start} (the start's); " if start not in ("", "none") else ""
        return f"{before}{self.images.description} ({self.recipe.objective}, {self.steps} steps)"

    def _begin(self) -> int:
        """The step to begin with: 0, or that of the last checkpoint. Checks that the folder holds this very run."""
        out, told = self.options.out, self._told()
        folders, record = checkpoints.checkpoints(out), out / "recipe.json"
        if not folders:
            if self.rank == 0:
                write_whole(record, json.dumps({**told, "environment": environment()}, indent=2, default=str).encode())
            return 0
        if not self.options.resume:
            raise UsageError(f"--out {out} holds a run already. Give --resume to go on with it, or another folder.")
        try:
            stored = json.loads(record.read_text(encoding="utf-8"))
            then, now = ({**facts.pop("recipe"), **facts} for facts in (stored, json.loads(json.dumps(told))))
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise BadInputError(f"{record} cannot be read ({error!r}), so the run cannot be resumed.") from error
        changed = [name for name in now if now[name] != then.get(name) and name != "max_unreadable"]
        if changed:
            raise UsageError(
                f"--resume: {out} was begun with "
                + ", ".join(f"{name}={then.get(name)!r} (now {now[name]!r})" for name in changed)
                + ". Use the same settings, or another --out."
            )
        state = checkpoints.restore(folders[-1], self._encoders)
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.unusable = dict(state["unusable"])
        return int(state["step"])

    def _told(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "weights": None if self.options.weights is None else str(self.options.weights),
            "data": self.images.description,
            "images": len(self.images),
            "images_fingerprint": self.images.fingerprint(),
            "steps": self.steps,
        }

    # Steps ----------------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        first = self._begin()
        if self.world > 1:
            dist.barrier()  # every process has seen the folder before the first writes to it
        recipe, options = self.recipe, self.options
        order = Order(len(self.images), recipe, first, self.steps, self.place.start, self.place.images)
        workers = RunOptions(workers=options.workers).workers_used
        with self._signals(), contextlib.ExitStack() as stack:
            batches = iter(loader(self.images, recipe, order, workers, self.device.type == "cuda"))
            records = stack.enter_context(contextlib.closing(_Records(options, first))) if self.rank == 0 else None
            # A folder that cannot be written is an error now, not after hours; and a run that was killed while it saved
            # may have an encoder.json of an older checkpoint, or none.
            self._save(first)
            if first == self.steps or first % options.eval_every == 0:
                self._evaluate(first)
            bar = tqdm(
                total=self.steps,
                initial=first,
                desc=recipe.objective,
                unit="step",
                disable=None if options.progress and self.rank == 0 else True,
            )
            stack.enter_context(contextlib.closing(bar))
            for step in range(first, self.steps):
                start = time.perf_counter()
                settings = self._schedule(step)
                loss = self._step(step, batches, settings["momentum"])
                seconds = time.perf_counter() - start
                row = {
                    "step": step + 1,
                    "loss": loss,
                    **settings,
                    "images_per_second": recipe.batch_size / seconds,
                    "seconds": seconds,
                    "peak_memory_mb": self._peak_memory(),
                    "unusable": len(self.unusable),
                }
                if records:
                    records.write(row)
                bar.set_postfix_str(
                    f"loss {loss:.4f}, {row['images_per_second']:.1f} images/s, {row['peak_memory_mb']:.0f} MB", False
                )
                bar.update()
                done, last = step + 1, step + 1 == self.steps
                scored = bool(options.evaluate) and (last or done % options.eval_every == 0)
                stopped = self._stopped()
                if last or scored or stopped or done % options.save_every == 0:
                    self._save(done)
                if scored and not stopped:
                    self._evaluate(done)
                if stopped:
                    raise Interrupted(
                        f"interrupted after step {done} of {self.steps}; the state is in {options.out}. The same "
                        f"command with --resume goes on from there."
                    )
        return options.out

    def _step(self, step: int, batches: Iterator[Any], momentum: float) -> float:
        recipe, total = self.recipe, 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(recipe.accumulate):
            batch = next(batches)
            if isinstance(batch, BadInputError):
                raise batch
            self._count_unusable(batch)
            batch = batch.normalised(self.student.encoder, self.device)
            self.place.turn = step * recipe.accumulate + part
            between = self.world > 1 and part + 1 < recipe.accumulate
            with self.embed.no_sync() if between else contextlib.nullcontext():
                with torch.autocast(self.device.type, self.dtype, enabled=recipe.precision != "fp32"):
                    loss = self.objective(batch, self.embed, self.teacher, self.teacher or self.student, self.place)
                value = float(loss.detach())
                if not math.isfinite(value):
                    self._give_up(step, value, batch)
                self.scaler.scale(loss / recipe.accumulate).backward()
            total += value / recipe.accumulate
        if self.teacher is not None:  # before the optimizer's step, as in the official code
            average = get_ema_multi_avg_fn(momentum)
            average(list(self.teacher.parameters()), [p.detach() for p in self.student.parameters()], None)
        if recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_([p for p in self.student.parameters() if p.requires_grad], recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self._mean(total)

    def _mean(self, value: float) -> float:
        return float(mean_over_processes(torch.tensor(value, dtype=torch.float64, device=self.device)))

    def _count_unusable(self, batch: Batch) -> None:
        for name, reason in batch.unusable:
            if name not in self.unusable:
                log.warning("training image %s is left out: %s", name, reason)
            self.unusable[name] = reason
        if len(self.unusable) > self.recipe.max_unreadable * len(self.images):
            name, reason = next(iter(self.unusable.items()))
            raise BadInputError(
                f"{len(self.unusable)} of {len(self.images)} training images cannot be used, more than "
                f"max_unreadable={self.recipe.max_unreadable:g} allows; the first is {name}: {reason} Mend the data, "
                f"or allow more with --set max_unreadable=SHARE."
            )

    def _give_up(self, step: int, value: float, batch: Batch) -> None:
        """Save the batch of a step whose loss is not finite, and raise NumericalError."""
        path, content = self.options.out / f"not-finite-step-{step + 1}-rank-{self.rank}.pt", io.BytesIO()
        torch.save({**vars(batch), "step": step + 1, "loss": value}, content)
        write_whole(path, content.getvalue())
        raise NumericalError(
            f"the loss of step {step + 1} is {value}. Its images are in {path}; the last checkpoint is untouched. Use "
            f"--set precision=fp32 or a smaller --set lr_backbone."
        )

    # Besides --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after its present step; a second one ends it at once."""

        def note(number: int, frame: Any) -> None:
            self.stop = int(number)
            signal.signal(number, before[signal.Signals(number)])

        before: dict[signal.Signals, Any] = {}
        with contextlib.suppress(ValueError):  # only the main thread may
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stopped(self) -> bool:
        """Was any process told to stop?"""
        return self._mean(float(self.stop is not None)) > 0

    def _peak_memory(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return peak_memory_mb()

    def _evaluate(self, step: int) -> None:
        """Score the checkpoint just saved on each task, as anyone would who names the run folder as a model."""
        if not self.options.evaluate:
            return
        if self.rank == 0:
            import neco_bench

            scores = self.options.out / "eval.csv"
            for task in self.options.evaluate:
                if _has_scored(scores, step, task):  # before an interruption
                    continue
                result = neco_bench.run(
                    str(self.options.out),
                    task,
                    data_root=self.options.data_root,
                    out=self.options.out / "results",
                    device=str(self.device),
                    workers=self.options.workers,
                )
                low, high = result.ci95.get(result.primary_metric, (math.nan, math.nan))
                row = {"step": step, "task": f"{result.task}@{result.protocol}", "metric": result.primary_metric}
                values = {"value": result.metrics[result.primary_metric], "low": low, "high": high}
                _append(scores, row | values)
                log.warning("step %d: %s %s %.2f", step, result.task, result.primary_metric, 100 * values["value"])
        if self.world > 1:
            dist.barrier()


def _has_scored(scores: Path, step: int, task: str) -> bool:
    """Whether eval.csv has a row of this step and task."""
    if not scores.is_file():
        return False
    (chosen,) = find_tasks([task])
    with open(scores, newline="", encoding="utf-8") as file:
        known = [(row["step"], row["task"]) for row in csv.DictReader(file)]
    return (str(step), f"{chosen.card.name}@{chosen.label}") in known


class _Records:
    """log.csv, and TensorBoard's events where they were asked for."""

    def __init__(self, options: Options, first: int) -> None:
        self.path = options.out / "log.csv"
        rows = []
        if first and self.path.is_file():  # steps after the checkpoint will be done again
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= first]
        if rows:
            write_whole(self.path, _lines(rows, header=True).encode())
        else:
            self.path.unlink(missing_ok=True)
        self.events = _event_writer(options.out, first) if options.tensorboard else None

    def write(self, row: dict[str, float]) -> None:
        _append(self.path, row)
        if self.events:
            for name, value in row.items():
                self.events.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self.events:
            self.events.close()


def _event_writer(out: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingError("--tensorboard needs a package: pip install 'neco-bench[tensorboard]'.") from error
    return SummaryWriter(str(out / "tensorboard"), purge_step=first + 1)


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add a line to a CSV file, with a header to an empty one. Raises NecoBenchError where it cannot be written."""
    try:
        with open(path, "a", newline="", encoding="utf-8") as file:
            file.write(_lines([row], header=file.tell() == 0))
    except OSError as error:
        raise NecoBenchError(
            f"{path}: could not be written ({error.strerror or error}). Free disk space or make the folder writable; "
            f"--resume goes on from the last checkpoint."
        ) from error


def _lines(rows: Sequence[Mapping[str, Any]], *, header: bool) -> str:
    """Rows as lines of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
