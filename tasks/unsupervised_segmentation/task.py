"""Fully unsupervised segmentation: clusters are selected as foreground (CBFE) and merged into objects by community
detection (CD); mIoU after Hungarian matching on val.

`neco-1` is the protocol of NeCo's table 1b and of Leopart (Ziegler and Asano, CVPR 2022, section 4.4); the ground truth
of train is used to select its foreground and its constants. `clean-1` has no such selection and works with any encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from neco_bench.tasks.clustering import (
    KMEANS_POINTS,
    PCA_POINTS,
    PackedMasks,
    PickedRows,
    assign,
    check_enough,
    feature_map,
    kmeans,
    nearest,
    standardise_and_reduce,
)
from neco_bench.tasks.normalised_cut import LANCZOS, cut
from neco_bench.tasks.segmentation import SegmentationScore, reduce_mask
from neco_bench.tasks.unsupervised_segmentation.communities import (
    CoOccurrence,
    check_infomap,
    communities,
    edges,
    offsets,
)
from neco_bench.tasks.unsupervised_segmentation.foreground import best_threshold, otsu, precisions
from neco_bench.tasks.unsupervised_segmentation.settings import Settings

from neco_bench.core.errors import UsageError
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import IGNORE, SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.attention import MIN_SIDE, foreground
from neco_bench.features.extract import FeatureExtractor, Output
from neco_bench.features.transforms import ResizeSquare, resize_nearest_torch
from neco_bench.metrics.segmentation import hungarian_match
from neco_bench.search.row_file import RowFile


def check_encoder(encoder: Encoder, settings: Settings) -> None:
    """Raise UsageError if Infomap is missing, or the encoder has no attention but the protocol needs it."""
    check_infomap()
    if settings.foreground != "attention":
        return
    if not encoder.attentions:
        raise UsageError(
            f"foreground=attention needs the class token's attention, which {encoder.name!r} does not return. Use "
            f"@clean-1, which works with any encoder, or --set foreground=cut."
        )
    if settings.input_size_for(encoder.stride) < MIN_SIDE * encoder.stride:
        raise UsageError(f"foreground=attention needs inputs of {MIN_SIDE} x {MIN_SIDE} patches or more.")


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: three k-means on FAISS's sub-samples, a cut of each image, a file of all features.

    Raises UsageError for more clusters or components than patches.
    """
    size, classes = settings.input_size_for(stride), len(data["val"].classes)
    images, patches = len(data["train"]) + len(data["val"]), (size // stride) ** 2
    rows, reduced = images * patches, min(dimension, settings.components)
    grid = settings.mask_size or size // stride
    for setting in ("foreground_clusters", "community_clusters"):
        check_enough(rows, setting, getattr(settings, setting))
    check_enough(rows, "components", reduced)
    fits = {settings.foreground_clusters: 1, settings.community_clusters: 1, max(1, classes - 1): settings.direct_seeds}
    passes = sum(
        times * k * (min(images * grid**2, KMEANS_POINTS * k) * settings.redos * settings.iterations + rows)
        for k, times in fits.items()
    )
    is_cut = settings.foreground == "cut"
    return Cost(
        images=images,
        size=size,
        width=reduced,
        operations=2.0 * passes * reduced
        + 4.0 * rows * dimension * reduced
        + is_cut * 2.0 * rows * patches * (dimension + LANCZOS),
        memory=8.0 * max(KMEANS_POINTS * max(fits) * reduced, min(rows, PCA_POINTS * dimension) * dimension)
        + images * (12.0 * grid**2 + 8.0 * patches + 0.05 * (settings.mask_size or size) ** 2)
        + is_cut * 32.0 * patches**2
        + 4.0 * (settings.seeds + settings.direct_seeds) * len(data["val"]) * classes**2,
        disk=4.0 * rows * (2 * dimension + reduced),
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the mIoU of the communities, mean over Infomap's seeds, on data["val"]."""
    check_encoder(encoder, settings)
    size, train_count = settings.input_size_for(encoder.stride), len(data["train"])
    side, objects = size // encoder.stride, max(1, len(data["val"].classes) - 1)

    # Patch features of train and val together, and a noisy foreground of each image.
    features, noisy, masks = extract(encoder, data, size, settings, context)
    with context.phase("pca"):
        reduced = standardise_and_reduce(features, settings.components)

    # Clusters of all patches. Clusters with a sufficient share in the noisy foreground are foreground.
    rounds: dict[str, Any] = {"iterations": settings.iterations, "redos": settings.redos, "device": encoder.device}
    with context.phase("kmeans"):
        count = settings.foreground_clusters
        (model,) = kmeans(reduced, count, seeds=[context.seed], spherical=True, **rounds)
        clusters = np.concatenate([nearest(model, rows) for rows in reduced.chunks()]).reshape(-1, side**2)
    grid = settings.mask_size or side
    cells = resize_nearest_torch(np.arange(side**2).reshape(side, side), grid, grid)  # the patch of each pixel
    inside, facts = choose_foreground(clusters, noisy, cells, masks["train"], train_count, settings)

    # Clusters of the pixels of foreground patches: the nodes of the graph, and, for "direct", one per object class.
    image, pixel = inside[:, cells.ravel()].nonzero()
    picked = PickedRows(reduced, image * side**2 + cells.ravel()[pixel])
    nodes = settings.community_clusters
    check_enough(len(picked), "community_clusters", max(nodes, objects))
    with context.phase("kmeans"):
        models = list(kmeans(picked, nodes, seeds=[context.seed], **rounds))
        direct = range(context.seed, context.seed + settings.direct_seeds)
        models += context.track(kmeans(picked, objects, seeds=direct, **rounds), "k-means", settings.direct_seeds)
    background = np.array([nodes] + [objects] * settings.direct_seeds)[:, None]
    of_images = zip(inside, assign(models, reduced, side**2), strict=True)
    labels = np.stack([np.where(own, ids, background).astype(np.int32) for own, ids in of_images], 1)

    # Communities of clusters that are often neighbours in train and val; background is one of the nodes.
    with context.phase("communities"):
        together = CoOccurrence(nodes + 1, offsets(settings.reach, settings.angles))
        for own in context.track(labels[0], "co-occurrence", labels.shape[1]):
            together.add(own[cells])
        links, options = edges(together.shares(), settings.weight_threshold), {"markov_time": settings.markov_time}
        seeds = range(context.seed, context.seed + settings.seeds)
        modules = np.stack([communities(links, nodes + 1, modules=objects, seed=seed, **options) for seed in seeds])

    context.note(
        **facts,
        train_ground_truth=ground_truth_use(settings),
        edges=len(links),
        communities=[len(np.unique(own[own > 0])) for own in modules],
        components=reduced.dimension,
    )

    # Score on val: each seed is matched separately.
    val, part = data["val"], slice(train_count, None)
    width = max(objects + 1, int(modules.max()) + 1)
    score = SegmentationScore(val, settings, context, shape=(len(modules),), clusters=width)
    direct_score = SegmentationScore(val, settings, context, shape=(len(labels) - 1,), clusters=objects + 1)
    with context.phase("match"):
        ious = add_images(
            score,
            direct_score,
            masks["val"],
            labels[:, part],
            inside[part],
            modules,
            lambda item: feature_map(features, train_count + item, side),
        )
    for either in (score, direct_score):
        either.match(hungarian_match)
    scores = score.mean_ious()
    return score.outcome(
        used_size=size,
        resize="squash",
        metrics={
            "mIoU_std": float(scores.std()),
            "direct_mIoU": float(direct_score.mean_ious().mean()),
            "foreground_IoU": float(ious.mean()),
        },
        statistics={"mIoU_per_seed": scores, "foreground_iou": ious},
    )


def extract(
    encoder: Encoder, data: dict[str, SegmentationDataset], size: int, settings: Settings, context: Context
) -> tuple[RowFile, np.ndarray, dict[str, PackedMasks]]:
    """Encode train, then val.

    Returns features, one row per patch; (images, patches) bool noisy foreground; and masks: those of val for scoring,
    and those of train only if the protocol selects the foreground by them.
    """
    features, noisy = RowFile(encoder.embed_dim), []
    masks = {"train": PackedMasks(), "val": PackedMasks()}
    transform = ResizeSquare(size, "pil" if settings.mask_size else "native")
    output: Output = "features and attention" if settings.foreground == "attention" else "features"
    extractor = FeatureExtractor(encoder, context, output=output, mean=settings.mean, std=settings.std)
    for name in ("train", "val"):
        for batch in extractor.stream(data[name], transform, f"extract {name}"):
            maps = batch.features[:, : encoder.embed_dim]
            features.append(maps.flatten(2).transpose(1, 2).flatten(0, 1).cpu().numpy())
            with context.phase("foreground"):
                if settings.foreground == "attention":
                    noisy += [*foreground(batch.features[:, encoder.embed_dim :], settings.mass).cpu().numpy()]
                else:
                    noisy += [cut(own, settings.tau).inside for own in maps.cpu().numpy()]
            for mask in batch.masks if name == "val" or settings.threshold == "train_masks" else ():
                masks[name].append(reduce_mask(mask, settings.mask_size))
    return features, np.stack(noisy).reshape(len(noisy), -1), masks


def choose_foreground(
    clusters: np.ndarray,
    noisy: np.ndarray,
    cells: np.ndarray,
    train_masks: PackedMasks,
    train_count: int,
    settings: Settings,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Select foreground clusters by their precision; as in the reference, each split has its own precisions.

    Args:
        clusters: (images, patches) clusters, first of train, then of val.
        noisy: (images, patches) bool, the noisy foreground.
        cells: (H, W) patch of each pixel.
        train_masks: ground truth of train, if it is used.
        train_count: number of images of train.
        settings: settings of the protocol.

    Returns:
        (images, patches) bool foreground, and notes on it.
    """
    count, pixels = settings.foreground_clusters, cells.ravel()
    weights = np.bincount(pixels, minlength=clusters.shape[1])
    splits = [slice(None, train_count), slice(train_count, None)]
    parts = splits if settings.threshold == "train_masks" else [slice(None)]
    precision = [precisions(clusters[part], noisy[part], weights, count) for part in parts]
    if settings.threshold == "train_masks":
        large = (own[cells] for own in clusters[:train_count])
        threshold = best_threshold(precision[0], _areas(large, train_masks, count))
    else:
        threshold = otsu(precision[0])
    inside = np.concatenate([(own >= threshold)[clusters[part]] for own, part in zip(precision, parts, strict=True)])
    if not inside.any():
        raise UsageError(f"No cluster has a precision of {threshold:.2f}, so nothing is foreground. Use more images.")
    return inside, {
        "threshold": threshold,
        "foreground_share": [float(inside[part][:, pixels].mean()) for part in splits],
        "foreground_clusters_absent": [int(np.isnan(own).sum()) for own in precision],
    }


def _areas(clusters: Iterator[np.ndarray], masks: PackedMasks, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for each image, the pixels of each cluster, and those that are foreground in the ground truth: all labels
    except 0, including borders (255), as in the reference."""
    for own, mask in zip(clusters, masks, strict=True):
        truth = resize_nearest_torch(mask, *own.shape) > 0
        yield np.bincount(own.ravel(), minlength=count), np.bincount(own[truth], minlength=count)


def add_images(
    score: SegmentationScore,
    direct: SegmentationScore,
    masks: PackedMasks,
    labels: np.ndarray,
    inside: np.ndarray,
    modules: np.ndarray,
    shown: Callable[[int], torch.Tensor],
) -> np.ndarray:
    """Count the images of val: communities in `score`, direct clusters in `direct`.

    Args:
        score: has one prediction per seed of Infomap.
        direct: has one prediction per seed of k-means.
        masks: ground truth of each image.
        labels: (1 + direct seeds, images, patches) clusters; the first are the nodes of the communities.
        inside: (images, patches) bool foreground.
        modules: (seeds, clusters) community of each cluster.
        shown: returns the features of an image for `show`.

    Returns:
        (images,) IoU of the foreground and all classes except the first, without void.
    """
    side, ious = math.isqrt(inside.shape[1]), []
    for item, mask in enumerate(masks):
        own = labels[:, item].reshape(-1, side, side)
        large = resize_nearest_torch(inside[item].reshape(side, side), *mask.shape)
        direct.add(item, mask, resize_nearest_torch(own[1:], *mask.shape))
        merged = resize_nearest_torch(modules[:, own[0]], *mask.shape)
        score.add(item, mask, merged, features=partial(shown, item), foreground=large)
        known = mask != IGNORE
        union = ((mask > 0) | large) & known
        ious.append(((mask > 0) & large & known).sum() / max(1, union.sum()))
    return np.array(ious, np.float64)


def ground_truth_use(settings: Settings) -> str:
    """Return how the ground truth of train is used."""
    if settings.threshold == "otsu":
        return "none"
    return (
        "chooses the foreground threshold; community_clusters, markov_time and weight_threshold are constants that the "
        "reference tuned on Pascal VOC train by 300 trials"
    )
