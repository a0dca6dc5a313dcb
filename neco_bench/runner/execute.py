"""Run one encoder on one task and store the Result. Used by the command line and the Python API.

The content key of a result covers everything that the number depends on. It is computed without loading torch or the
weights, so that a second run returns the stored result at once; only user code that may read other files is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from neco_bench.core import distributed
from neco_bench.core.errors import BadInputError, NecoBenchError, NumericalError, UsageError, user_error
from neco_bench.core.files import digest
from neco_bench.core.progress import Progress
from neco_bench.core.protocol import FAMILIES, Task
from neco_bench.core.registry import BUILTIN
from neco_bench.core.task import Context, Outcome, RunRecord
from neco_bench.data.base import BoxDataset, PairDataset, SegmentationDataset
from neco_bench.data.folder import fingerprint_and_times
from neco_bench.data.video import VideoDataset
from neco_bench.data.views import ViewDataset
from neco_bench.encoders.identity import loaded_id
from neco_bench.encoders.load import load_encoder
from neco_bench.encoders.spec import parse_spec
from neco_bench.encoders.zoo import contamination, declared_overlap, zoo
from neco_bench.results.provenance import environment, peak_memory_mb
from neco_bench.results.schema import Result
from neco_bench.results.statistics import item_ids, with_intervals
from neco_bench.results.store import ResultStore
from neco_bench.runner.capacity import check_fits
from neco_bench.runner.job import Job, stored

if TYPE_CHECKING:
    import numpy as np

    from neco_bench.encoders.base import Encoder


log = logging.getLogger("neco_bench")


def execute(job: Job, encoder: Encoder | None) -> tuple[Result, dict[str, np.ndarray] | None]:
    """Run a job, and return its Result and per-image statistics.

    Every error becomes a Result with status "failed". Only interruptions are raised and, if several processes run,
    all errors, so that all processes end.
    """
    record, provenance, start = RunRecord(), _planned_facts(job), time.perf_counter()

    def measured() -> dict[str, Any]:
        phases = {name: round(seconds, 4) for name, seconds in record.timing.items()}
        timing = {**phases, "total": round(time.perf_counter() - start, 4)}
        return {"provenance": provenance, "timing": timing, "peak_memory_mb": peak_memory_mb()}

    context = _context(job, record)
    try:
        with context.progress or contextlib.nullcontext():
            ready, loaded, context = _ready(job, encoder, context)
            fields, outcome = _executed(ready, loaded, context, provenance)
        statistics = outcome.statistics | _image_ids(ready, outcome)
        statistics |= _groups(ready, statistics)
        return with_intervals(Result.ok(fields, outcome, **measured()), statistics), statistics
    except (Exception, SystemExit) as caught:
        if distributed.world() > 1:  # the other processes wait for this one, so all must end
            raise
        error = user_error(caught)
        if error is None:
            log.error("%s on %s: this is a bug.", job.label, job.task.card.name, exc_info=caught)
            provenance["traceback"] = traceback.format_exception(caught)
            error = NecoBenchError(f"{type(caught).__name__}: {caught}. This is a bug: report it with the traceback.")
        return Result.failed(job.result_fields, error, **measured()), None


def _planned_facts(job: Job) -> dict[str, Any]:
    """Return the provenance that is known before a job runs."""
    task = job.task
    return {
        **environment(),
        "arguments": {name: str(value) for name, value in vars(job.options).items() if value is not None},
        "card_hash": task.card.hash(task.protocol.id),
        "protocol_hash": task.hash,
        "settings": task.constants,
        "citation": task.citation,
        "dataset": {
            role: {"name": d.name, "split": d.split, "items": len(d)}
            | ({} if d.sampling_unit == "image" else {"sampling_unit": d.sampling_unit})
            for role, d in job.data.items()
        },
        "dataset_fingerprint": dict(job.facts["data"]),
    }


def _groups(job: Job, statistics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the drive, sequence or scene of each item, if items belong to one."""
    import numpy as np

    dataset, ids = job.data.get("val", job.data.get("test")), item_ids(statistics)
    if dataset is None or ids is None or "group" in statistics or "pair_id" in statistics:
        return {}
    names = [dataset.group_of(item) for item in ids]
    return {"group": np.array(names)} if names and None not in names else {}


def failed_result(job: Job, error: NecoBenchError) -> Result:
    """Return the Result of a job that failed before it ran, or whose process ended without a result."""
    return Result.failed(
        job.result_fields, error, provenance=_planned_facts(job), timing={}, peak_memory_mb=peak_memory_mb()
    )


