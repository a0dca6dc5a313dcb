"""The training loop: steps, their log, and a run folder from which training can be resumed.

The folder is in the cache; its name is a digest of everything on which training depends. Like the run folders of
`neco-bench train`, it contains `checkpoint-<step>/`, `encoder.json` (so it is a model spec), `log.csv` and `lock`. On
one process, a resumed run gives the same weights, bit for bit, as a run without interruption.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from neco_bench.tasks.finetuning.segmenter import Segmenter
from neco_bench.tasks.finetuning.settings import TEST_ONLY, Settings
from neco_bench.tasks.finetuning.training import Epochs, Trainer, learning_rate, share_of_process
from neco_bench.tasks.linear_segmentation.scale_crop import ScaleCropDistort
from torch.utils.data import DataLoader

from neco_bench.core import distributed
from neco_bench.core.errors import NOTHING_LABELLED, BadInputError, NecoBenchError, NumericalError
from neco_bench.core.files import digest
from neco_bench.core.log import StepLog
from neco_bench.core.paths import cache_dir
from neco_bench.core.signals import StopSignals, leave_signals_to_the_parent, start_loading
from neco_bench.core.task import Context
from neco_bench.data.base import SegmentationDataset
from neco_bench.encoders import checkpoints
from neco_bench.encoders.base import Encoder
from neco_bench.encoders.spec import architecture
from neco_bench.encoders.trainable import set_training
from neco_bench.features.loader import ItemDataset, collate
from neco_bench.results.provenance import peak_memory_mb

SAVE_EVERY = 500  # steps


def fine_tune(
    segmenter: Segmenter, train: SegmentationDataset, size: int, settings: Settings, context: Context
) -> None:
    """Train a Segmenter in place on crops of `size` pixels, or load it if this training is already finished.

    Without `context.identity` nothing is stored.

    Raises:
        KeyboardInterrupt: after SIGINT or SIGTERM, when the state is saved.
        NumericalError: if the loss or features are not finite.
        BadInputError: if training masks contain only void, or the encoder's features have no gradient.
        UsageError: if another process runs the same training.
    """
    steps, signals = settings.steps(len(train)), StopSignals()
    folder = RunFolder(segmenter, train, size, settings, context)
    segmenter.prepare(size, context.checkpointing)
    trainer = Trainer(segmenter, settings, context, steps)
    with contextlib.ExitStack() as stack:
        first = folder.begin(trainer, steps, stack)
        stack.enter_context(signals.handled())
        batches = stack.enter_context(contextlib.closing(load_batches(train, trainer, size, first)))
        for step in context.track(range(first, steps), "train"):
            row = _timed_step(trainer, step, batches, len(train))
            if (step + 1) * settings.epochs >= steps and not trainer.labelled:
                raise BadInputError(NOTHING_LABELLED)
            stopped = trainer.total(float(signals.received is not None)) > 0
            folder.after_step(trainer, row, stopped or step + 1 == steps)
            if stopped:
                raise KeyboardInterrupt
    trained = "decoder" if segmenter.fixed else "encoder and decoder"
    context.note(steps=steps, resumed_after=first, trained=trained, run_folder=str(folder.path or ""))


def load_batches(train: SegmentationDataset, trainer: Trainer, size: int, first: int) -> Generator[Any, None, None]:
    """Yield this process's part (images, masks) of the batch of each step from `first` on; None for an empty part."""
    s, encoder, context = trainer.settings, trainer.segmenter.encoder, trainer.context
    ratio = size / s.input_size  # other sizes change in proportion
    box = s.short_side * ratio, s.long_side * ratio
    transform = ScaleCropDistort.of(s, size, s.mean or encoder.mean, box)
    epochs = Epochs(len(train), s.epochs, context.seed)
    parts = [share_of_process(epochs.batch(step, s.batch_size)) for step in range(first, trainer.steps)]
    loader = DataLoader(
        ItemDataset(train, epochs, transform, context.seed),
        batch_sampler=[list(part) for part in parts if part],
        collate_fn=collate,
        num_workers=context.workers,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=encoder.device.type == "cuda",
    )
    loaded = start_loading(loader)
    for part in parts:
        if not part:
            yield None
            continue
        batch = next(loaded)
        if isinstance(batch, NecoBenchError):
            raise batch
        _, images, masks = batch
        truth = torch.from_numpy(np.stack([train.eval_mask(mask) for mask in masks]).astype(np.int64))
        yield images.to(encoder.device, non_blocking=True), truth.to(encoder.device, non_blocking=True)


