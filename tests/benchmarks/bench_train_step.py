"""The NeCo training step against the bare backbone: which share of a step is spent outside its forward and backward.
Also how much faster a step would be with a fused optimizer.

    python tests/benchmarks/bench_train_step.py [--threads 2] [--repeats 5] [--size 224] [--batch 8]
        [--precision fp32] [--device cpu]

ViT-S/16 with random weights on generated images, views and all. Whole steps of the trainer (loading, student, teacher,
heads, alignment, sorting, loss, moving average, optimizer) and bare ones (student forward and backward on all views,
teacher forward on the global ones) in turn, in one process; the share is 1 - bare / whole of the medians. The
optimizer's own step, AdamW as it is and with fused=True, is timed on the same parameters and gradients in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from neco_bench.training.batches import Order, loader
from neco_bench.training.images import open_images
from neco_bench.training.options import TrainOptions
from neco_bench.training.recipe import Recipe
from neco_bench.training.trainer import Processes, Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--queue", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of both")
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    recipe = Recipe(
        base="timm:vit_small_patch16_224?pretrained=false",
        batch_size=chosen.batch,
        global_size=chosen.size,
        local_size=96,
        queue_length=chosen.queue,
        steps=chosen.repeats + 1,
        precision=chosen.precision,
    )
    with tempfile.TemporaryDirectory() as folder:
        options = TrainOptions(out=Path(folder), data="shapes:160")
        run = Trainer(recipe, options, open_images(options.data), Processes(device))
    order = Order(len(run.images), recipe, 0, recipe.steps or 0, 0, chosen.batch)
    batches = iter(loader(run.images, recipe, order, chosen.workers, device.type == "cuda"))
    sizes = (2, chosen.size), (4, 96)
    groups = [torch.randn(count * chosen.batch, 3, size, size, device=device) for count, size in sizes]

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def bare() -> float:
        start = now()
        with torch.autocast(device.type, torch.bfloat16, enabled=chosen.precision == "bf16"):
            assert run.teacher is not None
            with torch.no_grad():
                run.teacher._run(groups[0], False)
            means = [run.student._run(images, False).map.float().mean() for images in groups]
        sum(means).backward()
        taken = now() - start
        run.optimizer.zero_grad(set_to_none=True)
        return taken

    def whole(step: int) -> float:
        start = now()
        run.step(step, batches, 0.9995)
        return now() - start

    times = [(whole(step), bare()) for step in range(chosen.repeats + 1)][1:]
    step, backbone = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"batch {chosen.batch}, {chosen.size} px, {chosen.threads} threads, {device.type}, {chosen.precision}: "
        f"step {step:.3f} s, backbone {backbone:.3f} s"
    )
    print(f"outside the backbone's forward and backward: {1 - backbone / step:.1%}")
    for parameter in run.student.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    kinds = [torch.optim.AdamW(run.student.parameters(), lr=1e-6, fused=fused) for fused in (None, True)]

    def update(optimizer: torch.optim.Optimizer) -> float:
        start = now()
        optimizer.step()
        return now() - start

    updates = [[update(kind) for kind in kinds] for _ in range(chosen.repeats + 1)][1:]
    plain, fused = (statistics.median(column) for column in zip(*updates, strict=True))
    ratio = step / (step - plain + fused)
    print(f"optimizer {plain:.4f} s, fused {fused:.4f} s: a step would be {ratio:.3f} times as fast")


if __name__ == "__main__":
    main()
