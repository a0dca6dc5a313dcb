"""Estimate the cost of a run from short measurements, for `run --dry-run`.

A family states in its `cost` how many images it encodes, how many other operations it needs and how much it keeps in
memory and on disk. Encoding a few images, loading a few images and one search give the speed of this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from neco_bench.core.errors import MissingError, NecoBenchError
from neco_bench.core.progress import Progress
from neco_bench.core.task import Cost
from neco_bench.data.base import BoxDataset, Dataset, PairDataset, SegmentationDataset
from neco_bench.data.dense import DenseDataset
from neco_bench.data.video import VideoDataset
from neco_bench.data.views import ViewDataset
from neco_bench.encoders.adapters.layers import read_layers
from neco_bench.encoders.base import Encoder
from neco_bench.encoders.fetch import missing_weights
from neco_bench.encoders.load import load_encoder
from neco_bench.encoders.spec import parse_spec
from neco_bench.features.store import DTYPES, budget
from neco_bench.features.transforms import resize_image
from neco_bench.results.provenance import peak_memory_mb
from neco_bench.results.store import ResultStore
from neco_bench.runner.capacity import check_fits
from neco_bench.runner.execute import check_encoder, load_job_encoder, settings_for
from neco_bench.runner.job import Job, stored
from neco_bench.search.exact import ExactIndex

MEASURED = 8  # images

ENOUGH = 0.5  # seconds of a measurement

PATIENCE = 5.0  # seconds to measure one encoder; after that, time is assumed to be proportional to the area


@dataclass(frozen=True)
class Estimate:
    """Hours; memory and disk in bytes (memory of the process plus, on a GPU, of the device).

    layers_ahead: layers whose features are stored for later jobs; their forward passes are included here.
    """

    hours: float
    memory: float
    disk: float
    layers_ahead: tuple[int, ...] = ()


def forecast(
    jobs: Sequence[Job], store: ResultStore, *, fetch: bool = True, progress: bool = False
) -> list[dict[str, Any]]:
    """Return one row per job: items, whether its result is stored, and otherwise the estimate or the expected error.

    Each model is loaded once for each layer; jobs of one model must be consecutive. fetch: if False, no weights are
    downloaded; if they are missing, the row has the estimate for the architecture and the error. `layers_ahead` are the
    layers whose forward passes are included in the hours of this row. progress: show progress on stderr.
    """
    if progress:
        with Progress("dry run") as shown:
            return _rows(shown.track(jobs, "estimates"), store, fetch)
    return _rows(jobs, store, fetch)


def _rows(jobs: Iterable[Job], store: ResultStore, fetch: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    rates = Rates()
    encoders: dict[tuple[str, str | None], tuple[Encoder | None, NecoBenchError | None]] = {}
    passed: set[tuple[Any, ...]] = set()  # jobs whose features an earlier job stores
    for job in jobs:
        is_stored = stored(job, store) is not None
        cost, problem = None, None
        if not is_stored:
            named = job.model, job.options.layers
            if named not in encoders:
                encoders = {named: _encoder_and_error(job, fetch)}
            encoder, problem = encoders[named]
            if encoder is not None:  # tasks of one model may have several
                encoder.precision = job.options.precision or encoder.precision
            own = job.model, job.task.card.name, job.task.label, job.options.seed
            try:
                cost = encoder and estimate(job, encoder, rates, passed=(*own, job.options.layers) in passed)
                passed |= {(*own, str(layer)) for layer in cost.layers_ahead} if cost else set()
            except NecoBenchError as error:
                problem = problem or error
        rows.append(
            {
                "model": job.label,
                "task": job.task.card.name,
                "protocol": job.task.label,
                "seed": job.options.seed,
                "items": {role: len(d) for role, d in job.data.items()},
                "subset": {role: d.coverage for role, d in job.data.items() if d.coverage},
                "stored": is_stored,
                "hours": cost and float(f"{cost.hours:.2g}"),
                "memory_gb": cost and float(f"{cost.memory / 2**30:.2g}"),
                "disk_gb": cost and float(f"{cost.disk / 2**30:.2g}"),
                "layers_ahead": list(cost.layers_ahead) if cost else [],
                "problem": problem and str(problem),
                "exit_code": problem and problem.exit_code,
            }
        )
    return rows


class Rates:
    """Speeds of this machine, each measured once; encoders of the same architecture share a measurement."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], float] = {}
        self._encoders: dict[tuple[Any, ...], _Encoding] = {}

    def _once(self, key: tuple[Any, ...], measure: Callable[[], float]) -> float:
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def loading(self, dataset: Dataset, size: int) -> float:
        """Return the seconds to load an image."""
        key = dataset.name, dataset.split, size
        return self._once(("loading", *key), lambda: _seconds_to_load(dataset, size))

    def encoding(self, encoder: Encoder, size: int, batch_size: int) -> float:
        """Return the seconds to encode an image."""
        parts = ",".join(f"{name}{tuple(p.shape)}" for name, p in encoder.named_parameters())
        key = parts or encoder.name, encoder.layer, encoder.stride, encoder.precision, str(encoder.device), batch_size
        return self._encoders.setdefault(key, _Encoding()).seconds(encoder, size, batch_size)

    def search(self, device: torch.device, width: int) -> float:
        """Return floating-point operations per second."""
        return self._once(("search", str(device), width), lambda: _rate(device, width))


