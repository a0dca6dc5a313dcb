"""Clustering of patch features: k-means on the val images, clusters matched to classes by the ground truth, mIoU.

Protocol of NeCo's and Leopart's overclustering (`neco-1`; Pariza et al., ICLR 2025, table 1a) and without its quirks
(`clean-1`). If K is the number of classes, clusters are matched by the Hungarian method on IoU; if K is larger, each
cluster gets the majority class of its pixels. In both protocols, the matching uses the ground truth of the scored
images.
"""

from __future__ import annotations

from functools import partial

from neco_bench.tasks.clustering import (
    KMEANS_POINTS,
    PCA_POINTS,
    PackedMasks,
    assign,
    check_enough,
    feature_map,
    kmeans,
    standardise_and_reduce,
)
from neco_bench.tasks.overclustering.settings import Settings
from neco_bench.tasks.segmentation import SegmentationScore, images_used, reduce_mask

from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.transforms import ResizeSquare, resize_nearest_torch
from neco_bench.metrics.segmentation import hungarian_match, majority_match
from neco_bench.search.row_file import RowFile


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: k-means on FAISS's sub-sample, and a file of all features.

    Raises UsageError for more clusters or components than patches.
    """
    size, classes = settings.input_size_for(stride), len(data["val"].classes)
    clusters, reduced = settings.clusters or classes, min(dimension, settings.components)
    rows = len(data["val"]) * (size // stride) ** 2
    points = min(rows, KMEANS_POINTS * clusters)
    check_enough(rows, "clusters", clusters)
    check_enough(rows, "components", reduced)
    passes = settings.seeds * (points * settings.redos * settings.iterations + rows)
    return Cost(
        images=len(data["val"]),
        size=size,
        width=reduced,
        operations=2.0 * passes * clusters * reduced + 4.0 * rows * dimension * reduced,
        memory=8.0 * max(points * reduced, min(rows, PCA_POINTS * dimension) * dimension)
        + 4.0 * settings.seeds * len(data["val"]) * classes**2
        + (1 + 8.0 * settings.seeds) * (settings.mask_size or 0) ** 2  # a mask, and the prediction of each seed
        + 0.05 * len(data["val"]) * (settings.mask_size or size) ** 2,
        disk=4.0 * rows * (2 * dimension + reduced),
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the mIoU averaged over k-means seeds, on data["val"]."""
    val, size = data["val"], settings.input_size_for(encoder.stride)
    side, clusters = size // encoder.stride, settings.clusters or len(val.classes)
    count = images_used(len(val), settings.drop_last or 1, "drop_last=0")

    features, masks = RowFile(encoder.embed_dim), PackedMasks()
    transform = ResizeSquare(size, "pil" if settings.mask_size else "native")
    extractor = FeatureExtractor(encoder, context, mean=settings.mean, std=settings.std)
    for batch in extractor.stream(val, transform, "extract", items=[(0, i) for i in range(count)]):
        features.append(batch.features.flatten(2).transpose(1, 2).flatten(0, 1).cpu().numpy())
        for mask in batch.masks:
            masks.append(reduce_mask(mask, settings.mask_size))

    with context.phase("pca"):
        reduced = standardise_and_reduce(features, settings.components)
    seeds = range(context.seed, context.seed + settings.seeds)
    with context.phase("kmeans"):
        iterations, redos = settings.iterations, settings.redos
        fitted = kmeans(reduced, clusters, seeds=seeds, iterations=iterations, redos=redos, device=encoder.device)
        models = list(context.track(fitted, "k-means", len(seeds)))

    score = SegmentationScore(val, settings, context, shape=(len(seeds),), clusters=clusters)
    with context.phase("match"):
        images = zip(masks, assign(models, reduced, side**2), strict=True)
        for item, (mask, ids) in enumerate(context.track(images, "match", count)):
            predictions = resize_nearest_torch(ids.reshape(-1, side, side), *mask.shape)
            score.add(item, mask, predictions, features=partial(feature_map, features, item, side))
    score.match(hungarian_match if clusters == len(val.classes) else majority_match)

    scores = score.mean_ious()
    context.note(clusters=clusters, components=reduced.dimension, scored_images=count)
    return score.outcome(
        used_size=size,
        resize="squash",
        metrics={"mIoU_std": float(scores.std())},
        statistics={"mIoU_per_seed": scores},
    )
