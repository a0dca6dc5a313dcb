"""Linear segmentation: a 1x1 convolution on frozen patch features.

Protocol of NeCo's `linear_finetune.py` (`neco-1`, quirks included; Pariza et al., ICLR 2025, table 2) and without its
quirks (`clean-1`). README.md lists them. The encoder sees every augmented training image once per epoch.

Known deviations from the reference: augmentation and order are drawn per (epoch, image), not from a global stream.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from neco_bench.tasks.linear_segmentation.augment import CropFlip
from neco_bench.tasks.linear_segmentation.heads import ProbeOptions, classify, new_head, train_probe
from neco_bench.tasks.linear_segmentation.settings import Settings

from neco_bench.core import distributed
from neco_bench.core.errors import UsageError
from neco_bench.core.rng import item_rng
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import IGNORE, SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import stream
from neco_bench.features.transforms import ResizeSquare, resize_nearest_torch
from neco_bench.metrics import bootstrap, segmentation


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """What `run` will take: every training image once per epoch, with the head's forward and backward pass."""
    size, classes = settings.used_size(stride), len(data["val"].classes)
    views, side = settings.epochs * len(data["train"]), settings.train_mask_size
    grid = len(settings.rates) * settings.probe_seeds
    per_view = 6.0 * grid * classes * (dimension * (size // stride) ** 2 + 8 * side**2)
    heads = grid * (settings.epochs if settings.select == "best" else 1)
    batch = min(settings.batch_size, len(data["train"]))
    activations = batch * (dimension * (size // stride) ** 2 + 4 * grid * classes * side**2)
    scored = 2 * classes * (settings.score_size or 0) ** 2
    return Cost(
        images=views + len(data["val"]),
        size=size,
        width=dimension,
        operations=views * per_view,
        memory=4.0 * (activations + scored) + 4.0 * len(data["val"]) * classes**2 + 4.0 * heads * classes * dimension,
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """mIoU of a linear head trained on data["train"], scored on data["val"]."""
    train, val = data["train"], data["val"]
    classes = len(train.classes)
    size = settings.used_size(encoder.stride)
    order = training_order(len(train), settings, context.seed)
    seeds = range(context.seed, context.seed + settings.probe_seeds)
    heads = [new_head(encoder.embed_dim, classes, seed, encoder.device) for _ in settings.rates for seed in seeds]
    rates = [rate for rate in settings.rates for _ in seeds]
    options = ProbeOptions(settings.momentum, settings.weight_decay, settings.decay, settings.decay_epochs)
    epochs = _epochs(encoder, train, order, size, settings, context)
    snapshots = train_probe(heads, rates, epochs, options, ignore=IGNORE)
    if settings.select == "last":
        snapshots = snapshots[-1:]
    candidates = [head for snapshot in snapshots for head in snapshot]
    confusions = [segmentation.ImageConfusions(classes) for _ in candidates]
    scored = len(val) // settings.batch_size * settings.batch_size if settings.drop_last_val else len(val)
    if not scored:
        raise UsageError(
            f"drop_last_val leaves none of the {len(val)} val images at batch_size "
            f"{settings.batch_size}. Use --set drop_last_val=false, or the clean-1 protocol."
        )
    transform = ResizeSquare(size, "centre" if settings.score_size else "native")
    positions: list[int] = []
    for batch in stream(
        encoder,
        val,
        transform,
        context,
        "score",
        items=[(0, i) for i in range(scored)],
        own=True,
        mean=settings.mean,
        std=settings.std,
    ):
        positions += batch.positions
        with context.phase("predict"), torch.no_grad():
            for row, mask in enumerate(batch.masks):
                if settings.score_size:
                    mask = resize_nearest_torch(mask, settings.score_size, settings.score_size)
                predictions = classify(candidates, batch.features[row], *mask.shape).cpu().numpy()
                truth = val.scored(mask)
                for confusion, predicted in zip(confusions, predictions, strict=True):
                    confusion.add(truth, predicted)
                name = val.ids[batch.positions[row]]
                if name in context.watched:
                    features = batch.features[row].cpu()
                    context.seen[name] = {"features": features, "truth": truth, "prediction": predictions}

    numbers = distributed.gather(positions)
    confusions = [segmentation.ImageConfusions.joined(distributed.gather(c), numbers) for c in confusions]
    scores = np.array([segmentation.mean_iou(c.total(), absent=settings.absent) for c in confusions])
    scores = scores.reshape(len(snapshots), len(settings.rates), len(seeds))
    means = scores.mean(2)
    epoch, rate = (int(i) for i in np.unravel_index(np.argmax(means), means.shape))
    first = int(np.ravel_multi_index((epoch, rate, 0), scores.shape))
    for seen in context.seen.values():
        seen["prediction"] = seen["prediction"][first]
    per_image = np.stack([confusion.per_image() for confusion in confusions[first : first + len(seeds)]])
    totals = per_image.sum(1)
    context.notes |= {"epoch_reported": settings.epochs - len(snapshots) + epoch + 1, "scored_images": scored}
    if settings.learning_rates:
        by_rate = dict(zip(map(str, settings.rates), means.max(0).tolist(), strict=True))
        context.notes |= {"learning_rate_reported": settings.rates[rate], "mIoU_by_learning_rate": by_rate}
    return Outcome(
        metrics={
            "mIoU": float(means[epoch, rate]),
            "mIoU_last_epoch": float(means[-1, rate]),
            "mIoU_present": float(np.mean([segmentation.mean_iou(total, absent="exclude") for total in totals])),
            "pixel_accuracy": float(np.mean([np.trace(total) / max(1, total.sum()) for total in totals])),
            **({"mIoU_std": float(scores[epoch, rate].std(ddof=1))} if len(seeds) > 1 else {}),
        },
        per_class={
            "IoU": segmentation.by_class(
                np.stack([segmentation.iou_per_class(t) for t in totals]).mean(0), train.classes
            )
        },
        ci95={"mIoU": bootstrap.bootstrap_miou(per_image, absent=settings.absent, seed=context.seed)},
        n_images=scored,
        statistics={"confusion": per_image if len(seeds) > 1 else per_image[0]},
        features={"input_size": settings.input_size, "used_size": size, "resize": "squash", "final_norm": True},
    )


def training_order(count: int, settings: Settings, seed: int) -> list[list[tuple[int, int]]]:
    """(epoch, index) items of each epoch, without a dropped last batch. Raises UsageError where none is left."""
    kept = count // settings.batch_size * settings.batch_size if settings.drop_last else count
    if not kept:
        raise UsageError(
            f"drop_last leaves none of the {count} training images at batch_size {settings.batch_size}. "
            f"Use --set drop_last=false, or the clean-1 protocol."
        )
    orders = []
    for epoch in range(settings.epochs):
        indices = item_rng(seed, "order", epoch).permutation(count) if settings.shuffle else np.arange(count)
        orders.append([(epoch, int(i)) for i in indices[:kept]])
    return orders


def _epochs(
    encoder: Encoder,
    train: SegmentationDataset,
    order: list[list[tuple[int, int]]],
    size: int,
    settings: Settings,
    context: Context,
) -> Iterator[Iterator[tuple[torch.Tensor, torch.Tensor]]]:
    """For each epoch its probe batches, from one stream over all epochs, so that workers start once."""
    transform = CropFlip(size, settings.crop_scale, settings.crop_ratio, settings.flip_probability)
    rows = _rows(encoder, train, [item for epoch in order for item in epoch], transform, settings, context)
    for epoch in order:
        yield _batches(rows, len(epoch), settings.batch_size)


def _rows(
    encoder: Encoder,
    train: SegmentationDataset,
    items: list[tuple[int, int]],
    transform: CropFlip,
    settings: Settings,
    context: Context,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    side = settings.train_mask_size
    for batch in stream(encoder, train, transform, context, "train", items=items, mean=settings.mean, std=settings.std):
        for features, mask in zip(batch.features, batch.masks, strict=True):
            target = torch.from_numpy(train.scored(resize_nearest_torch(mask, side, side)).astype(np.int64))
            yield features.clone(), target.to(features.device)


def _batches(
    rows: Iterator[tuple[torch.Tensor, torch.Tensor]], count: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, count, batch_size):
        features, targets = zip(*(next(rows) for _ in range(min(batch_size, count - start))), strict=True)
        yield torch.stack(features), torch.stack(targets)
