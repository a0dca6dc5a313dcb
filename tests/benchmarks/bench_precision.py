"""Scores in fp32 and in bf16, paired: how far the precision of the encoder moves each family.

    python tests/benchmarks/bench_precision.py [--model SPEC] [--task NAME[@PROTOCOL][;KEY=VALUE...]] [--device cpu]
        [--data-root DIR] [--precision bf16] [--seed 0] [--threads 1] [--out DIR]

--model and --task may be given several times. Each model runs each task in both precisions on the same items, without
stored features, and the two results are compared as `neco-bench compare` does: the difference with its 95 % interval
over the units of the data set (percent, or the unit of the metric). CPU seconds are those of the whole process, of
which one that shares its machine gives as many as one alone. The table is Markdown; docs/pages/precision.md
holds that of the defaults. With --out, what is stored there is not run again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch

import neco_bench
from neco_bench.core import config
from neco_bench.core.protocol import find_tasks
from neco_bench.reports.compare import ComparisonRow, compare_tasks, find_pairs
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore

MODELS = ("tiny_neco", "timm:vit_tiny_patch16_224?pretrained=false&seed=0", "tiny_base")
# Every family on its generated data, `clean-1` where it has that; those that train heads are shortened.
TASKS = (
    "shapes_ic@clean-1",
    "shapes_knn@clean-1",
    "shapes_logreg@clean-1",
    "shapes_cluster_gt@clean-1",
    "shapes_overcluster_50@clean-1",
    "shapes_discovery@clean-1",
    "shapes_correspondence",
    "shapes_views@clean-1",
    "shapes_vos@clean-1",
    "shapes_unsup@clean-1",
    "shapes_depth@clean-1;iterations=30",
    "shapes_normals@clean-1;iterations=30",
    "shapes_linear@clean-1;epochs=4;batch_size=32;learning_rate=0.1",
    "shapes_finetune@clean-1;epochs=1",
)
LIMIT = 0.1  # of a score in percent, below which a precision makes no difference to a table with one digit


def run_once(model: str, task: str, precision: str, chosen: argparse.Namespace) -> Result:
    """The result of one task, from the store or new."""
    name, *pairs = task.split(";")
    begin = time.process_time()
    result = neco_bench.run(
        model,
        name,
        data_root=chosen.data_root,
        out=chosen.out,
        changes=config.parse_changes(pairs),
        device=chosen.device,
        precision=precision,
        seed=chosen.seed,
        features="off",
    )
    assert isinstance(result, Result)
    seconds = chosen.out / f"{result.key[:16]}.seconds"
    if not seconds.exists():
        seconds.write_text(f"{time.process_time() - begin:.1f}")
    return result


def row_text(model: str, row: ComparisonRow, seconds: tuple[str, str]) -> str:
    """The line of the table."""
    scale, change = row.metric.scale, row.difference
    known = not math.isnan(change.low)  # too few units that differ have no interval
    interval = f"[{scale * change.low:+.2f}, {scale * change.high:+.2f}]" if known else ""
    values = [f"{scale * value:.2f}" if value is not None else "" for value in (row.first, row.second)]
    cells = (
        model,
        row.name,
        *values,
        f"{scale * change.value:+.2f}",
        interval,
        f"{row.items} {change.unit}s",
        *seconds,
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append")
    parser.add_argument("--task", action="append")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16", help="compared with fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="results folder; default: a temporary one")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    models, tasks = chosen.model or MODELS, chosen.task or TASKS
    for task in tasks:  # a wrong name is an error now
        find_tasks([task.partition(";")[0]], data_root=chosen.data_root)
    with tempfile.TemporaryDirectory() as folder:
        chosen.out = chosen.out or Path(folder)
        chosen.out.mkdir(parents=True, exist_ok=True)
        store = ResultStore(chosen.out)
        print(f"| model | task | fp32 | {chosen.precision} | difference | 95 % interval | units that differ "
              f"| CPU s fp32 | CPU s {chosen.precision} |\n|{' --- |' * 9}")  # fmt: skip
        largest = 0.0
        for model in models:
            for task in tasks:
                results = [run_once(model, task, name, chosen) for name in ("fp32", chosen.precision)]
                (pair,) = find_pairs([store], results[0].key, results[1].key, [])
                (row,) = compare_tasks([pair])
                used = [(chosen.out / f"{result.key[:16]}.seconds").read_text() for result in results]
                print(row_text(model, row, (used[0], used[1])), flush=True)
                if row.metric.unit == "percent":
                    largest = max(largest, abs(100 * row.difference.value))
    print(f"\nLargest difference of a score in percent: {largest:.2f}; within {LIMIT}: {largest <= LIMIT}")


if __name__ == "__main__":
    main()
