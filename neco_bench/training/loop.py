"""The training loop: from a recipe to a run folder that `neco-bench run --model` takes.

A run folder holds

    recipe.json                the recipe with every value, what was changed on resuming, the base, the data, versions
    checkpoint-<step>/         see `checkpoints`; encoder.json says which is the newest
    log.csv                    one line per step
    eval.csv, results/         scores on task cards, where they were asked for
    lock                       held by the process that trains here

On one process a resumed run gives the same weights, bit for bit, as one that was never interrupted. Started by torchrun
(`torchrun --nproc-per-node 2 -m neco_bench train ...`) a step's batch is shared by the processes, and gradients are
averaged (DistributedDataParallel); evaluation is shared too.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from neco_bench.core import distributed
from neco_bench.core.distributed import RankShard
from neco_bench.core.errors import BadInputError, NecoBenchError, NumericalError, UsageError
from neco_bench.core.files import write_whole
from neco_bench.core.protocol import find_tasks
from neco_bench.core.reduce import mean_over_processes
from neco_bench.encoders.base import Encoder
from neco_bench.encoders.load import load_encoder, resolve_device
from neco_bench.encoders.options import PRECISIONS
from neco_bench.encoders.spec import architecture
from neco_bench.results.provenance import environment, peak_memory_mb
from neco_bench.runner.options import RunOptions as RunOptions
from neco_bench.training import checkpoints, limits
from neco_bench.training.batches import Order, TrainBatch, loader
from neco_bench.training.images import Images, open_images
from neco_bench.training.log import StepLog, Table
from neco_bench.training.networks import (
    Network,
    StochasticDepth,
    make_trainable,
    parameter_groups,
    seeded,
    set_training,
)
from neco_bench.training.objectives import OBJECTIVES
from neco_bench.training.options import Interrupted, TrainOptions
from neco_bench.training.recipe import CHANGEABLE, Recipe

log = logging.getLogger("neco_bench")


def cosine(first: float, last: float, step: int, steps: int) -> float:
    """Half a cosine from `first` at step 0 to `last` at `steps`."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


def train(recipe: Recipe, options: TrainOptions) -> Path:
    """Train by a recipe and return the run folder.

    Raises UsageError (settings that do not fit each other or what there is, a folder that holds another run or in which
    another process trains), MissingError (images, weights), BadInputError (too many unusable images, no checkpoint that
    can be read), NumericalError (a loss that is not finite; its batch is saved), Interrupted (SIGINT or SIGTERM, state
    saved), NecoBenchError (a full disk, no more memory).
    """
    with _processes(options) as (rank, world, device):
        return _Run(recipe, options, rank, world, device).run()


