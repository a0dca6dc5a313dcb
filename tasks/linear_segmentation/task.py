"""Linear segmentation: a 1x1 convolution on frozen patch features.

Protocol of NeCo's `linear_finetune.py` (`neco-1`, including quirks; Pariza et al., ICLR 2025, table 2), and without its
quirks (`clean-1`). README.md lists them. The encoder encodes every augmented training image once per epoch.

Known deviations from the reference: augmentation and order are drawn per (epoch, image), not from a global stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from neco_bench.tasks.linear_segmentation.augment import CropFlip
from neco_bench.tasks.linear_segmentation.batches import Batches, batched, with_targets
from neco_bench.tasks.linear_segmentation.heads import classify, new_head, train_probe
from neco_bench.tasks.linear_segmentation.settings import Settings
from neco_bench.tasks.segmentation import SegmentationScore, images_used, reduce_mask
from torch import Tensor

from neco_bench.core.rng import item_rng
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.transforms import ResizeSquare


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: every training image once per epoch, with the head's forward and backward pass."""
    size, classes = settings.input_size_for(stride), len(data["val"].classes)
    views, side = settings.epochs * len(data["train"]), settings.train_mask_size
    grid = len(settings.rates) * settings.probe_seeds
    per_view = 6.0 * grid * classes * (dimension * (size // stride) ** 2 + 8 * side**2)
    heads = grid * (settings.epochs if settings.select == "best" else 1)
    batch = min(settings.batch_size, len(data["train"]))
    activations = batch * (dimension * (size // stride) ** 2 + 4 * grid * classes * side**2)
    masks = 2 * classes * (settings.score_size or 0) ** 2
    return Cost(
        images=views + len(data["val"]),
        size=size,
        width=dimension,
        operations=views * per_view,
        memory=4.0 * (activations + masks) + 4.0 * len(data["val"]) * classes**2 + 4.0 * heads * classes * dimension,
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the mIoU of a linear head trained on data["train"], scored on data["val"]."""
    val, size = data["val"], settings.input_size_for(encoder.stride)
    seeds = range(context.seed, context.seed + settings.probe_seeds)
    scored = images_used(len(val), settings.batch_size if settings.drop_last_val else 1, "drop_last_val=false")
    extractor = FeatureExtractor(encoder, context, mean=settings.mean, std=settings.std)
    epochs = training_epochs(extractor, data["train"], settings, size)

    classes = len(val.classes)
    heads = [new_head(encoder.embed_dim, classes, seed, encoder.device) for _ in settings.rates for seed in seeds]
    rates = [rate for rate in settings.rates for _ in seeds]
    snapshots = train_probe(heads, rates, epochs, settings)
    snapshots = snapshots[-1:] if settings.select == "last" else snapshots
    heads = [head for snapshot in snapshots for head in snapshot]

    score = SegmentationScore(val, settings, context, shape=(len(snapshots), len(settings.rates), len(seeds)))
    add_images(score, extractor, scored, lambda features, shape: classify(heads, features, *shape))

    scores = score.mean_ious()  # [epoch, rate, seed]
    means = scores.mean(2)
    epoch, rate = (int(i) for i in np.unravel_index(means.argmax(), means.shape))
    context.note(epoch_reported=settings.epochs - len(snapshots) + epoch + 1, scored_images=scored)
    if settings.learning_rates:
        by_rate = dict(zip(map(str, settings.rates), means.max(0).tolist(), strict=True))
        context.note(learning_rate_reported=settings.rates[rate], mIoU_by_learning_rate=by_rate)
    metrics = {"mIoU_last_epoch": float(means[-1, rate])}
    if len(seeds) > 1:
        metrics["mIoU_std"] = float(scores[epoch, rate].std(ddof=1))
    best = (epoch, rate) if len(seeds) > 1 else (epoch, rate, 0)
    return score.outcome(used_size=size, resize="squash", select=best, metrics=metrics)


def add_images(
    score: SegmentationScore,
    extractor: FeatureExtractor,
    count: int,
    classify: Callable[[Tensor, tuple[int, ...]], Tensor],
) -> None:
    """Predict the first `count` val images, and add them to the score.

    classify: maps features (D, h, w) and the shape of a mask to class ids (heads, H, W).
    """
    settings: Settings = score.settings  # type: ignore[assignment]
    size = settings.input_size_for(extractor.encoder.stride)
    transform = ResizeSquare(size, "pil" if settings.score_size else "native")
    items = [(0, i) for i in range(count)]
    for batch in extractor.stream(score.dataset, transform, "score", items=items, own=True):
        with extractor.context.phase("predict"):
            for item, features, mask in zip(batch.positions, batch.features, batch.masks, strict=True):
                mask = reduce_mask(mask, settings.score_size)
                score.add(item, mask, classify(features, mask.shape).cpu().numpy(), features=features.cpu)


def training_epochs(
    extractor: FeatureExtractor, train: SegmentationDataset, settings: Settings, size: int
) -> Iterator[Batches]:
    """Yield the head's batches of each epoch, from one stream over all epochs, so that workers start once.

    Raises UsageError if no image is left without the last batch.
    """
    count = images_used(len(train), settings.batch_size if settings.drop_last else 1, "drop_last=false")
    items = []
    for epoch in range(settings.epochs):
        order = np.arange(len(train))
        if settings.shuffle:
            order = item_rng(extractor.context.seed, "order", epoch).permutation(len(train))
        items += [(epoch, int(i)) for i in order[:count]]
    transform = CropFlip(size, settings.crop_scale, settings.crop_ratio, settings.flip_probability)
    batches = extractor.stream(train, transform, "train", items=items)
    images = with_targets(batches, lambda mask: train.eval_mask(reduce_mask(mask, settings.train_mask_size)))
    return (batched(itertools.islice(images, count), settings.batch_size) for _ in range(settings.epochs))
