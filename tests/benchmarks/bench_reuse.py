"""What a second task costs on pixels that a first one has encoded: its share of the first one's time.

    python tests/benchmarks/bench_reuse.py [--data-root DIR] [--pair FIRST,SECOND] [--model SPEC] [--limit N]
        [--repeats 3] [--threads 1] [--device cpu]

Each repeat begins with an empty feature store and runs both tasks, loading of the encoder not counted. The share is
that of the medians, once of the time that passes and once of the seconds of the processor, loading included, which hang
less on what else a machine does. "new": items that a task encoded itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from neco_bench.core.protocol import find_tasks
from neco_bench.encoders import load_encoder
from neco_bench.runner.execute import execute
from neco_bench.runner.job import plan
from neco_bench.runner.options import RunOptions

MODEL = "timm:deit_small_patch16_224?pretrained=false&seed=0"  # whose statistics are those that neco-1 fixes
PAIRS = (
    "camvid_cluster_gt@neco-1,camvid_cluster_gt@clean-1",  # one mask rule, and normalisation by other words
    "shapes_cluster_gt@neco-1,shapes_cluster_gt@clean-1",
    "shapes_knn@capi-1,shapes_knn@clean-1",  # other masks to score on
)
BOUND = 0.2


def run_once(task: str, chosen: argparse.Namespace) -> tuple[float, float, str]:
    """Seconds that pass, seconds of the processor, and what the task did beside encoding."""
    (found,) = find_tasks([task], data_root=chosen.data_root)
    options = RunOptions(data_root=chosen.data_root, device=chosen.device, limit=chosen.limit)
    job = plan(chosen.model, found, options)
    begin, used = time.perf_counter(), time.process_time()
    result, _ = execute(job, None)
    taken, used = time.perf_counter() - begin, time.process_time() - used
    if result.status != "ok":
        raise SystemExit(result.error)
    phases = {name: round(seconds, 1) for name, seconds in result.timing.items() if name != "total"}
    new = sum(len(data) for data in job.data.values()) - result.provenance["features_reused"]
    loading = result.timing.get("load_encoder", 0.0)
    return taken - loading, used, f"{new} new, {phases}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("NECO_BENCH_DATA", "../shared/data"))
    parser.add_argument("--pair", action="append")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    load_encoder(chosen.model, device=chosen.device)  # imports what it needs
    for pair in chosen.pair or PAIRS:
        times: list[tuple[float, ...]] = []
        for _ in range(chosen.repeats):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["NECO_BENCH_CACHE"] = folder
                row: list[float] = []
                for task in pair.split(","):
                    taken, used, note = run_once(task, chosen)
                    row += [taken, used]
                    print(f"{task}: {taken:.1f} s, processor {used:.1f} s, {note}", flush=True)
                times.append(tuple(row))
        first, first_used, second, second_used = (statistics.median(column) for column in zip(*times, strict=True))
        share, share_used = second / first, second_used / first_used
        print(f"{pair}: {share:.2f} of the first, {share_used:.2f} of its processor time; {BOUND}: {share <= BOUND}")


if __name__ == "__main__":
    main()