@contextlib.contextmanager
def _processes(options: TrainOptions) -> Iterator[tuple[int, int, torch.device]]:
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
    def __init__(self, recipe: Recipe, options: TrainOptions, rank: int, world: int, device: torch.device) -> None:
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
        if recipe.accumulate > 1 and recipe.objective == "neco" and rank == 0:
            log.warning(
                "accumulate=%d: each part of %d images is a batch of its own, from which NeCo takes its references; "
                "this is not training on %d images at once.",
                recipe.accumulate,
                recipe.batch_size // recipe.accumulate,
                recipe.batch_size,
            )
        encoder = load_encoder(recipe.base, weights=options.weights, device=str(device))
        self.architecture = architecture(recipe.base)
        self._check_sizes(encoder)
        count = recipe.batch_size // world // recipe.accumulate
        self.place = RankShard(recipe.seed, count, rank * count, world * count)
        self.workers = RunOptions(workers=options.workers).workers_used
        limits.check(recipe, encoder, self.place, self.steps, self.workers)
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
            self.patient: Any = dist.new_group(timeout=distributed.NO_LIMIT)  # to wait for what one process does alone
        self.unusable: dict[str, str] = {}
        self.changes: list[dict[str, Any]] = []  # of settings, on the way: {"step", "from", "to"}
        self.stop: int | None = None
        self.evaluating = False

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
            summands = group.get("summands", 1)  # older checkpoints lack it
            group["lr"] = values[f"lr_{group['part']}"] * summands
            group["weight_decay"] = values["weight_decay"] * group["decays"] / summands
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

    def _wait(self) -> None:
        """Wait for the other processes, for as long as it takes."""
        if self.world > 1:
            dist.barrier(self.patient)

    def _save(self, step: int) -> None:
        """Save a checkpoint; the other processes wait for the first."""
        if self.rank == 0:
            self._save_alone(step)
        self._wait()

    def _save_alone(self, step: int) -> None:
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
            "training_data": self._training_data(step),
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
                f"after step {step} the features are not finite, so that this state is not saved. Go on from the last "
                f"checkpoint with --resume and a smaller --set lr_backbone."
            ) from error
        set_training(self.student)

    def _training_data(self, step: int) -> str:
        """What the weights of a step have seen, for people."""
        start = self.student.encoder.training_data
        before = f"{start} (the start's); " if start not in ("", "none") else ""
        changes = "".join(
            f", from step {change['step']} on {name}={value}"
            for change in self.changes
            if change["step"] < step
            for name, value in change["to"].items()
        )
        return f"{before}{self.images.description} ({self.recipe.objective}, {self.steps} steps{changes})"

    def _begin(self) -> tuple[int, list[Path]]:
        """The step to begin with: 0, or that of the last checkpoint that can be read, and those that cannot.

        Checks that the folder holds this very run, but for changes that are stated.
        """
        out = self.options.out
        if self.rank == 0:
            checkpoints.clear(out)
        if not checkpoints.checkpoints(out):
            if self.rank == 0:
                self._record()
            return 0, []
        if not self.options.resume:
            raise UsageError(f"--out {out} holds a run already. Give --resume to go on with it, or another folder.")
        stored, before = self._stored()
        changed = self._changed(before)
        if self.rank == 0:
            folder, state, unreadable = checkpoints.restore_newest(out, self._encoders, self._parts)
        if self.world > 1:  # all go on from the one that the first can read
            with distributed.sharing(self.patient):
                folder, unreadable = distributed.gather((folder, unreadable) if self.rank == 0 else None)[0]
            if self.rank:
                state = checkpoints.restore(folder, self._encoders, self._parts)
        self.unusable, step = state["unusable"], state["step"]
        if step > self.steps:
            raise UsageError(
                f"--resume: {out} has done {step} steps already, more than the {self.steps} of these settings. Use "
                f"--set steps={step} or more."
            )
        # What was changed after this checkpoint was written holds from it on.
        self.changes = [{**change, "step": min(change["step"], step)} for change in stored]
        if changed:
            kinds = {kind: {name: pair[i] for name, pair in changed.items()} for i, kind in enumerate(("from", "to"))}
            self.changes.append({"step": step, **kinds})
            if self.rank == 0:
                log.warning("from step %d on: %s", step, _pairs(changed, "{0} instead of {1!r}"))
        if self.rank == 0 and self.changes != stored:
            self._record()
        return step, unreadable

    def _record(self) -> None:
        """Write recipe.json."""
        content = {**self._told(), "changes": self.changes, "environment": environment()}
        write_whole(self.options.out / "recipe.json", json.dumps(content, indent=2, default=str).encode())

    def _stored(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The changes so far and the settings of the run in the folder. Raises BadInputError where there are none."""
        record = self.options.out / "recipe.json"
        try:
            stored = json.loads(record.read_text(encoding="utf-8"))
            changes = [{name: dict(c[name]) if name != "step" else int(c[name]) for name in ("step", "from", "to")}
                       for c in stored.pop("changes", [])]  # fmt: skip
            return changes, {**stored.pop("recipe"), **stored}
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise BadInputError(f"{record} cannot be read ({error!r}), so the run cannot be resumed.") from error

    def _changed(self, before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """{name: (before, now)} of settings that differ. Raises UsageError for those that may not or are not stated."""
        told = json.loads(json.dumps(self._told()))
        now = {**told.pop("recipe"), **told}
        changed = {name: (before.get(name), now[name]) for name in now if now[name] != before.get(name)}
        changed.pop("max_unreadable", None)
        stated = {*self.options.stated} & {*CHANGEABLE}
        if stated & {"epochs", "steps"}:
            stated |= {"epochs", "steps"}
        refused = {name: pair for name, pair in changed.items() if name not in stated}
        if refused:
            free = [name for name in refused if name in CHANGEABLE]
            hint = f" To change {', '.join(free)} from here on, say so with --set." if free else ""
            raise UsageError(
                f"--resume: {self.options.out} was begun with {_pairs(refused, '{1!r} (now {0!r})')}. Use the same "
                f"settings, or another --out.{hint}"
            )
        return changed

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
        with checkpoints.locked(self.options.out) if self.rank == 0 else contextlib.nullcontext():
            return self._run()

    def _run(self) -> Path:
        self._wait()  # for the lock
        first, unreadable = self._begin()
        self._wait()  # every process has seen the folder before the first writes to it
        recipe, options = self.recipe, self.options
        order = Order(len(self.images), recipe, first, self.steps, self.place.start, self.place.images)
        with self._signals(), contextlib.ExitStack() as stack:
            batches = iter(loader(self.images, recipe, order, self.workers, self.device.type == "cuda"))
            records = None
            if self.rank == 0:
                records = stack.enter_context(contextlib.closing(StepLog(options.out, first, options.tensorboard)))
                Table(options.out / "eval.csv").begin(first)
            # A folder that cannot be written is an error now, not after hours; and a run that was killed while it saved
            # may have an encoder.json of an older checkpoint, or none.
            self._save(first)
            for folder in unreadable if self.rank == 0 else ():
                checkpoints.set_aside(folder)
            if self._stopped():
                raise self._interrupted(first)
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
                with _memory_errors(step + 1):
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
                    raise self._interrupted(done)
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
                autocast = torch.autocast(self.device.type, self.dtype, enabled=recipe.precision != "fp32")
                with autocast, seeded(self.place, self.device):
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

    def _count_unusable(self, batch: TrainBatch) -> None:
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

    def _give_up(self, step: int, value: float, batch: TrainBatch) -> None:
        """Save the batch of a step whose loss is not finite, and raise NumericalError."""
        path, content = self.options.out / f"not-finite-step-{step + 1}-rank-{self.rank}.pt", io.BytesIO()
        torch.save({**vars(batch), "step": step + 1, "loss": value}, content)
        write_whole(path, content.getvalue())
        raise NumericalError(
            f"the loss of step {step + 1} is {value}. Its images are in {path}; the last checkpoint is untouched. Go "
            f"on from it with --resume and --set precision=fp32 or a smaller --set lr_backbone."
        )

    # Besides --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after its present step, or at once what scores a state that is saved.

        A second Ctrl-C ends it at once, anywhere. torchrun passes each signal on to workers that the terminal or the
        cluster has signalled already: there a Ctrl-C counts when it comes twice.
        """
        most = 2 if "TORCHELASTIC_RUN_ID" in os.environ else 1
        interrupts = 0

        def note(number: int, frame: Any) -> None:
            nonlocal interrupts
            interrupts += number == signal.SIGINT
            again, self.stop = self.stop is not None, int(number)
            if interrupts > most or (self.evaluating and not again):
                raise KeyboardInterrupt

        before: dict[signal.Signals, Any] = {}
        with contextlib.suppress(ValueError):  # only the main thread may
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupted(self, step: int) -> Interrupted:
        return Interrupted(
            f"interrupted after step {step} of {self.steps}; the state is in {self.options.out}. The same command with "
            f"--resume goes on from there."
        )

    def _stopped(self) -> bool:
        """Was any process told to stop?"""
        return self._mean(float(self.stop is not None)) > 0

    def _peak_memory(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return peak_memory_mb()

    def _evaluate(self, step: int) -> None:
        """Score the checkpoint just saved on each task, as anyone would who names the run folder as a model.

        The processes share each task out. A signal ends it at once: --resume scores again what is not in eval.csv.
        """
        if not self.options.evaluate:
            return
        self.evaluating = True
        try:
            if self.stop is not None:
                raise KeyboardInterrupt
            with distributed.sharing(self.patient) if self.world > 1 else contextlib.nullcontext():
                self._score(step)
        except (Exception, KeyboardInterrupt):  # another process that was interrupted first breaks the exchange
            if self.stop is None:
                raise
            raise self._interrupted(step) from None
        finally:
            self.evaluating = False

    def _score(self, step: int) -> None:
        import neco_bench

        scores = Table(self.options.out / "eval.csv")
        open_tasks = _not_scored(scores, step, self.options.evaluate) if self.rank == 0 else None
        for task in distributed.gather(open_tasks)[0]:
            result = neco_bench.run(
                str(self.options.out),
                task,
                data_root=self.options.data_root,
                out=self.options.out / "results",
                device=str(self.device),
                workers=self.options.workers,
                overwrite=self.world > 1,  # what one process had and another not would not be computed together
            )
            if self.rank == 0:
                low, high = result.ci95.get(result.primary_metric, (math.nan, math.nan))
                row = {"step": step, "task": f"{result.task}@{result.protocol}", "metric": result.primary_metric}
                values = {"value": result.metrics[result.primary_metric], "low": low, "high": high}
                scores.append(row | values)
                log.warning("step %d: %s %s %.2f", step, result.task, result.primary_metric, 100 * values["value"])


def _not_scored(scores: Table, step: int, tasks: tuple[str, ...]) -> list[str]:
    """The tasks of which eval.csv has no row of this step: all but those scored before an interruption."""
    known = {row["task"] for row in scores.rows() if int(row["step"]) == step}
    cards = {task: find_tasks([task])[0] for task in tasks}
    return [task for task, chosen in cards.items() if f"{chosen.card.name}@{chosen.label}" not in known]


@contextlib.contextmanager
def _memory_errors(step: int) -> Iterator[None]:
    """Raise NecoBenchError where a step has not enough memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory|enough memory", str(error)):
            raise
        raise NecoBenchError(
            f"step {step} needs more memory than there is ({str(error).splitlines()[0] if str(error) else 'host'}). Go "
            f"on with --resume and --checkpointing, --precision bf16 or a larger --set accumulate (parts of a batch)."
        ) from error


def _pairs(changed: dict[str, tuple[Any, Any]], form: str) -> str:
    """Settings with their values now, {0}, and before, {1}."""
    return ", ".join(f"{name}={form.format(now, before)}" for name, (before, now) in changed.items())
