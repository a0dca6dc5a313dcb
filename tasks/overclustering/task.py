"""Clustering of patch features: k-means on the val images, clusters named by the ground truth, mIoU.

Protocol of NeCo's and Leopart's overclustering (`neco-1`; Pariza et al., ICLR 2025, table 1a) and without its quirks
(`clean-1`). K = classes: Hungarian matching on IoU; K > classes: each cluster takes the class that most of its pixels
have. Both come from one (C, K) confusion matrix. The matching sees the ground truth of the images it scores, in both.
"""

from __future__ import annotations

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from neco_bench import metrics, statistics
from neco_bench.clustering import kmeans, reduce_dimensions, standardise
from neco_bench.context import Context, Outcome
from neco_bench.data.base import SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.errors import UsageError
from neco_bench.features.extract import stream
from neco_bench.features.transforms import Squash, fit_size, nearest_legacy
from neco_bench.protocol import Settings as BaseSettings


class Settings(BaseSettings):
    """Constants of a protocol and a card; sizes in pixels.

    mask_size: side of the shrunk masks that are scored (None: their own resolution). clusters: None means as many as
    classes. drop_last: leave out the last partial batch of this size (0: keep every image).
    """

    input_size: PositiveInt
    mask_size: PositiveInt | None = None
    clusters: PositiveInt | None = None
    components: PositiveInt
    iterations: PositiveInt
    redos: PositiveInt
    seeds: PositiveInt
    drop_last: NonNegativeInt = 0
    absent: metrics.Absent


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """mIoU averaged over k-means seeds, on data["val"]."""
    val = data["val"]
    classes = len(val.classes)
    clusters = settings.clusters or classes
    size = fit_size(settings.input_size, encoder.stride)
    side = size // encoder.stride
    scored = len(val) // settings.drop_last * settings.drop_last if settings.drop_last else len(val)
    if not scored:
        raise UsageError(f"drop_last leaves none of the {len(val)} images. Use --set drop_last=0, or clean-1.")
    features = np.empty((scored, side * side, encoder.embed_dim), np.float32)
    masks: list[np.ndarray] = []
    transform = Squash(size, "centre" if settings.mask_size else "native")
    for batch in stream(
        encoder,
        val,
        transform,
        context,
        "extract",
        items=[(0, i) for i in range(scored)],
        mean=settings.mean,
        std=settings.std,
    ):
        features[list(batch.positions)] = batch.features.flatten(2).transpose(1, 2).cpu().numpy()
        for mask in batch.masks:
            masks.append(nearest_legacy(mask, settings.mask_size, settings.mask_size) if settings.mask_size else mask)
    with context.phase("pca"):
        reduced = reduce_dimensions(standardise(features.reshape(-1, encoder.embed_dim)), settings.components)

    scores, per_image, mappings = [], [], []
    for seed in context.track(range(context.seed, context.seed + settings.seeds), "k-means"):
        with context.phase("kmeans"):
            assigned = kmeans(reduced, clusters, seed=seed, iterations=settings.iterations, redos=settings.redos)
        with context.phase("match"):
            confusions = metrics.ImageConfusions(classes, clusters)
            for grid, mask in zip(assigned.reshape(scored, side, side), masks, strict=True):
                confusions.add(mask, nearest_legacy(grid, *mask.shape))
            match = metrics.hungarian_match if clusters == classes else metrics.majority_match
            mapping = match(confusions.total())
            matched = confusions.per_image(mapping)
        scores.append(metrics.mean_iou(matched.sum(0), absent=settings.absent))
        per_image.append(matched)
        mappings.append(mapping)

    confusion = np.stack(per_image)
    iou = np.stack([metrics.iou_per_class(c.sum(0)) for c in per_image]).mean(0)
    present = [metrics.mean_iou(c.sum(0), absent="exclude") for c in per_image]
    context.notes |= {"clusters": clusters, "components": reduced.shape[1], "scored_images": scored}
    return Outcome(
        metrics={
            "mIoU": float(np.mean(scores)),
            "mIoU_std": float(np.std(scores)),
            "mIoU_present": float(np.mean(present)),
        },
        per_class={"IoU": metrics.named(iou, val.classes)},
        ci95={"mIoU": statistics.bootstrap_miou(confusion, absent=settings.absent, seed=context.seed)},
        n_images=scored,
        statistics={"confusion": confusion, "mapping": np.stack(mappings), "mIoU_per_seed": np.array(scores)},
        features={"input_size": settings.input_size, "used_size": size, "resize": "squash", "final_norm": True},
    )
