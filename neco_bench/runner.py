"""`run`: one encoder on one task, from names to a stored Result. What the command line calls, and the Python API.

The content key of a result covers everything the number depends on, and is computed without loading torch or the
weights, so that a second run returns the stored result at once.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import math
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neco_bench import distributed
from neco_bench.context import Context, Outcome
from neco_bench.data import DRAWS, load_dataset
from neco_bench.data.base import Dataset, PairDataset, SegmentationDataset
from neco_bench.encoders.specs import load_encoder, resolve_device
from neco_bench.encoders.zoo import PRECISIONS, contamination, describe, parse_spec, request_id
from neco_bench.errors import BadInputError, NecoBenchError, NumericalError, UsageError, error_of_code
from neco_bench.protocol import FAMILIES, Task, digest, find_tasks
from neco_bench.registry import BUILTIN
from neco_bench.results.provenance import environment, peak_memory_mb
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore

if TYPE_CHECKING:
    import numpy as np

    from neco_bench.encoders.base import Encoder


PACKAGES = ("neco_bench", "torch", "torchvision", "timm", "transformers")
MOST_SEED = 10**9  # FAISS counts seeds in 31 bits, and several follow the first


@dataclass(frozen=True)
class Options:
    """How to run. None: NECO_BENCH_DATA (data_root), the best device, fp32, the last layer, cores - 1 workers
    beside a GPU and none beside a CPU.

    features: how those of a named model are kept and shared by tasks, "fp32", "fp16" or "off".
    """

    data_root: Path | None = None
    device: str | None = None
    precision: str | None = None
    batch_size: int = 16
    workers: int | None = None
    seed: int = 0
    limit: int | None = None
    split_file: Path | None = None
    weights: Path | None = None
    layers: str | None = None
    features: str = "fp32"
    overwrite: bool = False
    progress: bool = False

    @property
    def workers_used(self) -> int:
        """`workers`, by default one core less than there are, at most 16, shared by the processes of torchrun."""
        spare = max(0, min(16, (os.cpu_count() or 1) - 1)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return spare if self.workers is None else self.workers

    def __post_init__(self) -> None:
        if self.precision not in (None, *PRECISIONS):
            raise UsageError(f"Unknown precision {self.precision!r}: use {', '.join(PRECISIONS)}.")
        if self.features not in ("fp32", "fp16", "off"):
            raise UsageError(f"Unknown --features {self.features!r}: use fp32, fp16 or off.")
        for name, value, least in (
            ("--batch-size", self.batch_size, 1),
            ("--workers", self.workers, 0),
            ("--limit", self.limit, 1),
            ("--seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}.")
        if self.seed > MOST_SEED:
            raise UsageError(f"--seed must be at most {MOST_SEED:,}, got {self.seed}.")


@dataclass(frozen=True)
class Job:
    """One model on one task with its data opened: what `--dry-run` shows and `execute` runs.

    data: by role; the draws of a fraction have the roles "train/0", "train/1", ...
    """

    model: str
    task: Task
    data: Mapping[str, Dataset]
    options: Options
    facts: Mapping[str, Any]
    identity: str | None = None

    @property
    def key(self) -> str:
        """The content key, from the files as they are now: a zoo checkpoint that a run fetches becomes part of it."""
        return digest([dict(self.facts), self.identity or request_id(self.model, self.options.weights)])

    @property
    def draws(self) -> list[dict[str, Dataset]]:
        """The data of each run of the family: of the only one, or of one per draw of a fraction."""
        parts = [(*role.partition("/")[::2], dataset) for role, dataset in self.data.items()]
        numbers = sorted({number for _, number, _ in parts if number}) or [""]
        return [{role: d for role, number, d in parts if number in ("", wanted)} for wanted in numbers]

    @property
    def label(self) -> str:
        """The model column of tables: the spec, with the layers where inner ones were asked for."""
        return self.model + (f"[layers={self.options.layers}]" if self.options.layers else "")


def plan(model: str, task: Task, options: Options, *, identity: str | None = None) -> Job:
    """Check the model's name and open the data. Loads no weights and no torch.

    identity: what stands for the encoder's content; None asks the model spec.
    """
    if identity is None:
        request_id(model, options.weights)  # an unknown model or a missing file is an error now, not hours later
    if options.split_file is not None and "train" not in task.card.splits:
        raise UsageError(
            f"--split-file restricts the training split, which {task.card.name} does not have. Leave one of them out."
        )
    data = {}
    for role, split in task.card.splits.items():
        file = options.split_file if role == "train" else None
        for part, name in _splits(role, split, file is not None).items():
            data[part] = load_dataset(task.dataset, name, root=options.data_root, limit=options.limit, split_file=file)
    facts = {
        "layers": options.layers,
        "precision": options.precision or "fp32",
        "device": (options.device or "auto").split(":")[0],
        "task": [task.card.name, task.card.hash(task.protocol.id), task.label, task.hash],
        "data": {role: dataset.fingerprint() for role, dataset in data.items()},
        "seed": options.seed,
        "limit": options.limit,
        "versions": {name: importlib.metadata.version(name) for name in ("neco-bench", "torch", "torchvision", "timm")},
    }
    if options.features == "fp16":  # the other two give the same numbers
        facts["features"] = options.features
    return Job(model, task, data, options, facts, identity)


def execute(job: Job, encoder: Encoder | None) -> tuple[Result, dict[str, np.ndarray] | None]:
    """Run a job: its Result and per-image statistics.

    Errors of the user's making become a Result with status "failed"; other exceptions pass through.
    """
    options, task = job.options, job.task
    context = Context(options.seed, options.batch_size, options.workers_used, options.progress)
    provenance: dict[str, Any] = {
        **environment(),
        "arguments": {name: str(value) for name, value in vars(options).items() if value is not None},
        "card_hash": task.card.hash(task.protocol.id),
        "protocol_hash": task.hash,
        "settings": task.constants,
        "citation": task.citation,
        "dataset": {role: {"name": d.name, "split": d.split, "items": len(d)} for role, d in job.data.items()},
        "training": _training(job),
        "dataset_fingerprint": {role: d.fingerprint() for role, d in job.data.items()},
    }
    subset = {role.partition("/")[0]: d.subset for role, d in job.data.items() if d.subset is not None}
    common: dict[str, Any] = {
        "model": job.label,
        "task": task.card.name,
        "family": task.card.family,
        "protocol": task.label,
        "primary_metric": task.card.metric,
        "seed": options.seed,
        "subset": subset or None,
        "limit": options.limit,
        "changed": dict(task.changed),
    }
    start = time.perf_counter()
    try:
        loaded = _ready(job, encoder, context)
        provenance |= _encoder_facts(loaded)
        check_size(task, loaded)
        _glance(job)
        outcome = _outcome(job, loaded, context)
        undefined = [name for name, value in outcome.metrics.items() if not math.isfinite(value)]
        if undefined:
            raise NumericalError(f"{', '.join(undefined)} is not a number: no scored pixel or point has ground truth.")
    except NecoBenchError as error:
        if distributed.world() > 1:  # the other processes wait for this one: end them all
            raise
        failed = Result(
            key=job.key,
            **common,
            metrics={},
            per_class={},
            ci95={},
            n_images=0,
            status="failed",
            error=str(error),
            error_code=error.exit_code,
            provenance=provenance,
            timing=_timing(context, start),
            peak_memory_mb=peak_memory_mb(),
        )
        return failed, None
    used = outcome.features.get("used_size")
    provenance["features"] = {
        **outcome.features,
        "tokens": None if used is None else (used // loaded.stride) ** 2,
        "layer": loaded.layer,
        "pos_interp": loaded.pos_interp,
        "dtype": "float16" if options.features == "fp16" else "float32",
    }
    provenance |= {
        "device": _device_name(loaded),
        "batch_size_used": context.batch_size,
        "workers": context.workers,
        "features_reused": context.reused,
        "processes": distributed.world(),
        "run": context.notes,
    }
    result = Result(
        key=job.key,
        **common,
        metrics=outcome.metrics,
        per_class=outcome.per_class,
        ci95={name: interval for name, interval in outcome.ci95.items() if interval is not None},
        n_images=outcome.n_images,
        status="ok",
        provenance=provenance,
        timing=_timing(context, start),
        peak_memory_mb=peak_memory_mb(),
    )
    return result, outcome.statistics | _image_ids(job, outcome)


def _ready(job: Job, encoder: Encoder | None, context: Context) -> Encoder:
    """The encoder of a job, loaded unless it is given, and the context set for it."""
    options = job.options
    with context.phase("load_encoder"):
        loaded = encoder or load_job_encoder(job)
    if options.workers is None and loaded.device.type == "cpu":
        context.workers = 0  # threads load: processes would disturb an encoder on the same cores
    if options.features == "fp16" or (options.features != "off" and encoder is None):
        from neco_bench.features.store import FeatureStore

        identity, anew = None, False
        if encoder is None:
            identity = digest([request_id(job.model, options.weights), job.facts["versions"]])
            anew = options.overwrite and parse_spec(job.model).kind == "file"  # which may import more
        context.store = FeatureStore(options.features, identity, anew)
    return loaded


def job_of(result: Result, **given: Any) -> Job:
    """The job that made a stored result. given: fields of `Options` to use instead of the recorded ones.

    Raises what `plan` raises, such as UsageError for a model that has no spec (an Encoder object).
    """
    recorded = result.provenance.get("arguments", {})
    kinds = {"data_root": Path, "split_file": Path, "weights": Path, "batch_size": int, "workers": int, "limit": int}
    names = ("device", "precision", "layers", "features", *kinds)
    options = {name: kinds.get(name, str)(recorded[name]) for name in names if name in recorded}
    options |= {name: value for name, value in given.items() if value is not None}
    model = result.model.removesuffix(f"[layers={options.get('layers')}]")
    (task,) = find_tasks([f"{result.task}@{result.protocol.removesuffix('*')}"], result.changed)
    return plan(model, task, Options(seed=result.seed, **options))


def watch(job: Job, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Run a job for what it sees of some items (`Context.seen`); of a fraction's draws the first.

    Pairs are computed alone; images within their whole split, on which clusters and heads hang.
    """
    options = job.options
    context = Context(options.seed, options.batch_size, options.workers_used, options.progress, watched=frozenset(ids))
    encoder = _ready(job, None, context)
    data = {role: d.chosen(context.watched) if isinstance(d, PairDataset) else d for role, d in job.draws[0].items()}
    job.task.module.run(encoder, data, job.task.settings(), context)
    return context.seen


