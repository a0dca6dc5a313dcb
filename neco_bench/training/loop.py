"""The training loop: from a recipe to a run folder, which can be used as a model.

A run folder contains

    recipe.json                all values of the recipe, changes made on resuming, the base model, the data, versions
    checkpoint-<step>/         see `encoders.checkpoints`; encoder.json names the newest
    log.csv                    one line per step
    eval.csv, results/         scores on tasks, if requested
    lock                       locked by the process that trains here

On one process, a resumed run gives the same weights, bit for bit, as a run without interruption. If started by torchrun
(`torchrun --nproc-per-node 2 -m neco_bench train ...`), the batch of a step is divided among the processes, and
gradients are averaged (DistributedDataParallel); evaluation is divided too.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from neco_bench.core import distributed
from neco_bench.core.errors import NecoBenchError, UsageError
from neco_bench.core.log import StepLog, Table
from neco_bench.core.protocol import find_tasks
from neco_bench.core.signals import StopSignals, start_loading
from neco_bench.encoders import checkpoints
from neco_bench.results.provenance import peak_memory_mb
from neco_bench.training.batches import Order, loader
from neco_bench.training.images import open_images
from neco_bench.training.options import Interrupted, TrainOptions
from neco_bench.training.progress import StepProgress
from neco_bench.training.recipe import Recipe
from neco_bench.training.record import RunRecord, format_changes
from neco_bench.training.trainer import Processes, Trainer, joined_processes

log = logging.getLogger("neco_bench")


def train(recipe: Recipe, options: TrainOptions) -> Path:
    """Train by a recipe and return the run folder.

    Raises UsageError (inconsistent settings or settings beyond the limits of the machine, a folder with another run or
    in which another process trains), MissingError (images, weights), BadInputError (too many unusable images, no
    readable checkpoint), NumericalError (a loss that is not finite; its batch is saved), Interrupted (SIGINT or
    SIGTERM; the state is saved), NecoBenchError (full disk, out of memory).
    """
    with joined_processes(options.device) as processes:
        return TrainingRun(recipe, options, processes).run()


class TrainingRun:
    """A run folder and its trainer: prepare, then step, save and evaluate, until the last step."""

    def __init__(self, recipe: Recipe, options: TrainOptions, processes: Processes) -> None:
        """Check the settings before anything is written; raises the errors of `train`."""
        self.recipe, self.options, self.processes = recipe, options, processes
        self.signals = StopSignals()
        _check_options(recipe, options, processes.world)
        self.images = open_images(options.data, options.data_root)
        self.overlap = self.images.overlap(options.data_root)
        self.trainer = Trainer(recipe, options, self.images, processes)
        self.steps = self.trainer.steps
        settings = {
            "recipe": recipe.model_dump(mode="json"),
            "weights": None if options.weights is None else str(options.weights),
            "data": self.images.description,
            "images": len(self.images),
            "images_fingerprint": self.images.fingerprint(),
            "steps": self.steps,
        }
        self.record = RunRecord(options.out, settings)

    def run(self) -> Path:
        """Train, from the last checkpoint if there is one, and return the run folder."""
        with checkpoints.locked(self.options.out) if self.processes.first else contextlib.nullcontext():
            self.processes.wait()  # for the lock
            first, unreadable = self.prepare()
            self.processes.wait()  # every process has read the folder before the first writes to it
            with self.signals.handled():
                self.train_from(first, unreadable)
        return self.options.out

    def prepare(self) -> tuple[int, list[Path]]:
        """Return the first step: 0, or that of the last readable checkpoint; also return unreadable checkpoints.

        Checks that the folder belongs to the same run, except for changes given on the command line.
        """
        out, first = self.options.out, self.processes.first
        if first:
            checkpoints.clear(out)
        if not checkpoints.checkpoints(out):
            if first:
                self.record.write()
            return 0, []
        if not self.options.resume:
            raise UsageError(f"--out {out} already contains a run. Give --resume to continue it, or another folder.")
        changed = self.record.load(self.options.stated)
        step, unreadable = self._restore()
        if step > self.steps:
            raise UsageError(
                f"--resume: {out} already has {step} steps, more than the {self.steps} of these settings. Use "
                f"--set steps={step} or more."
            )
        rewrite = self.record.resume(step, changed)
        if changed and first:
            log.warning("from step %d on: %s", step, format_changes(changed, "{0} instead of {1!r}"))
        if rewrite and first:
            self.record.write()
        return step, unreadable

    def _restore(self) -> tuple[int, list[Path]]:
        """Load the newest readable checkpoint; return its step, and the unreadable checkpoints."""
        trainer, first = self.trainer, self.processes.first
        if first:
            newest = checkpoints.restore_newest(self.options.out, trainer.encoders, trainer.parts)
            folder, state, unreadable = newest
        if self.processes.world > 1:  # all processes continue from the checkpoint that the first can read
            with self.processes.sharing():
                folder, unreadable = distributed.gather((folder, unreadable) if first else None)[0]
            if not first:
                state = checkpoints.restore(folder, trainer.encoders, trainer.parts)
        trainer.unusable = state["unusable"]
        trainer.skipped_steps = state.get("skipped_steps", 0)  # older checkpoints lack it
        return state["step"], unreadable

    def train_from(self, first: int, unreadable: list[Path]) -> None:
        """Do the steps from number `first` on. unreadable: checkpoints to set aside."""
        recipe, options, trainer = self.recipe, self.options, self.trainer
        shard, on_gpu = trainer.shard, self.processes.device.type == "cuda"
        order = Order(len(self.images), recipe, first, self.steps, shard.start, shard.images)
        with contextlib.ExitStack() as stack:
            # Closed with the run, because the error that ended it may still refer to them: Python waits for loaders.
            loading = start_loading(loader(self.images, recipe, order, trainer.workers, on_gpu))
            batches = stack.enter_context(contextlib.closing(batch for batch in loading))
            del loading
            step_log = None
            if self.processes.first:
                step_log = stack.enter_context(contextlib.closing(StepLog(options.out, first, options.tensorboard)))
                Table(options.out / "eval.csv").begin(first)
            # Writing here detects a folder that is not writable before hours of training. A run that was killed while
            # saving may have an encoder.json of an older checkpoint, or none.
            self.save(first)
            for folder in unreadable if self.processes.first else ():
                checkpoints.set_aside(folder)
            if self._stop_requested():
                raise self._interrupted(first)
            if first == self.steps or first % options.eval_every == 0:
                self.evaluate(first)
            shown = None
            if options.progress and self.processes.first:
                shown = stack.enter_context(contextlib.closing(StepProgress(recipe.objective, first, self.steps)))
            for step in range(first, self.steps):
                row = self._timed_step(step, batches)
                if step_log:
                    step_log.write(row)
                if shown:
                    shown.update(row)
                self._after_step(step + 1)

    def _timed_step(self, step: int, batches: Iterator[Any]) -> dict[str, float]:
        """Do a step, and return its row of log.csv."""
        start = time.perf_counter()
        settings = self.trainer.schedule(step)
        with _memory_errors(step + 1):
            loss = self.trainer.step(step, batches, settings["momentum"])
        seconds = time.perf_counter() - start
        return {
            "step": step + 1,
            "loss": loss,
            **vars(self.trainer.facts),
            "skipped_steps": self.trainer.skipped_steps,
            **settings,
            "images_per_second": self.recipe.batch_size / seconds,
            "seconds": seconds,
            "peak_memory_mb": _peak_memory_mb(self.processes.device),
            "unusable": len(self.trainer.unusable),
            **_energy(self.processes.device, seconds),
        }

    def _after_step(self, done: int) -> None:
        """Save and evaluate when due. Raises Interrupted after a signal, when the state is saved."""
        options, last = self.options, done == self.steps
        scored = bool(options.evaluate) and (last or done % options.eval_every == 0)
        stopped = self._stop_requested()
        kept = options.keep_every is not None and done % options.keep_every == 0
        if last or scored or stopped or kept or done % options.save_every == 0:
            self.save(done)
        if stopped:
            raise self._interrupted(done)
        if scored:
            self.evaluate(done)

    def save(self, step: int) -> None:
        """Save a checkpoint; the other processes wait for the first."""
        if self.processes.first:
            self._write_checkpoint(step)
        self.processes.wait()

    def _write_checkpoint(self, step: int) -> None:
        trainer, encoder = self.trainer, self.trainer.student.encoder
        if not self.record.path.exists():  # without it, checkpoints cannot be resumed
            raise NecoBenchError(f"{self.record.path} was deleted during this run. Train again, with another --out.")
        trainer.check_features(step)
        state = {name: part.state_dict() for name, part in trainer.parts.items()}
        state |= {"step": step, "unusable": trainer.unusable, "skipped_steps": trainer.skipped_steps}
        before = f"{encoder.training_data} (the start's); " if encoder.training_data not in ("", "none") else ""
        settings = f"{self.recipe.objective}, {self.steps} steps{self.record.changes_before(step)}"
        facts = {
            "base": trainer.architecture,
            "mean": encoder.mean,
            "std": encoder.std,
            "layers": None,
            "embed_dim": encoder.embed_dim,
            "stride": encoder.stride,
            "training_data": f"{before}{self.images.description} ({settings})",
            "overlap": {**(encoder.overlap or {}), **self.overlap},
        }
        checkpoints.save(self.options.out, step, trainer.encoders, state, facts, self.options.keep_every)

    def evaluate(self, step: int) -> None:
        """Score the last saved checkpoint on each task, with the run folder as the model.

        Each task is divided among the processes. A signal ends it at once: --resume scores what is not in eval.csv.
        """
        if not self.options.evaluate:
            return
        self.signals.at_once = True
        try:
            if self.signals.received is not None:
                raise KeyboardInterrupt
            with self.processes.sharing():
                self._score(step)
        except (Exception, KeyboardInterrupt):  # if another process was interrupted first, the exchange fails
            if self.signals.received is None:
                raise
            raise self._interrupted(step) from None
        finally:
            self.signals.at_once = False

    def _score(self, step: int) -> None:
        import neco_bench  # the public API, above this package

        scores = Table(self.options.out / "eval.csv")
        unscored = _unscored_tasks(scores, step, self.options) if self.processes.first else None
        for task in distributed.gather(unscored)[0]:
            result = neco_bench.run(
                str(self.options.out),
                task,
                data_root=self.options.data_root,
                out=self.options.out / "results",
                device=str(self.processes.device),
                workers=self.options.workers,
                overwrite=self.processes.world > 1,  # otherwise only one process would find a stored result
            )
            if self.processes.first:
                low, high = result.ci95.get(result.primary_metric, (math.nan, math.nan))
                row = {"step": step, "task": f"{result.task}@{result.protocol}", "metric": result.primary_metric}
                values = {"value": result.metrics[result.primary_metric], "low": low, "high": high}
                scores.append(row | values)
                log.warning("step %d: %s %s %.2f", step, result.task, result.primary_metric, 100 * values["value"])

    def _stop_requested(self) -> bool:
        """Return whether any of the processes has received a signal."""
        return self.processes.mean(float(self.signals.received is not None)) > 0

    def _interrupted(self, step: int) -> Interrupted:
        return Interrupted(
            f"interrupted after step {step} of {self.steps}; the state is in {self.options.out}. The same command with "
            f"--resume continues from there."
        )


def _check_options(recipe: Recipe, options: TrainOptions, world: int) -> None:
    if recipe.batch_size % (world * recipe.accumulate):
        raise UsageError(
            f"batch_size={recipe.batch_size} cannot be divided among {world} processes in {recipe.accumulate} parts. "
            f"Use a multiple of {world * recipe.accumulate}."
        )
    for task in options.evaluate:  # detect tasks that cannot be scored before training
        if len(find_tasks([task], data_root=options.data_root)) > 1:
            raise UsageError(f"--eval {task!r} matches several tasks. Give --eval once for each.")
    if options.evaluate and "?" in str(options.out):
        raise UsageError(f"--out {options.out}: '?' starts the options of a model spec, so --eval cannot use it.")


def _unscored_tasks(scores: Table, step: int, options: TrainOptions) -> list[str]:
    """Return the tasks without a row for this step in eval.csv (some may be scored before an interruption)."""
    rows = scores.rows()
    scored = {*rows["task"][rows["step"] == step]} if len(rows) else set()
    cards = {task: find_tasks([task], data_root=options.data_root)[0] for task in options.evaluate}
    return [task for task, entry in cards.items() if f"{entry.card.name}@{entry.label}" not in scored]


def _energy(device: torch.device, seconds: float) -> dict[str, float]:
    """Return the joules of a step from the power that the GPU reports after it; empty if it reports none."""
    if device.type != "cuda":
        return {}
    try:
        return {"joules": torch.cuda.power_draw(device) / 1000 * seconds}
    except Exception:  # without NVML's Python package, or on a GPU without that sensor
        return {}


def _peak_memory_mb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_memory_mb()


@contextlib.contextmanager
def _memory_errors(step: int) -> Iterator[None]:
    """Raise NecoBenchError if a step runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory|enough memory", str(error)):
            raise
        raise NecoBenchError(
            f"step {step} needs more memory than available ({str(error).splitlines()[0] if str(error) else 'host'}). "
            f"Use --resume with --checkpointing, --precision bf16 or a larger --set accumulate (parts of a batch)."
        ) from error
