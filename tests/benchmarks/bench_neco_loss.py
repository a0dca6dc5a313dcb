"""NeCo loss, forward and backward, against plain dense matrices with autograd: ratios of time and peak memory.

Two baselines: `mixes` multiplies by one (rows, n, n) matrix per layer; `selections` takes the wires of a layer out and
puts them back by (n, comparators) matrices of zeros and ones, as diffsort does.

    python tests/benchmarks/bench_neco_loss.py [--threads 2] [--repeats 3]

Every measurement is a process of its own, the variants in turn; the printed numbers are medians over the processes.
Seconds: the median of three calls after a warm-up. Peak memory: the highest resident set (ru_maxrss) less that after
imports, inputs and warm-up on 64 rows.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time

ROWS, VALUES, STEEPNESS = (1024, 3136), 49, 100.0


def measure(variant: str, rows: int, threads: int) -> dict[str, float]:
    import torch

    from neco_bench.training.loss import neco_loss
    from neco_bench.training.sorting import comparators

    def mixes(x: torch.Tensor) -> torch.Tensor:
        permutation = torch.eye(VALUES).expand(len(x), -1, -1)
        for layer in comparators("bitonic", VALUES):
            a, c = (torch.tensor(wires) for wires in zip(*layer, strict=True))
            alpha = 0.5 + torch.atan(STEEPNESS * (x[:, c] - x[:, a])) / math.pi
            mix = torch.eye(VALUES).repeat(len(x), 1, 1)
            mix[:, a, a] = mix[:, c, c] = alpha
            mix[:, a, c] = mix[:, c, a] = 1 - alpha
            x, permutation = (x[:, None] @ mix)[:, 0], permutation @ mix
        return permutation

    def selections(x: torch.Tensor) -> torch.Tensor:
        columns = torch.cat((x[:, None], torch.eye(VALUES).expand(len(x), -1, -1)), 1)
        for layer in comparators("bitonic", VALUES):
            a, c = (torch.eye(VALUES)[:, list(wires)] for wires in zip(*layer, strict=True))
            idle = torch.diag(1 - a.sum(1) - c.sum(1))
            low, high = columns @ a, columns @ c
            alpha = 0.5 + torch.atan(STEEPNESS * (high[:, :1] - low[:, :1])) / math.pi
            least, most = alpha * low + (1 - alpha) * high, (1 - alpha) * low + alpha * high
            columns = least @ a.T + most @ c.T + columns @ idle
        return columns[:, 1:]

    def dense_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        sort = {"mixes": mixes, "selections": selections}[variant]
        with torch.no_grad():
            target = sort(teacher)
        return -(target * sort(student).log()).sum(-1).mean()

    torch.set_num_threads(threads)
    loss = neco_loss if variant == "ours" else dense_loss
    student, teacher = torch.randn(2, rows, VALUES, generator=torch.Generator().manual_seed(0)) * 0.1
    student.requires_grad_()

    def step(count: int) -> float:
        start = time.perf_counter()
        value = loss(student[:count], teacher[:count])
        torch.autograd.grad(value, student)
        return time.perf_counter() - start

    step(64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = statistics.median(step(rows) for _ in range(3))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "peak_mb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.threads)))
        return
    for rows in ROWS:
        found: dict[str, list[dict[str, float]]] = {"mixes": [], "selections": [], "ours": []}
        for _ in range(options.repeats):
            for variant, results in found.items():
                command = [sys.executable, __file__, "--threads", str(options.threads), "--one", variant, str(rows)]
                results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        medians = {
            variant: {key: statistics.median(result[key] for result in results) for key in ("seconds", "peak_mb")}
            for variant, results in found.items()
        }
        ours = medians.pop("ours")
        print(f"M = {rows}, n = {VALUES}, {options.threads} threads: {ours['seconds'] * 1000:.0f} ms, ", end="")
        print(f"{ours['peak_mb']:.0f} MB")
        for variant, dense in medians.items():
            print(
                f"  {variant}: {dense['seconds'] * 1000:.0f} ms, {dense['peak_mb']:.0f} MB: "
                f"{dense['seconds'] / ours['seconds']:.1f} times as long, "
                f"{dense['peak_mb'] / max(ours['peak_mb'], 0.1):.0f} times as much memory"
            )


if __name__ == "__main__":
    main()
