"""Clustering of patch features: k-means on the val images, clusters named by the ground truth, mIoU.

Protocol of NeCo's and Leopart's overclustering (`neco-1`; Pariza et al., ICLR 2025, table 1a) and without its quirks
(`clean-1`). K = classes: Hungarian matching on IoU; K > classes: each cluster takes the class that most of its pixels
have. Both come from one (C, K) confusion matrix. The matching sees the ground truth of the images it scores, in both.
"""

from __future__ import annotations

import io

import numpy as np
from neco_bench.tasks.overclustering.clustering import (
    KMEANS_POINTS,
    PCA_POINTS,
    check_enough,
    kmeans,
    nearest,
    reduce_dimensions,
)
from neco_bench.tasks.overclustering.settings import Settings

from neco_bench.core.errors import UsageError
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import stream
from neco_bench.features.transforms import ResizeSquare, resize_nearest_torch
from neco_bench.metrics import bootstrap, segmentation
from neco_bench.search.row_file import CHUNK, RowFile, open_spool, spool


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """What `run` will take: k-means on FAISS's sub-sample, and a file of all features and masks.

    Raises UsageError for more clusters or components than patches.
    """
    size, classes = settings.used_size(stride), len(data["val"].classes)
    clusters, reduced = settings.clusters or classes, min(dimension, settings.components)
    rows = len(data["val"]) * (size // stride) ** 2
    drawn = min(rows, KMEANS_POINTS * clusters)
    check_enough(rows, "clusters", clusters)
    check_enough(rows, "components", reduced)
    passes = settings.seeds * (drawn * settings.redos * settings.iterations + rows)
    return Cost(
        images=len(data["val"]),
        size=size,
        width=reduced,
        operations=2.0 * passes * clusters * reduced + 4.0 * rows * dimension * reduced,
        memory=8.0 * max(drawn * reduced, min(rows, PCA_POINTS * dimension) * dimension)
        + 4.0 * settings.seeds * len(data["val"]) * classes**2
        + 9.0 * (settings.mask_size or 0) ** 2,  # a mask, and the cells of its pixels
        disk=4.0 * rows * (2 * dimension + reduced) + len(data["val"]) * (settings.mask_size or size) ** 2,
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """mIoU averaged over k-means seeds, on data["val"]."""
    val = data["val"]
    classes = len(val.classes)
    clusters = settings.clusters or classes
    size = settings.used_size(encoder.stride)
    side = size // encoder.stride
    scored = len(val) // settings.drop_last * settings.drop_last if settings.drop_last else len(val)
    if not scored:
        raise UsageError(f"drop_last leaves none of the {len(val)} images. Use --set drop_last=0, or clean-1.")
    features = RowFile(encoder.embed_dim)
    masks = open_spool()
    transform = ResizeSquare(size, "centre" if settings.mask_size else "native")
    items = [(0, i) for i in range(scored)]
    for batch in stream(encoder, val, transform, context, "extract", items=items, mean=settings.mean, std=settings.std):
        features.append(batch.features.flatten(2).transpose(1, 2).flatten(0, 1).cpu().numpy())
        for position, image, mask in zip(batch.positions, batch.features, batch.masks, strict=True):
            small = resize_nearest_torch(mask, settings.mask_size, settings.mask_size) if settings.mask_size else mask
            truth = val.scored(small)
            packed = io.BytesIO()
            np.save(packed, truth, allow_pickle=False)
            spool(masks, packed.getvalue())
            if val.ids[position] in context.watched:
                context.seen[val.ids[position]] = {"features": image.cpu(), "truth": truth}
    with context.phase("pca"):
        features.standardise()
        reduced = reduce_dimensions(features, settings.components)
    seeds = range(context.seed, context.seed + settings.seeds)
    with context.phase("kmeans"):
        rounds = {"iterations": settings.iterations, "redos": settings.redos}
        fitted = kmeans(reduced, clusters, seeds=seeds, device=encoder.device, **rounds)
        models = list(context.track(fitted, "k-means", len(seeds)))
    counted = [segmentation.ImageConfusions(classes, clusters) for _ in models]
    masks.seek(0)
    together = max(1, CHUNK // side**2)
    with context.phase("match"):
        for start in context.track(range(0, scored, together), "match"):
            stop = min(start + together, scored)
            rows = reduced.read(start * side**2, stop * side**2)
            assigned = np.stack([nearest(model, rows).reshape(stop - start, -1) for model in models], 1)
            for position, of_models in enumerate(assigned, start):
                mask = np.load(masks, allow_pickle=False)
                # Pixels of a cell share its cluster: they are counted once by class and cell, then for each model.
                cells = resize_nearest_torch(np.arange(side**2).reshape(side, side), *mask.shape)
                by_cell = segmentation.confusion_matrix(mask, cells, classes, clusters=side**2)
                labels, found = by_cell.nonzero()
                for own, confusions in zip(of_models, counted, strict=True):
                    confusions.add_counts(labels, own[found], by_cell[labels, found])
                if seen := context.seen.get(val.ids[position]):
                    seen["clusters"] = of_models[0][cells]
    match = segmentation.hungarian_match if clusters == classes else segmentation.majority_match
    mappings = [match(confusions.total()) for confusions in counted]
    for seen in context.seen.values():
        seen["prediction"] = mappings[0][seen["clusters"]]
    per_image = [confusions.per_image(mapping) for confusions, mapping in zip(counted, mappings, strict=True)]
    scores = [segmentation.mean_iou(matched.sum(0), absent=settings.absent) for matched in per_image]

    confusion = np.stack(per_image)
    iou = np.stack([segmentation.iou_per_class(c.sum(0)) for c in per_image]).mean(0)
    present = [segmentation.mean_iou(c.sum(0), absent="exclude") for c in per_image]
    context.notes |= {"clusters": clusters, "components": reduced.dimension, "scored_images": scored}
    return Outcome(
        metrics={
            "mIoU": float(np.mean(scores)),
            "mIoU_std": float(np.std(scores)),
            "mIoU_present": float(np.mean(present)),
        },
        per_class={"IoU": segmentation.by_class(iou, val.classes)},
        ci95={"mIoU": bootstrap.bootstrap_miou(confusion, absent=settings.absent, seed=context.seed)},
        n_images=scored,
        statistics={"confusion": confusion, "mapping": np.stack(mappings), "mIoU_per_seed": np.array(scores)},
        features={"input_size": settings.input_size, "used_size": size, "resize": "squash", "final_norm": True},
    )