def _executed(
    job: Job, encoder: Encoder, context: Context, provenance: dict[str, Any]
) -> tuple[dict[str, Any], Outcome]:
    """Run a job, and return its outcome and the fields of the result known before the run; fills `provenance`."""
    provenance |= encoder_facts(encoder) | {"training": _training(job, encoder)}
    if provenance["official"] is False:
        _warn_once(_unofficial(encoder.name))
    check_encoder(job.task, encoder)
    fitting = check_fits(job.task, job.draws, encoder, context.batch_size)
    context = replace(context, batch_size=fitting)
    for role, dataset in job.data.items():
        if dataset.fingerprint() != job.facts["data"][role]:
            raise BadInputError(f"Files of {dataset.name!r}, split {dataset.split!r}, changed during the run.")
    _check_masks(job)
    outcome = _outcome(job, encoder, context)
    undefined = [name for name, value in outcome.metrics.items() if not math.isfinite(value)]
    if undefined:
        raise NumericalError(
            f"{', '.join(undefined)} is not a number: no scored pixel or point has ground truth. Check the masks or "
            f"targets: neco-bench data check {' '.join(sorted({dataset.name for dataset in job.data.values()}))}"
        )
    used = outcome.features.get("used_size")
    fields = job.result_fields
    only = encoder.only_size
    if only and used in (only, f"{only}x{only}") and only != job.task.settings().input_size_for(encoder.stride):
        fields["model"] += f"[input={only}]"  # another condition than the card's, so another row
    requested = {"input_size": job.task.settings().input_size} if "input_size" in outcome.features else {}
    provenance["features"] = {
        **outcome.features,
        **requested,
        "only_size": encoder.only_size,
        "size_multiple": encoder.size_multiple or encoder.stride,
        "tokens": outcome.features.get("tokens") or ((used // encoder.stride) ** 2 if isinstance(used, int) else None),
        "layer": encoder.layer,
        "pos_interp": encoder.pos_interp,
        "dtype": "float16" if job.options.features == "fp16" else "float32",
    }
    provenance |= {
        "device": device_name(encoder),
        "batch_size_used": context.batch_size_used,
        "workers": context.workers,
        "features_reused": context.run.reused,
        "processes": distributed.world(),
        "run": context.run.notes,
    }
    return fields, outcome


def _context(job: Job, record: RunRecord, recorded_ids: frozenset[str] = frozenset()) -> Context:
    options = job.options
    progress = Progress(job.title) if options.progress else None
    return Context(
        options.seed,
        options.batch_size,
        options.workers_used,
        progress,
        recorded_ids=recorded_ids,
        run=record,
        layers_ahead=job.layers_ahead,
    )


def _ready(job: Job, encoder: Encoder | None, context: Context) -> tuple[Job, Encoder, Context]:
    """Return a job with the content id of its encoder, the encoder (loaded unless given), and the context to run in."""
    options = job.options
    with context.phase("load_encoder"):
        loaded = encoder or load_job_encoder(job)
    source = loaded.weights_report.source if loaded.weights_report else "the given object"
    log.info("%s: weights of %s (%s), on %s", job.title, source, loaded.weights_id[:8], device_name(loaded))
    log.info("%s: %s", job.title, ", ".join(f"{role} {d.split} ({len(d)} items)" for role, d in job.data.items()))
    if encoder is None:
        job = job.identified(loaded_id(job.model, options.weights, loaded))
    identity = digest([job.identity, job.facts["versions"]])
    context = replace(context, identity=identity, fresh=options.overwrite, checkpointing=options.checkpointing)
    if options.workers is None and loaded.device.type == "cpu":
        context = replace(context, workers=0)  # threads load: processes would slow down an encoder on the same cores
    if options.features == "fp16" or (options.features != "off" and encoder is None):
        from neco_bench.features.store import FeatureStore

        rebuild = False
        if encoder is None:
            rebuild = options.overwrite and parse_spec(job.model).kind == "file"  # which may import more
        context = replace(context, store=FeatureStore(options.features, None if encoder else identity, rebuild))
    return job, loaded, context


def record_predictions(job: Job, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Run a job again, and return what `show` draws for some items (`Context.record`); of several draws, the first.

    Pairs and clips are independent of each other. Images need their whole split: clusters and heads depend on it.
    """
    independent = PairDataset, BoxDataset, VideoDataset, ViewDataset
    recorded = frozenset(ids)
    job, encoder, context = _ready(job, None, _context(job, RunRecord(), recorded))
    data = {role: d.subset(recorded) if isinstance(d, independent) else d for role, d in job.draws[0].items()}
    job.task.module.run(encoder, data, settings_for(job.task, encoder), context)
    return context.run.predictions


def run_job(job: Job, store: ResultStore | None, encoder: Encoder | None = None) -> Result:
    """Return the stored result of a job, or run it and store the result. encoder: None loads the job's encoder."""
    try:
        if store and (known := stored(job, store)):
            _warn_if_older(known, job, store)
            return known
    except NecoBenchError as error:  # a file of the model is gone
        if distributed.world() > 1:
            raise
        return failed_result(job, error)
    result, statistics = execute(job, encoder)
    return result if store is None else store_result(job, store, result, statistics)


def _warn_if_older(result: Result, job: Job, store: ResultStore) -> None:
    """Warn if files of the data were changed after the result was stored; with equal sizes, the result has its key."""
    path = store.path(result)
    stored_at = path.stat().st_mtime_ns if path.exists() else math.inf
    read = [data for data in job.data.values() if data.needs_root]  # the others are generated
    newer = [data for data in read if max(fingerprint_and_times(data)[1], default=0) > stored_at]
    if newer:
        log.warning(
            f"Files of {newer[0].name} ({', '.join(data.split for data in newer)}) are newer than the stored result of "
            f"{job.title}. If their content has changed, run again with --overwrite."
        )


def store_result(
    job: Job, store: ResultStore, result: Result, statistics: dict[str, np.ndarray] | None = None
) -> Result:
    """Store the result of a job; if that fails, return it as a failed result that still contains its numbers."""
    mistyped = result.error_code == UsageError.exit_code  # not stored, because it is not a missing table entry
    try:
        # With --overwrite, a failed result must not replace an older successful one.
        lost = result.status == "failed" and store.find(result.key) is not None
        if not (mistyped or lost or distributed.rank()):
            store.save(result, statistics)
    except Exception as caught:
        error = user_error(caught)
        if error is None:
            raise
        return result.model_copy(update={"status": "failed", "error": str(error), "error_code": error.exit_code})
    return result


def load_job_encoder(job: Job) -> Encoder:
    """Load the encoder of a job. Raises the errors of `load_encoder`."""
    options = job.options
    return load_encoder(
        job.model,
        weights=options.weights,
        device=options.device,
        precision=options.precision,
        layers=options.layers,
    )


def _check_masks(job: Job) -> None:
    """Raise BadInputError if a few masks or maps of a split show that they do not belong to the data set."""
    for dataset in job.data.values():
        if problems := dataset.sample_sanity_check():
            raise BadInputError(f"Data set {dataset.name!r}, split {dataset.split!r}: {problems[0]}")


def _outcome(job: Job, encoder: Encoder, context: Context) -> Outcome:
    """Run the family, and return its outcome. An error in a plug-in's family is attributed to the plug-in."""
    task = job.task
    settings = settings_for(task, encoder)
    outcomes, notes = [], []
    try:
        for data in job.draws:
            context.run.notes = {}
            outcomes.append(task.module.run(encoder, data, settings, context))
            notes.append(context.run.notes)
    except NecoBenchError:
        raise
    except Exception as error:
        origin = FAMILIES.entry(task.card.family).origin
        if origin == BUILTIN:
            raise
        raise BadInputError(
            f"Task {task.card.name!r} of {origin} failed: {type(error).__name__}: {error}. Report it to that package."
        ) from error
    if len(outcomes) == 1:
        return outcomes[0]
    context.run.notes = {"draws": notes}
    return _mean_of_draws(outcomes)


def _mean_of_draws(outcomes: list[Outcome]) -> Outcome:
    """Return the mean over the draws of a fraction, with the standard deviation of each metric as `<metric>_std`.

    Statistics are stacked along a first axis of draws; their spread is included in the interval.
    """
    import numpy as np

    values = {name: np.array([outcome.metrics[name] for outcome in outcomes]) for name in outcomes[0].metrics}
    stacked = {name: np.stack([o.statistics[name] for o in outcomes]) for name in outcomes[0].statistics}
    per_class: dict[str, dict[str, float | None]] = {}
    for metric, rows in outcomes[0].per_class.items():
        columns = {name: [outcome.per_class[metric][name] for outcome in outcomes] for name in rows}
        known = {name: [value for value in column if value is not None] for name, column in columns.items()}
        per_class[metric] = {name: float(np.mean(column)) if column else None for name, column in known.items()}
    return Outcome(
        metrics={
            **{name: float(column.mean()) for name, column in values.items()},
            **{f"{name}_std": float(column.std(ddof=1)) for name, column in values.items()},
        },
        per_class=per_class,
        ci95={},
        n_images=outcomes[0].n_images,
        statistics=stacked,
        features=outcomes[0].features,
    )


def _image_ids(job: Job, outcome: Outcome) -> dict[str, np.ndarray]:
    """Return the image ids of the rows of the statistics."""
    import numpy as np

    val = job.data.get("val")
    if "confusion" not in outcome.statistics or not isinstance(val, SegmentationDataset):
        return {}
    return {"image_id": np.array(val.ids[: outcome.n_images])}


def _training(job: Job, encoder: Encoder) -> dict[str, str]:
    """Return the training data of the encoder, and its overlap with the images of the data set."""
    overlap = declared_overlap(encoder.training_data) if encoder.overlap is None else encoder.overlap
    source = next(iter(job.data.values()))
    names = filter(None, (source.images_from, source.folder_name, source.name))
    return {"data": encoder.training_data, "contamination": contamination(overlap, names)}


@functools.cache
def _warn_once(text: str) -> None:
    log.warning(text)


def _unofficial(name: str) -> str:
    """Return why the results of a zoo model are not compared with published numbers."""
    entry = zoo().get(name.partition("?")[0])
    if entry and entry.has_official_weights and entry.sha256 is None:
        why = f"The sha256 of the official weights of {name!r} is not known yet, so these weights cannot be verified."
    else:
        why = f"These weights are not the official ones of {name!r}."
    return f"{why} Leaderboards add the id of the weights to the name, and show no published numbers for them."


def check_size(task: Task, encoder: Encoder) -> None:
    """Raise UsageError if an input size set by the user does not fit the encoder (sizes of cards are rounded)."""
    size, multiple = task.changed.get("input_size"), encoder.size_multiple or encoder.stride
    if encoder.only_size and size not in (None, encoder.only_size):
        raise UsageError(
            f"--set input_size={size}: {encoder.name!r} takes inputs of {encoder.only_size}x{encoder.only_size} only."
        )
    if size is not None and size % multiple:
        low = size // multiple * multiple
        needed = "of the stride" if multiple == encoder.stride else "that inputs need,"
        raise UsageError(
            f"--set input_size={size} is not a multiple {needed} {multiple} of "
            f"{encoder.name!r}. Use {f'{low} or ' if low else ''}{low + multiple}."
        )


def check_encoder(task: Task, encoder: Encoder) -> None:
    """Raise UsageError if a task cannot use an encoder, because of its input size or according to the family's own
    `check_encoder(encoder, settings)`."""
    check_size(task, encoder)
    if of_family := getattr(task.module, "check_encoder", None):
        of_family(encoder, settings_for(task, encoder))


def settings_for(task: Task, encoder: Encoder) -> Any:
    """Return the settings of a task, with the input size rounded to one that the encoder accepts.

    Raises UsageError if `tokens_per_side` is set and the encoder cannot have this number of tokens.
    """
    settings = task.settings()
    used = settings.input_size_for(encoder.stride)
    size = encoder.nearest_size(used)
    if size == used:
        return settings
    if settings.tokens_per_side is not None:
        raise UsageError(
            f"tokens_per_side={settings.tokens_per_side} needs inputs of {used}x{used}, which {encoder.name!r} does "
            f"not accept; the nearest size is {size}x{size}."
        )
    return settings.model_copy(update={"input_size": encoder.nearest_size(settings.input_size)})


def encoder_facts(encoder: Encoder) -> dict[str, Any]:
    """Return the provenance of an encoder."""
    report = encoder.weights_report
    entry = zoo().get(encoder.name)
    taken = encoder.official is None and entry is not None and entry.has_official_weights  # another model's name
    return {
        "weights_id": encoder.weights_id,
        "official": False if taken else encoder.official,
        "precision": encoder.precision,
        "encoder": {
            "name": encoder.name,
            "embed_dim": encoder.embed_dim,
            "stride": encoder.stride,
            "mean": encoder.mean,
            "std": encoder.std,
            "statistics": encoder.statistics,
            "parameters": sum(p.numel() for p in encoder.parameters()),
            "weights_report": None if report is None else vars(report),
        },
    }


def device_name(encoder: Encoder) -> str:
    """Return the name of the encoder's GPU, or the type of its device."""
    import torch

    device = encoder.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