def run(
    model: str | Encoder,
    task: str,
    *,
    data_root: str | Path | None = None,
    out: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    **options: Any,
) -> Result:
    """Run one task ("camvid_ic", "ade20k_linear@clean-1") for one model spec or Encoder, and return its Result.

    out: results folder; with it, a stored result of the same content is returned instead of running again.
    changes: what `--set` gives on the command line. options: fields of `Options` (device, precision, batch_size,
    workers, seed, limit, split_file, weights, layers, features, overwrite, progress).

    Raises the NecoBenchError that the command line would report, with its exit code.
    """
    unknown = set(options) - set(Options.__dataclass_fields__)
    if unknown:
        raise UsageError(f"Unknown option {sorted(unknown)}. There are: {', '.join(Options.__dataclass_fields__)}.")
    tasks = find_tasks([task], changes)
    if len(tasks) != 1:
        raise UsageError(f"run() takes one task, {task!r} names {len(tasks)}.")
    chosen = Options(data_root=Path(data_root) if data_root else None, **options)
    if isinstance(model, str):
        job, encoder = plan(model, tasks[0], chosen), None
    else:
        identity = _identity(model, chosen)
        name = model.name + ("" if model.layer == "last" else f"[{model.layer}]")
        job, encoder = plan(name, tasks[0], chosen, identity=identity), model
    store = ResultStore(out) if out else None
    if store is None or stored(job, store) is None:
        job.task.settings()  # a wrong setting is an error now, not after the encoder is loaded
        if store:
            store.check_writable()
    result = run_job(job, store, encoder)
    if result.status == "failed":
        raise error_of_code(result.error_code, result.error or "")
    return result