def _timed_step(trainer: Trainer, step: int, batches: Iterator[Any], images: int) -> dict[str, float]:
    """Do a step, and return its row for log.csv."""
    start, size = time.perf_counter(), trainer.settings.batch_size
    whole = Epochs(images, trainer.settings.epochs, trainer.context.seed).batch(step, size)
    with trainer.context.phase("load"):
        batch = next(batches)
    with trainer.context.phase("train"):
        place = share_of_process(whole).start - whole.start
        loss = trainer.step(step, place, len(whole), batch)
    seconds = time.perf_counter() - start
    return {
        "step": step + 1,
        "loss": loss,
        "learning_rate": learning_rate(step, trainer.steps, trainer.settings),
        "images_per_second": len(whole) / seconds,
        "seconds": seconds,
        "peak_memory_mb": peak_memory_mb(),
    }


class RunFolder:
    """The folder of a training run; path: None if nothing is stored."""

    def __init__(
        self, segmenter: Segmenter, train: SegmentationDataset, size: int, settings: Settings, context: Context
    ) -> None:
        encoder, self.size, self.fresh = segmenter.encoder, size, context.fresh
        facts = {
            "encoder": context.identity,
            "precision": encoder.precision,
            "device": encoder.device.type,
            "data": [train.name, train.split, train.fingerprint()],
            "settings": settings.model_dump(mode="json", exclude=set(TEST_ONLY)),
            "size": size,
            "seed": context.seed,
        }
        stored = context.identity is not None
        self.path: Path | None = cache_dir() / "finetuning" / digest(facts)[:16] if stored else None
        self.facts = _encoder_facts(encoder, train, settings)
        self.log: StepLog | None = None

    def begin(self, trainer: Trainer, steps: int, stack: contextlib.ExitStack) -> int:
        """Lock the folder, load its newest checkpoint, and return the next step."""
        path, state = self.path, None
        unreadable: list[Path] = []
        if path is None:
            return 0
        if distributed.rank() == 0:
            stack.enter_context(checkpoints.locked(path))
            checkpoints.clear(path)
            for old in checkpoints.checkpoints(path) if self.fresh else ():
                shutil.rmtree(old)
            if checkpoints.checkpoints(path):
                newest, state, unreadable = checkpoints.restore_newest(path, trainer.encoders, trainer.parts)
        name = distributed.gather(newest if state else None)[0]  # the others wait until the first has read it
        if name and state is None:
            state = checkpoints.restore(name, trainer.encoders, trainer.parts)
        distributed.gather(None)
        for folder in unreadable:
            checkpoints.set_aside(folder)
        first = state["step"] if state else 0
        trainer.labelled = state["labelled"] if state else 0
        if distributed.rank() == 0 and first < steps:
            self.log = stack.enter_context(contextlib.closing(StepLog(path, first, False)))
        return first

    def after_step(self, trainer: Trainer, row: dict[str, float], save: bool) -> None:
        """Log a step, and save a checkpoint if due."""
        if self.log:
            self.log.write(row)
        step = int(row["step"])
        if self.path is None or not (save or step % SAVE_EVERY == 0):
            return
        self._check_features(trainer, step)
        if distributed.rank() == 0:
            state = {name: part.state_dict() for name, part in trainer.parts.items()}
            state |= {"step": step, "unusable": {}, "labelled": trainer.labelled}
            checkpoints.save(self.path, step, trainer.encoders, state, self.facts)
        distributed.gather(None)

    def _check_features(self, trainer: Trainer, step: int) -> None:
        """Raise NumericalError if the features are not finite after the last update, so that it is not saved."""
        encoder = trainer.segmenter.encoder
        try:
            encoder.encode(torch.zeros(1, 3, self.size, self.size))
        except NumericalError as error:
            rate = trainer.settings.learning_rate / 10
            raise NumericalError(
                f"After step {step} of fine-tuning the features are not finite. Lower the rate with "
                f"--set learning_rate={rate:g}, or use --precision fp32."
            ) from error
        set_training(trainer.segmenter)


def _encoder_facts(encoder: Encoder, train: SegmentationDataset, settings: Settings) -> dict[str, Any]:
    """Return the content of `encoder.json`, which makes the folder a model spec."""
    try:
        base = architecture(encoder.name)
    except NecoBenchError:  # an object, or code that is not a spec
        base = encoder.name
    images = train.images_from or train.folder_name or train.name
    before = f"{encoder.training_data} (the start's); " if encoder.training_data not in ("", "none") else ""
    return {
        "base": base,
        "mean": settings.mean or encoder.mean,
        "std": settings.std or encoder.std,
        "layers": None if encoder.layer == "last" else getattr(encoder, "indices", None),
        "embed_dim": encoder.embed_dim,
        "stride": encoder.stride,
        "training_data": f"{before}{train.name} {train.split} with its masks (fine-tuning)",
        "overlap": {**(encoder.overlap or {}), images: "seen"},
    }
