"""What a run will take, from a short measurement: what `run --dry-run` prints.

A family says in its `cost` how many images it encodes, how many operations it does besides and what it keeps; a few
images through the encoder, a few from the disk and one search give the rates of this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from neco_bench.core.errors import NecoBenchError
from neco_bench.data.base import BoxDataset, Dataset, PairDataset, SegmentationDataset
from neco_bench.data.dense import DenseDataset
from neco_bench.data.video import VideoDataset
from neco_bench.data.views import ViewDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.transforms import resize_image
from neco_bench.results.provenance import peak_memory_mb
from neco_bench.results.store import ResultStore
from neco_bench.runner.capacity import check_fits
from neco_bench.runner.execute import check_encoder, load_job_encoder, settings_for
from neco_bench.runner.job import Job, stored
from neco_bench.search.exact import ExactIndex

MEASURED = 8  # images


@dataclass(frozen=True)
class Estimate:
    """hours; memory and disk in bytes (memory of the process and, on a GPU, of the device together)."""

    hours: float
    memory: float
    disk: float


def forecast(jobs: Sequence[Job], store: ResultStore) -> list[dict[str, Any]]:
    """One row per job: its items, whether its result is stored, and else the estimate, or the error it would end in.

    Each model is loaded once; jobs of one model lie side by side.
    """
    rows: list[dict[str, Any]] = []
    encoders: dict[str, Encoder | NecoBenchError] = {}
    for job in jobs:
        is_stored = stored(job, store) is not None
        cost, problem = None, None
        if not is_stored:
            try:
                if job.model not in encoders:
                    encoders = {job.model: _encoder_or_error(job)}
                encoder = encoders[job.model]
                if isinstance(encoder, NecoBenchError):
                    raise encoder
                cost = estimate(job, encoder)
            except NecoBenchError as error:
                problem = error
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
                "problem": problem and str(problem),
                "exit_code": problem and problem.exit_code,
            }
        )
    return rows


def estimate(job: Job, encoder: Encoder) -> Estimate | None:
    """The estimate of a job; None where its family, a plug-in's, has no `cost`."""
    cost_of = getattr(job.task.module, "cost", None)
    if cost_of is None:
        return None
    check_encoder(job.task, encoder)
    check_fits(job.task, job.draws, encoder, job.options.batch_size)
    settings = settings_for(job.task, encoder)
    costs = [cost_of(settings, data, encoder.stride, encoder.embed_dim) for data in job.draws]
    size = costs[0].size + -costs[0].size % encoder.stride
    size = encoder.nearest_size(size)
    loading = _seconds_to_load(next(iter(job.data.values())), size)
    workers = job.options.workers_used
    images = torch.zeros(min(MEASURED, job.options.batch_size), 3, size, size)
    encoding = _median(lambda: encoder.encode(images)) / len(images)
    # Loading and encoding go on side by side where there are workers, and not on the same cores.
    apart = workers and encoder.device.type != "cpu"
    per_image = max(loading / workers, encoding) if apart else loading + encoding
    rate = _rate(encoder.device, costs[0].width)
    seconds = sum(c.images * per_image + c.operations / rate for c in costs)
    memory = peak_memory_mb() * 2**20 + max(c.memory for c in costs)
    return Estimate(seconds / 3600, memory, max(c.disk for c in costs))


def _encoder_or_error(job: Job) -> Encoder | NecoBenchError:
    try:
        return load_job_encoder(job)
    except NecoBenchError as error:
        return error


def _median(call: Callable[[], object]) -> float:
    """Median seconds of three calls after a first one."""
    call()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _seconds_to_load(dataset: Dataset, size: int) -> float:
    """Seconds per image: reading, decoding and resizing a few of them."""
    start = time.perf_counter()
    if isinstance(dataset, VideoDataset):
        clip = dataset.clip(0)
        for index in range(min(MEASURED, len(clip))):
            resize_image(clip[index].image, size, size)
        return (time.perf_counter() - start) / min(MEASURED, len(clip))
    if isinstance(dataset, ViewDataset):
        views = dataset.image_ids[:MEASURED]
        for view_id in views:
            resize_image(dataset.read_view(view_id).image, size, size)
        return (time.perf_counter() - start) / len(views)
    count = min(MEASURED, len(dataset))
    for index in range(count):
        if isinstance(dataset, (SegmentationDataset, BoxDataset, DenseDataset)):
            resize_image(dataset[index].image, size, size)
        elif isinstance(dataset, PairDataset):
            resize_image(dataset.read_image(dataset.image_ids[index]), size, size)
    return (time.perf_counter() - start) / count


def _rate(device: torch.device, width: int) -> float:
    """Floating-point operations per second of an exact search among vectors of `width`."""
    index = ExactIndex(width, device)
    index.add(torch.rand(8192, width))
    queries = torch.rand(8192, width)
    return 2.0 * 8192**2 * width / _median(lambda: index.search(queries, 8))