def run_job(job: Job, store: ResultStore | None, encoder: Encoder | None = None) -> Result:
    """The stored result of a job, or a new one, stored at once. encoder: None loads what the job names."""
    if store and (found := stored(job, store)):
        return found
    result, statistics = execute(job, encoder)
    if store and distributed.rank() == 0:
        mistyped = result.error_code == UsageError.exit_code  # is no gap in a table
        lost = result.status == "failed" and store.find(job.key) is not None  # an older result would be, to --overwrite
        if not mistyped and not lost:
            store.save(result, statistics)
    return result


def load_job_encoder(job: Job) -> Encoder:
    """The encoder that a job names. Raises what `load_encoder` raises."""
    options = job.options
    return load_encoder(
        job.model,
        weights=options.weights,
        device=options.device,
        precision=options.precision,
        layers=options.layers,
    )


def check_device(device: str | None) -> None:
    """Raise UsageError for a device that is unknown or not on this machine."""
    if device not in (None, "auto", "cpu"):
        resolve_device(device)


def _glance(job: Job) -> None:
    """Raise BadInputError where a few masks of a split already show that they are not those of the data set."""
    import numpy as np

    for dataset in job.data.values():
        if isinstance(dataset, SegmentationDataset):
            counts = np.zeros(256, np.int64)
            for index in np.unique(np.linspace(0, len(dataset) - 1, 16).astype(int)):
                counts += np.bincount(dataset.mask(index).ravel(), minlength=256)[:256]
            if doubts := dataset.doubts(counts):
                raise BadInputError(f"Data set {dataset.name!r}, split {dataset.split!r}: {doubts[0]}")


