"""Search among 1, 3 and 10 million generated keys: seconds to build, seconds per query, recall, peak memory.

    python tests/benchmarks/bench_large_bank.py [--millions 1 3 10] [--queries 20000]
        [--kind ivf] [--device cpu]

Keys of 384 dimensions, unit length, in 2,000 clusters of unequal size, whose members differ in 32 directions, and a
little in all; queries are drawn as they are. Each bank is a process of its own; peak memory is the highest resident set
of the process, imports included, and on a GPU what was held there too. But for --kind exact, the keys pass through a
file in the cache folder (NECO_BENCH_CACHE), 1.5 GB per million.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

WIDTH, CLUSTERS, DIRECTIONS, NEIGHBOURS = 384, 2_000, 32, 30


def measure(kind: str, keys: int, queries: int, device_name: str) -> dict[str, object]:
    import torch

    from neco_bench.search.approximate import ApproximateIndex
    from neco_bench.search.exact import ExactIndex

    device = torch.device(device_name)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLUSTERS, WIDTH, generator=generator)
    directions = torch.randn(DIRECTIONS, WIDTH, generator=generator)
    weights = torch.rand(CLUSTERS, generator=generator) ** 2

    def draw(count: int) -> torch.Tensor:
        picked = torch.multinomial(weights, count, replacement=True, generator=generator)
        inside = 0.1 * torch.randn(count, DIRECTIONS, generator=generator) @ directions
        noise = 0.1 * torch.randn(count, WIDTH, generator=generator)
        return torch.nn.functional.normalize(centres[picked] + inside + noise, dim=1)

    index = ExactIndex(WIDTH, device, capacity=keys) if kind == "exact" else ApproximateIndex(kind, WIDTH)
    for _ in range(keys // 100_000):
        index.add(draw(100_000))
    asked = draw(queries)
    index.search(asked[:4096], NEIGHBOURS)  # builds it
    start = time.perf_counter()
    for part in asked.split(4096):
        index.search(part, NEIGHBOURS)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    facts = {"keys": keys, "ms_per_query": 1000 * seconds / queries, "peak_gib": peak, **index.facts}
    if device.type == "cuda":
        facts["peak_gib_on_gpu"] = torch.cuda.max_memory_allocated(device) / 2**30
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 3, 10])
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--kind", default="ivf", help="exact, ivf, ivfpq or a factory string of FAISS")
    parser.add_argument("--device", default="cpu", help="of exact search")
    parser.add_argument("--keys", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.keys:
        print(json.dumps(measure(options.kind, options.keys, options.queries, options.device)))
        return
    for millions in options.millions:
        command = [sys.executable, __file__, "--kind", options.kind, "--keys", str(millions * 10**6)]
        command += ["--queries", str(options.queries), "--device", options.device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout.strip() if not done.returncode else done.stderr, flush=True)


if __name__ == "__main__":
    main()
