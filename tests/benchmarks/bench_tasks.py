"""Whole tasks with ViT-S/16 at 224 px, against the bare encoder forward over the same images: ratios in one run.

    python tests/benchmarks/bench_tasks.py [--data-root DIR] [--repeats 3] [--device cpu] [--precision fp32]

CamVid's samples, batch size 16, default loading. The forward is timed on batches that are in memory; a task takes
loading, encoding and all the rest. "again": another task on the features that the one before it kept. Medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from neco_bench.core.protocol import find_tasks
from neco_bench.encoders import load_encoder
from neco_bench.encoders.base import Encoder
from neco_bench.features import store
from neco_bench.runner.execute import execute
from neco_bench.runner.job import plan
from neco_bench.runner.options import RunOptions

MODEL, SIZE, BATCH = "timm:vit_small_patch16_224?pretrained=false&seed=0", 224, 16
FIRST: dict[str, dict[str, Any]] = {
    "camvid_ic@hbird-2": {"memory_size": 51_200},
    "camvid_ic@hbird-2 PCA": {"memory_size": 51_200, "search": "PCA256,RFlat"},
    "camvid_linear@neco-1 1 epoch": {"epochs": 1},
    "camvid_cluster_gt@neco-1": {},
    "camvid_knn@capi-1": {},
}
AGAIN = {
    "camvid_overcluster_50@neco-1": "camvid_cluster_gt@neco-1",
    "camvid_cluster_gt@neco-1 kept": "camvid_overcluster_50@neco-1",
}


def seconds(name: str, changes: dict[str, Any], chosen: argparse.Namespace) -> tuple[float, int, dict[str, float]]:
    """Seconds of a task, the images it encodes, and its phases."""
    task = find_tasks([name.split()[0]], {"input_size": SIZE, **changes})[0]
    options = RunOptions(data_root=chosen.data_root, batch_size=BATCH, device=chosen.device, precision=chosen.precision)
    job = plan(MODEL, task, options)
    images = sum(len(data) for data in job.data.values())
    start = time.perf_counter()
    result, _ = execute(job, None)
    taken = time.perf_counter() - start
    if result.status != "ok":
        raise SystemExit(result.error)
    phases = {k: round(v, 1) for k, v in result.timing.items() if k not in ("total", "load_encoder")}
    return taken - result.timing["load_encoder"], images, phases


def bare(encoder: Encoder, images: int) -> float:
    """Seconds of the forward over so many images, without loading."""
    batch = torch.rand(BATCH, 3, SIZE, SIZE)
    start = time.perf_counter()
    for first in range(0, images, BATCH):
        encoder.encode(batch[: images - first]).map.cpu()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("NECO_BENCH_DATA", "../shared/data"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    options = parser.parse_args()
    encoder = load_encoder(MODEL, device=options.device, precision=options.precision)
    bare(encoder, BATCH)
    ratios: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["NECO_BENCH_CACHE"] = folder
            for name, changes in {**FIRST, **{key: {} for key in AGAIN}}.items():
                if name not in AGAIN:
                    for row in store.stored_files():
                        store.remove_file(Path(row["folder"]))
                taken, images, phases = seconds(name, changes, options)
                forward = bare(encoder, images)
                ratios.setdefault(name, []).append(taken / forward)
                print(f"{name}: {taken:.1f} s, forward {forward:.1f} s, {phases}", flush=True)
    for name, values in ratios.items():
        note = f" (again, after {AGAIN[name]})" if name in AGAIN else ""
        print(f"{statistics.median(values):5.2f} of the bare forward: {name}{note}")


if __name__ == "__main__":
    main()