class _Encoding:
    """Seconds per image of one encoder, by input size."""

    def __init__(self) -> None:
        self._known: dict[int, float] = {}
        self._spent = 0.0

    def seconds(self, encoder: Encoder, size: int, batch_size: int) -> float:
        """Return the seconds at a size: measured once, or, after PATIENCE, derived from the nearest measured size."""
        if size not in self._known and self._spent > PATIENCE:
            nearest = min(self._known, key=lambda other: abs(other - size))
            return self._known[nearest] * (size / nearest) ** 2
        if size not in self._known:
            start = time.perf_counter()
            self._known[size] = _seconds_to_encode(encoder, size, batch_size)
            self._spent += time.perf_counter() - start
        return self._known[size]


def estimate(job: Job, encoder: Encoder, rates: Rates | None = None, *, passed: bool = False) -> Estimate | None:
    """Return the estimate of a job; None if its family (of a plug-in) has no `cost`.

    rates: existing measurements. passed: the features that can be stored are already stored.
    """
    rates = rates or Rates()
    cost_of = getattr(job.task.module, "cost", None)
    if cost_of is None:
        return None
    check_encoder(job.task, encoder)
    check_fits(job.task, job.draws, encoder, job.options.batch_size)
    settings = settings_for(job.task, encoder)
    costs = [cost_of(settings, data, encoder.stride, encoder.embed_dim) for data in job.draws]
    size = costs[0].size + -costs[0].size % encoder.stride
    size = encoder.nearest_size(size)
    loading = rates.loading(next(iter(job.data.values())), size)
    workers = job.options.workers_used
    ahead = () if passed else _stored_ahead(job, encoder, costs)
    together = read_layers(encoder, (int(job.options.layers or 0), *ahead)) if ahead else encoder
    encoding = rates.encoding(together, size, job.options.batch_size)
    # Loading and encoding run in parallel if there are workers and they do not use the same cores.
    apart = workers and encoder.device.type != "cpu"
    per_image = max(loading / workers, encoding) if apart else loading + encoding
    rate = rates.search(encoder.device, costs[0].width)
    seconds = sum((c.unstored if passed else c.images) * per_image + c.operations / rate for c in costs)
    memory = peak_memory_mb() * 2**20 + max(c.memory for c in costs)
    disk = max(c.disk for c in costs) + (0 if passed else _feature_bytes(job, encoder, costs, 1 + len(ahead)))
    return Estimate(seconds / 3600, memory, disk, ahead)