def _splits(role: str, split: str, listed: bool) -> dict[str, str]:
    """{role: split}; of a fraction all draws, {"train/0": "trainaug_1of8_0", ...}, unless a list replaces them."""
    if not split.endswith("_*"):
        return {role: split}
    if listed:
        return {role: split.rpartition("_1of")[0]}
    return {f"{role}/{draw}": f"{split[:-1]}{draw}" for draw in range(DRAWS)}


def _outcome(job: Job, encoder: Encoder, context: Context) -> Outcome:
    """What the family returns. Any error of a plug-in's family is that plug-in's, and loses no other job."""
    task = job.task
    settings = task.settings()
    outcomes, notes = [], []
    try:
        for data in job.draws:
            context.notes = {}
            outcomes.append(task.module.run(encoder, data, settings, context))
            notes.append(context.notes)
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
    context.notes = {"draws": notes}
    return _mean_of_draws(outcomes, settings, context.seed)


def _mean_of_draws(outcomes: list[Outcome], settings: Any, seed: int) -> Outcome:
    """Mean over the draws of a fraction, with the sample standard deviation of each metric as `<metric>_std`.

    The interval is that of the mean mIoU when the val images are drawn anew, the same ones for every draw. Statistics
    are stacked, draws first.
    """
    import numpy as np

    from neco_bench import statistics

    values = {name: np.array([outcome.metrics[name] for outcome in outcomes]) for name in outcomes[0].metrics}
    stacked = {name: np.stack([o.statistics[name] for o in outcomes]) for name in outcomes[0].statistics}
    per_class: dict[str, dict[str, float | None]] = {}
    for metric, rows in outcomes[0].per_class.items():
        columns = {name: [outcome.per_class[metric][name] for outcome in outcomes] for name in rows}
        known = {name: [value for value in column if value is not None] for name, column in columns.items()}
        per_class[metric] = {name: float(np.mean(column)) if column else None for name, column in known.items()}
    confusions = stacked["confusion"].reshape(-1, *stacked["confusion"].shape[-3:])
    return Outcome(
        metrics={
            **{name: float(column.mean()) for name, column in values.items()},
            **{f"{name}_std": float(column.std(ddof=1)) for name, column in values.items()},
        },
        per_class=per_class,
        ci95={"mIoU": statistics.bootstrap_miou(confusions, absent=settings.absent, seed=seed)},
        n_images=outcomes[0].n_images,
        statistics=stacked,
        features=outcomes[0].features,
    )


def _image_ids(job: Job, outcome: Outcome) -> dict[str, np.ndarray]:
    """Which images the rows of the statistics are of."""
    import numpy as np

    val = job.data.get("val")
    if "confusion" not in outcome.statistics or not isinstance(val, SegmentationDataset):
        return {}
    return {"image_id": np.array(val.ids[: outcome.n_images])}


