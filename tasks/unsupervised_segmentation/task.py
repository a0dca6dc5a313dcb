"""Fully unsupervised segmentation: foreground from clusters (CBFE), its clusters joined to objects by community
detection (CD), mIoU after Hungarian matching on val.

`neco-1` is the protocol of NeCo's table 1b and of Leopart (Ziegler and Asano, CVPR 2022, section 4.4); the ground truth
of train chooses its foreground and its constants. `clean-1` has no such choice and takes any encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from neco_bench.tasks.clustering import (
    KMEANS_POINTS,
    PCA_POINTS,
    PickedRows,
    assign,
    check_enough,
    kmeans,
    nearest,
    reduce_dimensions,
    standardise,
)
from neco_bench.tasks.normalised_cut import cut
from neco_bench.tasks.segmentation import SegmentationScore
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
from neco_bench.features.extract import stream
from neco_bench.features.transforms import ResizeSquare, resize_nearest_torch
from neco_bench.metrics.segmentation import hungarian_match
from neco_bench.search.row_file import CHUNK, ArrayFile, RowFile

LANCZOS = 60  # products with the graph that a cut takes, about


def check_encoder(encoder: Encoder, settings: Settings) -> None:
    """Raise UsageError for an encoder without the attention that the protocol needs, or without Infomap."""
    check_infomap()
    if settings.foreground != "attention":
        return
    if not encoder.attentions:
        raise UsageError(
            f"foreground=attention needs the class token's attention, which {encoder.name!r} does not give. Use "
            f"@clean-1, which takes any encoder, or --set foreground=cut."
        )
    if settings.input_size_for(encoder.stride) < MIN_SIDE * encoder.stride:
        raise UsageError(f"foreground=attention needs inputs of {MIN_SIDE} x {MIN_SIDE} patches or more.")


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: three k-means on FAISS's sub-sample, a cut of each image, a file of all features and masks.

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
        + images * (12.0 * grid**2 + 8.0 * patches)
        + is_cut * 32.0 * patches**2
        + 4.0 * (settings.seeds + settings.direct_seeds) * len(data["val"]) * classes**2,
        disk=4.0 * rows * (2 * dimension + reduced) + images * (settings.mask_size or size) ** 2,
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the mIoU of the communities, mean over Infomap's seeds, on data["val"]."""
    check_encoder(encoder, settings)
    size, val = settings.input_size_for(encoder.stride), data["val"]
    side, classes, train_count = size // encoder.stride, len(val.classes), len(data["train"])

    # Patch features of train and val, a noisy foreground of each image, and masks: of val to score on, of train only
    # where the protocol chooses by them.
    features, noisy = RowFile(encoder.embed_dim), []
    masks = {"train": ArrayFile(), "val": ArrayFile()}
    transform = ResizeSquare(size, "pil" if settings.mask_size else "native")
    options = {"attention": True} if settings.foreground == "attention" else {}
    for name, split in (("train", data["train"]), ("val", val)):
        what = f"extract {name}"
        for batch in stream(
            encoder, split, transform, context, what, mean=settings.mean, std=settings.std, **options
        ):
            maps = batch.features[:, : encoder.embed_dim]
            features.append(maps.flatten(2).transpose(1, 2).flatten(0, 1).cpu().numpy())
            with context.phase("foreground"):
                if settings.foreground == "attention":
                    noisy.append(foreground(batch.features[:, encoder.embed_dim :], settings.mass).cpu().numpy())
                else:
                    noisy += [cut(own, settings.tau).inside[None] for own in maps.cpu().numpy()]
            if name == "val" or settings.threshold == "train_masks":
                for mask in batch.masks:
                    grid = (settings.mask_size,) * 2 if settings.mask_size else mask.shape
                    masks[name].append(resize_nearest_torch(mask, *grid))
    inside = np.concatenate(noisy).reshape(-1, side**2)
    with context.phase("pca"):
        standardise(features)
        reduced = reduce_dimensions(features, settings.components)

    # Foreground: clusters of all patches whose precision, by the noisy foreground of their split, is high enough.
    rounds = {"iterations": settings.iterations, "redos": settings.redos, "device": encoder.device}
    with context.phase("kmeans"):
        count = settings.foreground_clusters
        (model,) = kmeans(reduced, count, seeds=[context.seed], spherical=True, **rounds)
        clusters = np.concatenate([nearest(model, rows) for rows in reduced.chunks()]).reshape(-1, side**2)
    cells = resize_nearest_torch(np.arange(side**2).reshape(side, side), *(settings.mask_size or side,) * 2)
    weights = np.bincount(cells.ravel(), minlength=side**2)  # pixels of each patch
    parts = (slice(None, train_count), slice(train_count, None))
    precision = [precisions(clusters[part], inside[part], weights, count) for part in parts]
    if settings.threshold == "train_masks":
        labels = (clusters[i].reshape(side, side) for i in range(train_count))
        threshold = best_threshold(precision[0], _areas(labels, masks["train"], cells, count))
    else:
        threshold = otsu(precision[0])
    is_foreground = np.concatenate([(own >= threshold)[clusters[part]] for own, part in zip(precision, parts)])

    # Clusters of foreground patches: as many as foreground classes, and those that communities are made of.
    pixels = is_foreground[:, cells.ravel()].nonzero()
    picked = PickedRows(reduced, pixels[0] * side**2 + cells.ravel()[pixels[1]])
    nodes, objects = settings.community_clusters, max(1, classes - 1)
    for setting, k in (("community_clusters", nodes), ("foreground clusters", objects)):
        check_enough(len(picked), setting, k)
    with context.phase("kmeans"):
        models = list(kmeans(picked, nodes, seeds=[context.seed], **rounds))
        direct = range(context.seed, context.seed + settings.direct_seeds)
        models += context.track(kmeans(picked, objects, seeds=direct, **rounds), "k-means", settings.direct_seeds)
    background = np.array([nodes] + [objects] * settings.direct_seeds)[:, None]
    labels = np.stack(
        [np.where(own, ids, background) for own, ids in zip(is_foreground, assign(models, reduced, side**2))], 1
    )  # (models, images, patches)

    # Communities: clusters that lie beside each other in train and val, background among them.
    with context.phase("communities"):
        together = CoOccurrence(nodes + 1, offsets(settings.reach, settings.angles))
        for own in context.track(labels[0], "co-occurrence", labels.shape[1]):
            together.add(own[cells])
        links = edges(together.shares(), settings.weight_threshold)
        found = np.stack(
            [
                communities(links, nodes + 1, modules=objects, markov_time=settings.markov_time, seed=seed)
                for seed in range(context.seed, context.seed + settings.seeds)
            ]
        )

    # Score on val: communities and, beside them, the direct clusters; each seed is matched alone.
    score = SegmentationScore(
        val, settings, context, shape=(settings.seeds,), clusters=max(classes, int(found.max()) + 1)
    )
    direct_score = SegmentationScore(val, settings, context, shape=(settings.direct_seeds,), clusters=objects + 1)
    ious = []
    with context.phase("match"):
        for item, mask in enumerate(context.track(masks["val"], "match", len(val))):
            own = labels[:, train_count + item].reshape(-1, side, side)
            object_map = is_foreground[train_count + item].reshape(side, side)
            large = resize_nearest_torch(object_map, *mask.shape)
            direct_score.add(item, mask, resize_nearest_torch(own[1:], *mask.shape))
            score.add(
                item,
                mask,
                resize_nearest_torch(found[:, own[0]], *mask.shape),
                features=partial(feature_map, features, train_count + item, side),
                foreground=large,
            )
            truth = (mask > 0) & (mask != IGNORE)
            ious.append(float((truth & large & (mask != IGNORE)).sum() / max(1, ((truth | large) & (mask != IGNORE)).sum())))
    score.match(hungarian_match)
    direct_score.match(hungarian_match)

    scores = score.mean_ious()
    context.notes |= {
        "train_ground_truth": ground_truth_use(settings),
        "threshold": threshold,
        "foreground_share": [float(is_foreground[part][:, cells.ravel()].mean()) for part in parts],
        "foreground_clusters_absent": [int(np.isnan(own).sum()) for own in precision],
        "edges": len(links),
        "communities": [int(own.max()) for own in found],
        "components": reduced.dimension,
    }
    return score.outcome(
        used_size=size,
        resize="squash",
        metrics={
            "mIoU_std": float(scores.std()),
            "direct_mIoU": float(direct_score.mean_ious().mean()),
            "foreground_IoU": float(np.mean(ious)),
        },
        statistics={"mIoU_per_seed": scores, "foreground_iou": np.array(ious)},
    )


def ground_truth_use(settings: Settings) -> str:
    """Say what the ground truth of train decides."""
    if settings.threshold == "otsu":
        return "none"
    return (
        "chooses the foreground threshold; community_clusters, markov_time and weight_threshold are constants that the "
        "reference tuned on Pascal VOC train by 300 trials"
    )


def _areas(
    labels: Iterator[np.ndarray], masks: ArrayFile, cells: np.ndarray, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield of each image the pixels of each cluster, and those of them that the ground truth has as foreground: any
    label but 0, borders (255) too, as in the reference."""
    for own, mask in zip(labels, masks, strict=True):
        truth = resize_nearest_torch(mask, *cells.shape) > 0
        large = own.ravel()[cells]
        yield np.bincount(large.ravel(), minlength=count), np.bincount(large[truth], minlength=count)


def feature_map(features: RowFile, item: int, side: int) -> torch.Tensor:
    """Read the features (D, side, side) of an image, as encoded."""
    rows = features.at(np.arange(item * side**2, (item + 1) * side**2))
    return torch.from_numpy(rows).T.unflatten(1, (side, side))
