"""Jobs: one model on one task with its data opened, planned without loading torch or weights."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neco_bench.core.errors import MissingError, NecoBenchError, UsageError
from neco_bench.core.files import digest
from neco_bench.core.protocol import Task, find_tasks
from neco_bench.data.base import Dataset
from neco_bench.data.load import DRAWS, check_split, dataset_class, load_dataset
from neco_bench.encoders.identity import content_id, loaded_id, version_of
from neco_bench.encoders.load import is_fast_in_bf16, load_encoder
from neco_bench.encoders.spec import needs_loading, parse_spec
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from neco_bench.runner.options import RunOptions

# Distributions that a stored result and stored features depend on; what one kind of encoder needs is in its identity.
VERSIONS = ("neco-bench", "torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "faiss-gpu", "faiss-cpu")


@dataclass(frozen=True)
class Job:
    """One model on one task with its data opened: what `--dry-run` shows and `execute` runs.

    data: by role; the draws of a fraction have the roles "train/0", "train/1", ... identity: of the encoder's content,
    as far as it is known. key: the content key, of facts and identity. place: among the jobs of a command: "3 of 12".
    layers_ahead: layers of which later jobs of a sweep need the features, see `Context`.
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
        """The job with what is known of its encoder once that is loaded."""
        return replace(self, identity=identity, key=digest([dict(self.facts), identity]))

    @property
    def result_fields(self) -> dict[str, Any]:
        """The fields of its Result that do not depend on how the run went."""
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
        """The data of each run of the family: of the only one, or of one per draw of a fraction."""
        parts = [(*role.partition("/")[::2], dataset) for role, dataset in self.data.items()]
        numbers = sorted({number for _, number, _ in parts if number}) or [""]
        return [{role: d for role, number, d in parts if number in ("", wanted)} for wanted in numbers]

    @property
    def label(self) -> str:
        """The model column of tables: the spec, with the layers where inner ones were asked for."""
        return self.model + (f"[layers={self.options.layers}]" if self.options.layers else "")

    @property
    def title(self) -> str:
        """What messages call it: its place, model, task, and the seed where it is not 0."""
        place = f"[{self.place}] " if self.place else ""
        seed = f", seed {self.options.seed}" if self.options.seed else ""
        return f"{place}{self.label} on {self.task.card.name}@{self.task.label}{seed}"


def plan(model: str, task: Task, options: RunOptions, *, identity: str | None = None) -> Job:
    """Check the model's name and open the data. Loads no weights and, but for the precision "auto", no torch.

    identity: what stands for the encoder's content; None asks the model spec.
    """
    if options.precision == "auto":
        fast = task.protocol.allows_bf16 and is_fast_in_bf16(options.device)
        options = replace(options, precision="bf16" if fast else "fp32")
    if identity is None:  # an unknown model or a missing file is an error now, not hours later
        identity = content_id(model, options.weights)
    if options.split_file is not None and "train" not in task.card.splits:
        raise UsageError(
            f"--split-file restricts the training split, which {task.card.name} does not have. Leave one of them out."
        )
    data = {}
    for role, split in task.card.splits.items():
        if role != "train" and not split.endswith("_*"):  # of `camvid_ic[test]`, before any file is looked for
            check_split(dataset_class(task.dataset, options.data_root), split)
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
        "versions": {name: version_of(name) for name in VERSIONS},
    }
    if options.features == "fp16":  # the other two give the same numbers
        facts["features"] = options.features
    return Job(model, task, data, options, facts, identity, digest([facts, identity]))


def job_of(result: Result, **given: Any) -> Job:
    """The job that made a stored result. given: fields of `RunOptions` to use instead of the recorded ones.

    Raises what `plan` raises, such as UsageError for a model that has no spec (an Encoder object).
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
    """{role: split}; of a fraction all draws, {"train/0": "trainaug_1of8_0", ...}, unless a list replaces them."""
    if not split.endswith("_*"):
        return {role: split}
    if listed:
        return {role: split.rpartition("_1of")[0]}
    return {f"{role}/{draw}": f"{split[:-1]}{draw}" for draw in range(DRAWS)}


def identify(model: str, options: RunOptions, store: ResultStore) -> str:
    """What stands for the encoder of a spec in content keys.

    It is loaded, on the CPU, where nothing else shows what its weights are and the store has results that might be its.
    One that cannot be loaded is left to its job. Raises as `content_id`.
    """
    if options.overwrite or store.is_empty or not needs_loading(parse_spec(model)):
        return content_id(model, options.weights)
    try:
        encoder = load_encoder(model, weights=options.weights, device="cpu", layers=options.layers)
    except NecoBenchError:
        return content_id(model, options.weights)
    return loaded_id(model, options.weights, encoder)


def for_each_layer(model: str, options: RunOptions) -> list[RunOptions]:
    """The options of one run per block or stage where `layers` is "all", and else the options as they are.

    The encoder is loaded on the CPU to count them. Raises `UsageError` for one without layers, and as `load_encoder`.
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
    """The jobs of a model on a task: for each of `layered`, options and the encoder's identity, so many seeds.

    The data are opened once. Of several layers, each job knows those of later jobs that have no result yet, unless no
    features are stored. Raises as `plan` and `seeded`.
    """
    first = plan(model, task, layered[0][0], identity=layered[0][1])
    jobs = seeded(first, seeds)
    for options, identity in layered[1:]:
        own = replace(first.options, layers=options.layers)  # with what planning has set
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
    """A model on a task that cannot be planned here, as its data or a file of the model is not there."""

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
    """Jobs of every model on every task, one for each of `seeds` from `options.seed` on, and for each layer of "all".

    Names, settings and data are checked before anything runs. Imports no torch, unless an encoder must be
    loaded to know what it is. missing: takes what is not there, which else is an error.
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
    for job in jobs:
        if stored(job, store) is None:
            store.check_writable()
    return numbered(jobs)


def numbered(jobs: list[Job], *, apart: bool = False) -> list[Job]:
    """The jobs, each with its place among them where there are several.

    apart: they run in processes of their own, where none fills the feature store for another.
    """
    if apart:
        jobs = [replace(job, layers_ahead=()) for job in jobs]
    if len(jobs) < 2:
        return jobs
    return [replace(job, place=f"{number} of {len(jobs)}") for number, job in enumerate(jobs, 1)]


def seeded(job: Job, count: int) -> list[Job]:
    """The job, and the same ones with the seeds that follow. Raises UsageError for a wrong number."""
    if count < 1:
        raise UsageError(f"--seeds must be at least 1, got {count}.")
    replace(job.options, seed=job.options.seed + count - 1)  # raises where that is too large
    jobs = []
    for seed in range(job.options.seed, job.options.seed + count):
        facts = {**job.facts, "seed": seed}
        options = replace(job.options, seed=seed)
        jobs.append(replace(job, options=options, facts=facts, key=digest([facts, job.identity])))
    return jobs


def stored(job: Job, store: ResultStore) -> Result | None:
    """The finished result of a job, unless the options ask for a new one."""
    return None if job.options.overwrite else store.find(job.key)
