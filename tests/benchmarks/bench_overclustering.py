"""Overclustering of a VOC-sized set: what matching and the rest take beside k-means itself.

    python tests/benchmarks/bench_overclustering.py [--images 1449] [--device cpu]

Generated images, 32 x 32 tokens of 384 dimensions, masks of 100 x 100, K = 500, five seeds. Seconds of each phase
of one run, and the total without loading and encoding as a multiple of k-means.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from bench_memory import make
from torch import nn

from neco_bench.core.protocol import find_tasks
from neco_bench.encoders.base import DenseFeatures, Encoder
from neco_bench.runner.execute import execute
from neco_bench.runner.job import plan
from neco_bench.runner.options import RunOptions


class Cheap(Encoder):
    """A random projection of 2 x 2 pixels to 384 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self.embed_dim, self.stride, self.weights_id = "cheap", 384, 2, "cheap"
        self.net = nn.Conv2d(3, 384, 2, 2)

    def _encode(self, images: torch.Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        return DenseFeatures(self.net(images), self.stride)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1449)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.images)
        task = find_tasks(["camvid_overcluster_50@neco-1"], {"input_size": 64, "clusters": 500})[0]
        job = plan("cheap", task, RunOptions(data_root=Path(folder), workers=0), identity="cheap")
        result, _ = execute(job, Cheap().to(options.device))
        if result.status != "ok":
            raise SystemExit(result.error)
    phases = dict(result.timing)
    rest = phases["total"] - phases["load"] - phases["encode"]
    print({name: round(seconds, 1) for name, seconds in phases.items()})
    print(f"matching {phases['match']:.1f} s; {rest / phases['kmeans']:.2f} times k-means, loading and encoding aside")


if __name__ == "__main__":
    main()
