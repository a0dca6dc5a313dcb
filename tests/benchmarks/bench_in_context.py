"""In-context retrieval end to end against a plain baseline that does what the reference does: ratios in one run.

    python tests/benchmarks/bench_in_context.py [--data-root DIR] [--repeats 3] [--reference CHECKOUT]

camvid_ic under hbird-2: 320 px, stride 16, CamVid's full memory of 102,400 patches, a 384-dimensional encoder with a
cheap forward. Of fewer images than CamVid's 367 each is augmented as often as it takes to fill the memory. The baseline
searches each batch with FAISS flat, gathers the keys of the neighbours again to weigh them, keeps one-hot masks and all
predictions. Every measurement is a process of its own, the variants in turn; medians are printed. Peak memory: the
highest resident set less that after the imports.

--reference: a checkout of vpariza/open-hummingbird-eval (v2.0.0, package `hbird`), whose `hbird_evaluation` is then
measured too and is what the others are compared with. Its code is used as it is but for three things: the FAISS index,
which needs GPUs, is `IndexFlatIP` on the CPUs; CamVid, which it does not know, comes from here by Pillow, through its
own transforms and as many loading processes as there are cores; and where `pytorch_lightning` is not installed, from
which it derives its data modules, an empty class takes its place. It draws other random numbers than the others.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import random
import resource
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

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
MEMORY = 102_400  # patches


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
    per_image = max(1, settings.memory_size // (len(train) * settings.passes))

    def augment(sample: Sample, rng: np.random.Generator) -> tuple[Any, np.ndarray]:
        image = Image.fromarray(sample.image)
        for adjust, centre in jitters:
            apply, change = rng.random() < settings.jitter_probability, rng.uniform(-settings.jitter, settings.jitter)
            if apply:
                image = adjust(image, centre + change)
        top, left, height, width = crop_box(rng, sample.mask.shape, settings.crop_scale, settings.crop_ratio)
        image = tvf.resized_crop(to_tensor(image), top, left, height, width, [size, size], antialias=True)
        return image, resize_nearest_torch(sample.mask[top : top + height, left : left + width], size, size)

    def batches(dataset: SegmentationDataset, transform: Callable[..., Any], epoch: int) -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(dataset), 16):
            samples = [dataset[i] for i in range(start, min(start + 16, len(dataset)))]
            rows = [transform(s, item_rng(0, "augment", epoch, s.id)) for s in samples]
            images = torch.stack([image for image, _ in rows])
            maps = encoder.encode(images, mean=settings.mean, std=settings.std).map
            yield samples, maps.flatten(2).transpose(1, 2), [mask for _, mask in rows]

    parts: list[Any] = []
    shares_of_parts: list[Any] = []
    augmented = ((epoch, batch) for epoch in range(settings.passes) for batch in batches(train, augment, epoch))
    for epoch, (samples, features, masks) in augmented:
        for sample, tokens, mask in zip(samples, features, masks, strict=True):
            ids = torch.from_numpy(mask).long()
            ids[ids == 255] = 0
            hot = F.one_hot(ids, classes).float().unfold(0, stride, stride).unfold(1, stride, stride)
            share = hot.flatten(3).mean(3).flatten(0, 1)
            noise = item_rng(0, "memory", epoch, sample.id).random(len(share), "float32")
            chosen = torch.from_numpy(choose_patches(share.numpy(), noise, per_image))
            parts.append(F.normalize(tokens[chosen], dim=1))
            shares_of_parts.append(share[chosen])
    keys, labels = torch.cat(parts), torch.cat(shares_of_parts)
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys.numpy())
    predictions, truths = [], []
    for samples, features, masks in batches(val, ResizeSquare(size, "torch"), 0):
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


class FlatSearch:
    """What replaces the reference's FAISS class: the same search on CPUs."""

    def __init__(self, feature_memory: Any, n_neighbors: int = 30, **_: Any) -> None:
        import faiss

        self.n_neighbors = n_neighbors
        self.index = faiss.IndexFlatIP(feature_memory.shape[1])
        self.index.add(feature_memory.numpy())

    def find_nearest_neighbors(self, queries: Any, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Indices and inner products, (N, k) each."""
        products, indices = self.index.search(queries.cpu().numpy(), k or self.n_neighbors)
        return indices, products


class CamVidData:
    """CamVid as the reference takes data sets. transforms: by split, from an image and a mask of Pillow to tensors."""

    def __init__(self, sets: dict[str, Any], transforms: dict[str, Any], batch_size: int, workers: int) -> None:
        self.sets, self.transforms, self.batch_size, self.workers = sets, transforms, batch_size, workers

    def get_train_dataset_size(self) -> int:
        return len(self.sets["train"])

    def get_num_classes(self) -> int:
        return len(self.sets["train"].classes)

    def train_dataloader(self) -> Any:
        return self._loader("train")

    def val_dataloader(self) -> Any:
        return self._loader("val")

    def _loader(self, split: str) -> Any:
        return DataLoader(
            PillowPairs(self.sets[split], self.transforms[split]), self.batch_size, num_workers=self.workers
        )


class PillowPairs(Dataset):
    """Images and masks of a data set through a transform of both."""

    def __init__(self, dataset: Any, transform: Callable[..., Any]) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        with Image.open(self.dataset.files(self.dataset.ids[index])[0]) as image:
            return self.transform(image.convert("RGB"), Image.fromarray(self.dataset.mask(index)))


def import_reference(checkout: Path) -> Any:
    """The module `hbird.hbird_eval` of a checkout, with its index on CPUs."""
    if importlib.util.find_spec("pytorch_lightning") is None:
        lightning: Any = ModuleType("pytorch_lightning")
        lightning.LightningDataModule = lightning.LightningModule = type("Empty", (), {})
        sys.modules["pytorch_lightning"] = lightning
    sys.path.insert(0, str(checkout))
    try:
        module = importlib.import_module("hbird.hbird_eval")
        search: Any = importlib.import_module("hbird.nn.search_faiss")
        for name in ("hbird_evaluation", "get_dataset"):
            getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"--reference {checkout}: its code cannot be used: {error}. Give v2.0.0.") from error
    search.NearestNeighborSearchFaiss = FlatSearch
    return module


def reference(module: Any, net: Any, sets: dict[str, Any], settings: Any) -> float:
    """The mIoU of the reference's `hbird_evaluation`."""
    import torch

    def get_dataset(name: str, folder: str, batch_size: int, workers: int, train: Any, val: Any, *_: Any) -> Any:
        return CamVidData(sets, {"train": train, "val": val}, batch_size, workers), 255

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the generators that the reference draws from
    torch.manual_seed(0)
    module.get_dataset = get_dataset
    miou = module.hbird_evaluation(
        net,
        d_model=net.embed_dim,
        patch_size=net.stride,
        dataset_name="camvid",
        data_dir="",
        input_size=settings.input_size_for(net.stride),
        augmentation_epoch=settings.passes,
        n_neighbours=settings.neighbours,
        nn_method="faiss",
        ftr_extr_fn=lambda model, images: (model(images).flatten(2).transpose(1, 2), None),
        memory_size=settings.memory_size,
        num_workers=os.cpu_count() or 1,
    )
    return float(miou)


def fill(images: int, memory: int, patches: int) -> int:
    """How often images of so many patches are to be augmented for a memory of so many."""
    return -(-memory // (images * patches))


def measure(variant: str, root: str, checkout: Path | None = None) -> dict[str, object]:
    import faiss  # noqa: F401
    from neco_bench.tasks.in_context import task

    from neco_bench.core.protocol import find_tasks
    from neco_bench.encoders import load_encoder
    from neco_bench.features import transforms  # imports take as long for the baseline, and are not what is measured
    from neco_bench.runner.execute import execute
    from neco_bench.runner.job import plan
    from neco_bench.runner.options import RunOptions

    spec = str(Path(os.environ["ENCODER_FILE"])) + ":cheap"
    encoder, options = load_encoder(spec, device="cpu"), RunOptions(data_root=Path(root), workers=0)
    changes: dict[str, Any] = {"memory_size": MEMORY} | ({"search": APPROXIMATE} if variant == "fast" else {})
    chosen = find_tasks(["camvid_ic@hbird-2"], changes)[0]
    job = plan(spec, chosen, options)
    size = chosen.settings().input_size_for(encoder.stride)
    passes = fill(len(job.data["train"]), MEMORY, (size // encoder.stride) ** 2)
    if passes > 1:
        chosen = find_tasks(["camvid_ic@hbird-2"], {**changes, "passes": passes})[0]
        job = plan(spec, chosen, options)
    settings = chosen.settings()
    assert task
    assert transforms
    module: Any = import_reference(checkout) if variant == "reference" and checkout else None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    report: dict[str, object] = {"passes": passes}
    if variant == "baseline":
        miou = baseline(encoder, job.data["train"], job.data["val"], settings)
    elif module:
        miou = reference(module, runpy.run_path(spec.removesuffix(":cheap"))["cheap"](), dict(job.data), settings)
    else:
        result, _ = execute(job, encoder)
        if result.status != "ok":
            raise SystemExit(result.error)
        miou = result.metrics["mIoU"]
        report |= {"phases": {k: round(v, 2) for k, v in result.timing.items()}, **result.provenance["run"]}
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "peak_mb": peak, "miou": miou, **report}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options; --reference without the package ends with an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default=os.environ.get("NECO_BENCH_DATA", "../shared/data"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reference", type=Path, metavar="CHECKOUT")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.reference and not (options.reference / "hbird" / "hbird_eval.py").is_file():
        parser.error(
            f"--reference {options.reference}: there is no hbird/hbird_eval.py in it. Give a checkout of "
            f"vpariza/open-hummingbird-eval, v2.0.0."
        )
    return options


def main() -> None:
    options = arguments()
    if options.variant:
        print(json.dumps(measure(options.variant, options.data_root, options.reference)))
        return
    import tempfile

    variants = (*(["reference"] if options.reference else []), "baseline", "exact", "fast")
    further = ["--reference", str(options.reference)] if options.reference else []
    runs: dict[str, list[dict]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cheap.py")
        file.write_text(ENCODER)
        for _ in range(options.repeats):
            for name in variants:
                command = [sys.executable, __file__, "--variant", name, "--data-root", options.data_root, *further]
                environment = {**os.environ, "ENCODER_FILE": str(file)}
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                if done.returncode:
                    raise SystemExit(done.stderr)
                runs[name].append(json.loads(done.stdout))
    middle = {n: {k: statistics.median(r[k] for r in rows) for k in ("seconds", "peak_mb")} for n, rows in runs.items()}
    base = middle[variants[0]]
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