def _stored_ahead(job: Job, encoder: Encoder, costs: Sequence[Cost]) -> tuple[int, ...]:
    """Return the layers that a job stores for later jobs: all or none, depending on the space in the feature store."""
    if not job.layers_ahead or not encoder.equal_layers:
        return ()
    return job.layers_ahead if _feature_bytes(job, encoder, costs, 1 + len(job.layers_ahead)) else ()


def _feature_bytes(job: Job, encoder: Encoder, costs: Sequence[Cost], layers: int) -> float:
    """Return the bytes of the features of a job in the feature store; 0 if they do not fit."""
    if job.options.features == "off":
        return 0
    images = sum(c.images - c.unstored for c in costs)
    width = DTYPES[job.options.features].itemsize * encoder.embed_dim * layers
    needed = images * width * max(c.size / encoder.stride for c in costs) ** 2
    return needed if needed <= budget() else 0


def _encoder_and_error(job: Job, fetch: bool) -> tuple[Encoder | None, NecoBenchError | None]:
    """Return the encoder of a job, or the error of loading it; without `fetch`, both if weights are missing."""
    model, options = parse_spec(job.model), job.options
    entry = model.entry if options.weights is None and model.pretrained else None
    file = entry.weights_file if entry else None
    try:
        if fetch or entry is None or file is None or file.is_file():
            return load_job_encoder(job), None
        problem = missing_weights(str(entry.weights), file, "a dry run of a suite downloads none")
    except NecoBenchError as error:
        if fetch or not isinstance(error, MissingError):
            return None, error
        problem = error
    too_large = entry is not None and entry.params_m > 1500  # million parameters, to be built only for an estimate
    if model.kind != "timm" or options.weights is not None or too_large:
        return None, problem
    bare = replace(model, pretrained=False)
    return load_encoder(bare, device=options.device, precision=options.precision, layers=options.layers), problem


def _seconds_to_encode(encoder: Encoder, size: int, batch_size: int) -> float:
    """Return the seconds per image, measured on one image if that is slow, else on a batch."""
    images = torch.zeros(min(MEASURED, batch_size), 3, size, size)
    if encoder.device.type != "cpu":
        encoder.encode(images[:1])  # starts the device, which takes longer than the rest
    first = _seconds(lambda: encoder.encode(images[:1]))
    return first if first > ENOUGH else _median(lambda: encoder.encode(images)) / len(images)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _median(call: Callable[[], object]) -> float:
    """Return the median seconds of up to three calls after a first one, within ENOUGH; else those of the first call."""
    times = [_seconds(call)]
    while len(times) < 4 and sum(times) < ENOUGH:
        times.append(_seconds(call))
    return float(np.median(times[1:] or times))


def _seconds_to_load(dataset: Dataset, size: int) -> float:
    """Return the seconds per image to read, decode and resize a few images."""
    start = time.perf_counter()
    images: Iterable[np.ndarray] = ()
    if isinstance(dataset, VideoDataset):
        clip = dataset.clip(0)
        images = (clip[index].image for index in range(min(MEASURED, len(clip))))
    elif isinstance(dataset, ViewDataset):
        images = (dataset.read_view(view_id).image for view_id in dataset.image_ids[:MEASURED])
    elif isinstance(dataset, PairDataset):
        images = map(dataset.read_image, dataset.image_ids[:MEASURED])
    elif isinstance(dataset, SegmentationDataset | BoxDataset | DenseDataset):
        images = (dataset[index].image for index in range(min(MEASURED, len(dataset))))
    count = len([resize_image(image, size, size) for image in images])
    return (time.perf_counter() - start) / max(1, count)


def _rate(device: torch.device, width: int) -> float:
    """Return the floating-point operations per second of an exact search with vectors of `width` dimensions."""
    index, count = ExactIndex(width, device), 4096
    index.add(torch.rand(count, width))
    queries = torch.rand(count, width)
    return 2.0 * count**2 * width / _median(lambda: index.search(queries, 8))