def _training(job: Job) -> dict[str, str]:
    """What the encoder was trained on, and whether that touches the images of the data set."""
    known = {} if job.options.weights or job.identity else describe(job.model)
    source = next(iter(job.data.values()))
    images_from = source.images_from or source.folder_name or source.name
    return {
        "data": known.get("training_data", ""),
        "contamination": contamination(job.model, job.options.weights or job.identity, images_from),
    }


def _timing(context: Context, start: float) -> dict[str, float]:
    return {**{k: round(v, 4) for k, v in context.timing.items()}, "total": round(time.perf_counter() - start, 4)}


def check_size(task: Task, encoder: Encoder) -> None:
    """A card's size is rounded to the stride; one that the user sets must fit, else UsageError."""
    size = task.changed.get("input_size")
    if size is not None and size % encoder.stride:
        low = size // encoder.stride * encoder.stride
        raise UsageError(
            f"--set input_size={size} is not a multiple of the stride {encoder.stride} of "
            f"{encoder.name!r}. Use {low or encoder.stride} or {low + encoder.stride}."
        )


def _encoder_facts(encoder: Encoder) -> dict[str, Any]:
    report = encoder.weights_report
    return {
        "weights_id": encoder.weights_id,
        "precision": encoder.precision,
        "encoder": {
            "name": encoder.name,
            "embed_dim": encoder.embed_dim,
            "stride": encoder.stride,
            "mean": encoder.mean,
            "std": encoder.std,
            "parameters": sum(p.numel() for p in encoder.parameters()),
            "weights_report": None if report is None else vars(report),
        },
    }


def _identity(encoder: Encoder, options: Options) -> str:
    """What stands for an Encoder object in the content key: weights, code, and how features are read from it."""
    from neco_bench.encoders.base import Encoder as Contract

    if not isinstance(encoder, Contract):
        raise UsageError(
            f"run() takes a model spec or an Encoder, not {type(encoder).__name__}. Subclass neco_bench.Encoder, or "
            f"name a function that returns the module: path/to/file.py:FACTORY."
        )
    absent = [fact for fact in ("name", "embed_dim", "stride", "weights_id") if not hasattr(encoder, fact)]
    if absent:
        raise BadInputError(f"The {type(encoder).__name__} given to run() lacks {', '.join(absent)}; set it.")
    ignored = [name for name in ("device", "precision", "layers", "weights") if getattr(options, name) is not None]
    if ignored:
        raise UsageError(f"An Encoder is run as it is: give {', '.join(ignored)} to load_encoder() instead.")
    facts = ("weights_id", "embed_dim", "stride", "mean", "std", "layer", "final_norm", "pos_interp", "precision")
    known = {fact: getattr(encoder, fact) for fact in facts}
    return digest({"device": encoder.device.type, "code": _code(encoder)} | known)


def _code(encoder: Encoder) -> dict[str, str]:
    """Source of each class of modules in it, but for packages, whose versions are known. Code that cannot be read (it
    was typed in) is never the same."""
    sources = {}
    for kind in {type(module) for module in encoder.modules()}:
        if kind.__module__.partition(".")[0] not in PACKAGES:
            name = f"{kind.__module__}.{kind.__qualname__}"
            try:
                sources[name] = inspect.getsource(kind)
            except (OSError, TypeError):
                sources[name] = uuid.uuid4().hex
    return sources


def _device_name(encoder: Encoder) -> str:
    import torch

    device = encoder.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def plan_all(models: Iterable[str], tasks: Iterable[Task], options: Options, store: ResultStore) -> list[Job]:
    """Jobs of every model on every task. Names, settings and data are checked before anything runs.

    Settings of stored results were checked when they were made: torch is imported only where something will run.
    """
    tasks = list(tasks)
    jobs = [plan(model, task, options) for model in models for task in tasks]
    for job in jobs:
        if stored(job, store) is None:
            job.task.settings()
            store.check_writable()
    return jobs


def stored(job: Job, store: ResultStore) -> Result | None:
    """The finished result of a job, unless the options ask for a new one."""
    return None if job.options.overwrite else store.find(job.key)
