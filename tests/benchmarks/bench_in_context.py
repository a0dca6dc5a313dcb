"""In-context retrieval end to end against a plain baseline that does what the reference does: ratios in one run.

    python tests/benchmarks/bench_in_context.py [--data-root DIR] [--repeats 3]

camvid_ic under hbird-2: 320 px, stride 16, CamVid's full memory of 102,400 patches, a 384-dimensional encoder with a
cheap forward. The baseline searches each batch with FAISS flat, gathers the keys of the neighbours again to weigh them,
keeps one-hot masks and all predictions. Every measurement is a process of its own, the variants in turn; medians are
printed. Peak memory: the highest resident set less that after the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from neco_bench.data.base import Sample, SegmentationDataset
from neco_bench.encoders import Encoder

ENCODER = """
import torch
from torch import nn

def cheap():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 384, 16, 16), nn.GELU(), nn.Conv2d(384, 384, 1))
    net.embed_dim, net.stride = 384, 16
    return net
"""


APPROXIMATE = "PCA256,RFlat"  # of the variant "fast"


def baseline(encoder: Encoder, train: Any, val: Any, settings: Any) -> float:
    import faiss
    import torch
    import torch.nn.functional as F
    import torchvision.transforms.v2.functional as tvf
    from neco_bench.tasks.in_context.memory import choose_patches
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    from neco_bench.core.rng import item_rng
    from neco_bench.features.transforms import ResizeSquare, crop_box, resize_nearest_torch
    from neco_bench.metrics import segmentation

    size, stride, classes = settings.input_size_for(encoder.stride), encoder.stride, len(train.classes)
    jitters = ((tvf.adjust_brightness, 1), (tvf.adjust_contrast, 1), (tvf.adjust_saturation, 1), (tvf.adjust_hue, 0))
    per_image = max(1, settings.memory_size // len(train))

    def augment(sample: Sample, rng: np.random.Generator) -> tuple[Any, np.ndarray]:
        image = Image.fromarray(sample.image)
        for adjust, centre in jitters:
            apply, change = rng.random() < settings.jitter_probability, rng.uniform(-settings.jitter, settings.jitter)
            if apply:
                image = adjust(image, centre + change)
        top, left, height, width = crop_box(rng, sample.mask.shape, settings.crop_scale, settings.crop_ratio)
        image = tvf.resized_crop(to_tensor(image), top, left, height, width, [size, size], antialias=True)
        return image, resize_nearest_torch(sample.mask[top : top + height, left : left + width], size, size)

    def batches(dataset: SegmentationDataset, transform: Callable[..., Any]) -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(dataset), 16):
            samples = [dataset[i] for i in range(start, min(start + 16, len(dataset)))]
            rows = [transform(s, item_rng(0, "augment", 0, s.id)) for s in samples]
            images = torch.stack([image for image, _ in rows])
            maps = encoder.encode(images, mean=settings.mean, std=settings.std).map
            yield samples, maps.flatten(2).transpose(1, 2), [mask for _, mask in rows]

    parts: list[Any] = []
    shares_of_parts: list[Any] = []
    for samples, features, masks in batches(train, augment):
        for sample, tokens, mask in zip(samples, features, masks, strict=True):
            ids = torch.from_numpy(mask).long()
            ids[ids == 255] = 0
            hot = F.one_hot(ids, classes).float().unfold(0, stride, stride).unfold(1, stride, stride)
            share = hot.flatten(3).mean(3).flatten(0, 1)
            noise = item_rng(0, "memory", 0, sample.id).random(len(share), "float32")
            chosen = torch.from_numpy(choose_patches(share.numpy(), noise, per_image))
            parts.append(F.normalize(tokens[chosen], dim=1))
            shares_of_parts.append(share[chosen])
    keys, labels = torch.cat(parts), torch.cat(shares_of_parts)
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys.numpy())
    predictions, truths = [], []
    for samples, features, masks in batches(val, ResizeSquare(size, "torch")):
        queries = features.flatten(0, 1).contiguous()
        _, ids = index.search(queries.numpy(), settings.neighbours)
        neighbours = keys[torch.from_numpy(ids)]
        weights = torch.einsum("qd,qkd->qk", F.normalize(queries, dim=1), neighbours) / settings.temperature
        shares = torch.einsum("qk,qkc->qc", weights.softmax(1), labels[torch.from_numpy(ids)])
        side = size // stride
        shares = shares.view(len(samples), side, side, classes).permute(0, 3, 1, 2)
        predictions.append(F.interpolate(shares, (size, size), mode="bilinear").argmax(1))
        truths += [torch.from_numpy(val.eval_mask(mask)) for mask in masks]
    confusion = segmentation.confusion_matrix(torch.stack(truths).numpy(), torch.cat(predictions).numpy(), classes)
    merged = segmentation.merge_clusters(confusion, segmentation.hungarian_match(confusion))
    return segmentation.mean_iou(merged, absent="zero")


def measure(variant: str, root: str) -> dict[str, object]:
    from pathlib import Path

    import faiss  # noqa: F401
    from neco_bench.tasks.in_context import task

    from neco_bench.core.protocol import find_tasks
    from neco_bench.encoders import load_encoder
    from neco_bench.features import transforms  # imports take as long for the baseline, and are not what is measured
    from neco_bench.runner.execute import execute
    from neco_bench.runner.job import plan
    from neco_bench.runner.options import RunOptions

    changes = {"memory_size": 102_400} | ({"search": APPROXIMATE} if variant == "fast" else {})
    chosen = find_tasks(["camvid_ic@hbird-2"], changes)[0]
    spec = str(Path(os.environ["ENCODER_FILE"])) + ":cheap"
    job = plan(spec, chosen, RunOptions(data_root=Path(root), workers=0))
    encoder, settings = load_encoder(spec, device="cpu"), chosen.settings()
    assert task
    assert transforms
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    report: dict[str, object] = {}
    if variant == "baseline":
        miou = baseline(encoder, job.data["train"], job.data["val"], settings)
    else:
        result, _ = execute(job, encoder)
        if result.status != "ok":
            raise SystemExit(result.error)
        miou = result.metrics["mIoU"]
        report = {"phases": {k: round(v, 2) for k, v in result.timing.items()}, **result.provenance["run"]}
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "peak_mb": peak, "miou": miou, **report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default=os.environ.get("NECO_BENCH_DATA", "../shared/data"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.data_root)))
        return
    import tempfile
    from pathlib import Path

    variants = ("baseline", "exact", "fast")
    runs: dict[str, list[dict]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cheap.py")
        file.write_text(ENCODER)
        for _ in range(options.repeats):
            for name in variants:
                command = [sys.executable, __file__, "--variant", name, "--data-root", options.data_root]
                environment = {**os.environ, "ENCODER_FILE": str(file)}
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                if done.returncode:
                    raise SystemExit(done.stderr)
                runs[name].append(json.loads(done.stdout))
    middle = {n: {k: statistics.median(r[k] for r in rows) for k in ("seconds", "peak_mb")} for n, rows in runs.items()}
    base = middle["baseline"]
    for name, rows in runs.items():
        own = middle[name]
        print(
            f"{name:9s} {own['seconds']:6.1f} s  {base['seconds'] / own['seconds']:4.1f} times as fast   "
            f"{own['peak_mb']:6.0f} MB  {own['peak_mb'] / base['peak_mb']:5.2f} of the memory   "
            f"mIoU {100 * rows[0]['miou']:.3f}"
        )
        print(f"          { ({k: v for k, v in rows[-1].items() if k not in ('seconds', 'peak_mb', 'miou')}) }")


if __name__ == "__main__":
    main()
