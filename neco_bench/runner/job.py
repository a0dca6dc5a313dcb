"""Jobs: one model on one task with its data opened, planned without loading torch or weights."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, UsageError
from neco_bench.core.files import digest
from neco_bench.core.protocol import Task, find_tasks
from neco_bench.data.base import Dataset
from neco_bench.data.folder import shared_items
from neco_bench.data.load import DRAWS, check_split, dataset_class, load_dataset
from neco_bench.encoders.identity import content_id, loaded_id, version_of
from neco_bench.encoders.load import is_fast_in_bf16, load_encoder
from neco_bench.encoders.spec import needs_loading, parse_spec
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from neco_bench.runner.options import RunOptions

# Packages whose versions affect results and stored features; those of an encoder are part of its identity.
VERSIONS = ("neco-bench", "torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "faiss-gpu", "faiss-cpu")


@dataclass(frozen=True)
class Job:
    """One model on one task with its data opened.

    data: by role; the draws of a fraction have the roles "train/0", "train/1", ... facts, identity: everything on which
    the result depends, except the encoder, and the identity of the encoder as far as known; the content key `key` is
    their digest. place: position among the jobs of a command, "3 of 12". layers_ahead: layers whose features later jobs
    need, see `Context`.
    """

    model: str
    task: Task
    data: Mapping[str, Dataset]
    options: RunOptions
    facts: Mapping[str, Any]
    identity: str
    key: str
    place: str = ""
    layers_ahead: tuple[int, ...] = ()

    def identified(self, identity: str) -> Job:
        """Return the job with another identity of its encoder, such as that of the loaded encoder."""
        return replace(self, identity=identity, key=digest([dict(self.facts), identity]))

    @property
    def result_fields(self) -> dict[str, Any]:
        """Fields of the Result that are known before the run."""
        coverage = {role.partition("/")[0]: d.coverage for role, d in self.data.items() if d.coverage is not None}
        return {
            "key": self.key,
            "model": self.label,
            "task": self.task.card.name,
            "family": self.task.card.family,
            "protocol": self.task.label,
            "primary_metric": self.task.card.metric,
            "seed": self.options.seed,
            "subset": coverage or None,
            "limit": self.options.limit,
            "changed": dict(self.task.changed),
        }

    @property
    def draws(self) -> list[dict[str, Dataset]]:
        """Data of each run of the family: one run, or one per draw of a fraction."""
        parts = [(*role.partition("/")[::2], dataset) for role, dataset in self.data.items()]
        numbers = sorted({number for _, number, _ in parts if number}) or [""]
        return [{role: d for role, number, d in parts if number in ("", wanted)} for wanted in numbers]

    @property
    def label(self) -> str:
        """The model in tables: its spec, with the layers if they are given."""
        return self.model + (f"[layers={self.options.layers}]" if self.options.layers else "")

    @property
    def title(self) -> str:
        """Title in messages: place, model, task, and the seed if it is not 0."""
        place = f"[{self.place}] " if self.place else ""
        seed = f", seed {self.options.seed}" if self.options.seed else ""
        return f"{place}{self.label} on {self.task.card.name}@{self.task.label}{seed}"


def plan(model: str, task: Task, options: RunOptions, *, identity: str | None = None) -> Job:
    """Check the model's name and open the data. Loads no weights, and torch only for the precision "auto".

    identity: identity of the encoder; None computes it from the model spec.
    """
    if options.precision == "auto":
        fast = task.protocol.allows_bf16 and is_fast_in_bf16(options.device)
        options = replace(options, precision="bf16" if fast else "fp32")
    if identity is None:  # raises now, not hours later, for an unknown model or a missing file
        identity = content_id(model, options.weights)
    if options.split_file is not None and "train" not in task.card.splits:
        raise UsageError(
            f"--split-file restricts the training split, which {task.card.name} does not have. Leave one of them out."
        )
    data = {}
    for role, split in task.card.splits.items():
        if role != "train" and not split.endswith("_*"):  # for `camvid_ic[test]`, before any file is opened
            check_split(dataset_class(task.dataset, options.data_root), split)
    for role, split in task.card.splits.items():
        file = options.split_file if role == "train" else None
        for part, name in _splits(role, split, file is not None).items():
            data[part] = load_dataset(task.dataset, name, root=options.data_root, limit=options.limit, split_file=file)
    for (role, train), (other, scored) in itertools.product(data.items(), data.items()):
        if role.startswith("train") and not other.startswith("train") and (text := shared_items(train, scored)):
            raise BadInputError(f"{train.name}: {text} Correct the lists of the splits.")
    facts = {
        "layers": options.layers,
        "precision": options.precision or "fp32",
        "device": (options.device or "auto").split(":")[0],
        "task": [task.card.name, task.card.hash(task.protocol.id), task.label, task.hash],
        "data": {role: dataset.fingerprint() for role, dataset in data.items()},
        "seed": options.seed,
        "limit": options.limit,
        "versions": {name: version_of(name) for name in VERSIONS},
    }
    if options.features == "fp16":  # the other options do not affect numbers
        facts["features"] = options.features
    return Job(model, task, data, options, facts, identity, digest([facts, identity]))


def job_of(result: Result, **given: Any) -> Job:
    """Return the job of a stored result. given: fields of `RunOptions` that replace the recorded ones.

    Raises the errors of `plan`, such as UsageError for a model without a spec (an Encoder object).
    """
    recorded = result.provenance.get("arguments", {})
    kinds = {"data_root": Path, "split_file": Path, "weights": Path, "batch_size": int, "workers": int, "limit": int}
    names = ("device", "precision", "layers", "features", *kinds)
    options = {name: kinds.get(name, str)(recorded[name]) for name in names if name in recorded}
    options |= {name: value for name, value in given.items() if value is not None}
    model = re.sub(r"\[input=\d+\]$", "", result.model).removesuffix(f"[layers={options.get('layers')}]")
    name = f"{result.task}@{result.protocol.removesuffix('*')}"
    (task,) = find_tasks([name], result.changed, data_root=options.get("data_root"))
    return plan(model, task, RunOptions(seed=result.seed, **options))


def _splits(role: str, split: str, listed: bool) -> dict[str, str]:
    """Return {role: split}; for a fraction, its draws {"train/0": "trainaug_1of8_0", ...}, unless `listed`."""
    if not split.endswith("_*"):
        return {role: split}
    if listed:
        return {role: split.rpartition("_1of")[0]}
    return {f"{role}/{draw}": f"{split[:-1]}{draw}" for draw in range(DRAWS)}


def identify(model: str, options: RunOptions, store: ResultStore) -> str:
    """Return the identity, in content keys, of the encoder of a spec.

    The encoder is loaded on the CPU only if its weights cannot be identified otherwise and the store has results. If
    loading fails, the job will report it. Raises the errors of `content_id`.
    """
    if options.overwrite or store.is_empty or not needs_loading(parse_spec(model)):
        return content_id(model, options.weights)
    try:
        encoder = load_encoder(model, weights=options.weights, device="cpu", layers=options.layers)
    except NecoBenchError:
        return content_id(model, options.weights)
    return loaded_id(model, options.weights, encoder)


def for_each_layer(model: str, options: RunOptions) -> list[RunOptions]:
    """Return the options of one run per block or stage if `layers` is "all", else the unchanged options.

    The encoder is loaded on the CPU to count its layers. Raises UsageError for an encoder without layers, and the
    errors of `load_encoder`.
    """
    if options.layers != "all":
        return [options]
    count = load_encoder(model, weights=options.weights, device="cpu", layers=-1).layer_count
    if not count:
        raise UsageError(f"Model {model!r} has no layers to choose from. Leave --layers all out.")
    return [replace(options, layers=str(layer)) for layer in range(count)]


def each_of(
    model: str, task: Task, layered: Sequence[tuple[RunOptions, str | None]], seeds: int, store: ResultStore | None
) -> list[Job]:
    """Return the jobs of a model on a task, for each seed and each of `layered`, (options, identity of the encoder).

    The data are opened once. For several layers, `layers_ahead` of each job has the layers of later jobs without a
    result, unless features are not stored. Raises the errors of `plan` and `seeded`.
    """
    first = plan(model, task, layered[0][0], identity=layered[0][1])
    jobs = seeded(first, seeds)
    for options, identity in layered[1:]:
        own = replace(first.options, layers=options.layers)  # including changes by `plan`
        other = replace(first, options=own, facts={**first.facts, "layers": options.layers})
        jobs += seeded(other.identified(identity or first.identity), seeds)
    if len(layered) == 1 or layered[0][0].features == "off":
        return jobs
    ahead: dict[int, tuple[int, ...]] = defaultdict(tuple)  # by seed
    for number, job in reversed(list(enumerate(jobs))):
        seed, layer = job.options.seed, int(job.options.layers or 0)
        jobs[number] = replace(job, layers_ahead=ahead[seed])
        if store is None or stored(job, store) is None:
            ahead[seed] = (layer, *ahead[seed])
    return jobs


@dataclass(frozen=True)
class MissingJob:
    """A model on a task that cannot be planned, because data or a file of the model are missing."""

    model: str
    task: Task
    error: MissingError


def plan_all(
    models: Iterable[str],
    tasks: Iterable[Task],
    options: RunOptions,
    store: ResultStore,
    *,
    seeds: int = 1,
    missing: list[MissingJob] | None = None,
) -> list[Job]:
    """Return the jobs of every model on every task, for `seeds` seeds from `options.seed` on, and each layer of "all".

    Names, settings and data are checked before anything runs. Imports no torch, unless an encoder must be loaded to
    identify it. missing: receives the jobs whose data or files are missing; None raises their errors.
    """
    tasks = list(tasks)
    for task in tasks:
        task.settings()
    jobs = []
    for model in models:
        try:
            each = for_each_layer(model, options)
            layered: list[tuple[RunOptions, str | None]] = [(own, identify(model, own, store)) for own in each]
        except MissingError as error:
            if missing is None:
                raise
            missing += [MissingJob(model, task, error) for task in tasks]
            continue
        for task in tasks:
            try:
                jobs += each_of(model, task, layered, seeds, store)
            except MissingError as error:
                if missing is None:
                    raise
                missing.append(MissingJob(model, task, error))
    if any(stored(job, store) is None for job in jobs):
        store.check_writable()
    return numbered(jobs)


def numbered(jobs: list[Job], *, apart: bool = False) -> list[Job]:
    """Return the jobs with their places, if there are several.

    apart: jobs run in separate processes, so none stores features for another.
    """
    if apart:
        jobs = [replace(job, layers_ahead=()) for job in jobs]
    if len(jobs) < 2:
        return jobs
    return [replace(job, place=f"{number} of {len(jobs)}") for number, job in enumerate(jobs, 1)]


def seeded(job: Job, count: int) -> list[Job]:
    """Return the job for `count` consecutive seeds, starting with its own. Raises UsageError for a wrong count."""
    if count < 1:
        raise UsageError(f"--seeds must be at least 1, got {count}.")
    replace(job.options, seed=job.options.seed + count - 1)  # raises if it is too large
    jobs = []
    for seed in range(job.options.seed, job.options.seed + count):
        facts = {**job.facts, "seed": seed}
        options = replace(job.options, seed=seed)
        jobs.append(replace(job, options=options, facts=facts, key=digest([facts, job.identity])))
    return jobs


def stored(job: Job, store: ResultStore) -> Result | None:
    """Return the stored result of a job; None if there is none, or if `overwrite` is set."""
    return None if job.options.overwrite else store.find(job.key)
