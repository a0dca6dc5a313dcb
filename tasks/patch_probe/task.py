"""Patch probe: label patches by their nearest training patches, or by logistic regression on them.

Protocol of CAPI's `eval_segmentation.py` (`capi-1`, including quirks; Darcet et al., 2025), and without its quirks
(`clean-1`). README.md lists them. Every patch has a block of pixel labels: k-NN votes for each pixel of the block,
logistic regression predicts one class for the whole block. The best of the grid (k and distance, or C) is selected on
held-out training images, at the input size.

Known deviations from the reference: the held-out images are drawn by image count and seed, not by file order; features
are standardised with float64 sums; logistic regression is scikit-learn's in float64, not cuML's in float32.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from neco_bench.tasks.patch_probe.knn import check_ks
from neco_bench.tasks.patch_probe.patches import hold_out, read_train, read_val, refit_rows, standardise
from neco_bench.tasks.patch_probe.probes import KnnProbe, LogisticProbe
from neco_bench.tasks.patch_probe.settings import Settings
from neco_bench.tasks.segmentation import SegmentationScore
from torch import Tensor

from neco_bench.core.errors import BadInputError
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.patches import unpatchify
from neco_bench.features.transforms import resize_nearest_pil
from neco_bench.metrics import segmentation


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: the grid on the held-out images, then the val images; all patches are in memory."""
    size, classes = settings.input_size_for(stride), len(data["val"].classes)
    patches, images = (size // stride) ** 2, len(data["train"])
    wide = 12.0 if settings.method == "logreg" else 4.0  # bytes per number: logistic regression has a copy in float64
    rows = min(images * patches, settings.max_patches or images * patches)
    held_out, val = settings.holdout * images * patches, len(data["val"]) * patches
    neighbours = 0.0
    if settings.method == "knn":
        fitted = len(hold_out(images, settings.holdout, settings.holdout_seed)[0]) * patches
        check_ks(max(settings.ks), fitted)
        neighbours = 36.0 * max(settings.ks) * max(held_out, val)  # scores and ids of two blocks at a time
        operations = 2.0 * rows * dimension * (len(settings.distances) * held_out + val)
    else:
        fits = len(settings.regularisations) + 1
        operations = 4.0 * rows * dimension * classes * fits * settings.max_iterations
    return Cost(
        images=images + len(data["val"]),
        size=size,
        width=dimension,
        operations=operations,
        memory=neighbours
        + rows * wide * dimension
        + (held_out + val) * 4.0 * dimension
        + (rows + held_out + val) * 2.0 * stride**2
        + 4.0 * len(data["val"]) * classes**2,
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the mIoU on data["val"] of the probe fitted on the patches of data["train"]."""
    train, val = data["train"], data["val"]
    size = settings.input_size_for(encoder.stride)
    side = size // encoder.stride
    extractor = FeatureExtractor(encoder, context, mean=settings.mean, std=settings.std)
    patches, split, scaler = read_train(extractor, train, settings, size)
    queries, masks = read_val(extractor, val, settings, size)
    if settings.standardise:
        standardise(patches.features, scaler)
        standardise(queries, scaler)
    # k-NN can predict void, which is an additional class without ground truth.
    extra = ("void",) if settings.method == "knn" and settings.void != "never votes" else ()

    def class_map(blocks: Tensor, shape: tuple[int, ...]) -> np.ndarray:
        """Return the predicted blocks (N, A) of an image as a class map of the size of its mask."""
        return resize_nearest_pil(unpatchify(blocks.clamp(max=len(val.classes)), side), *shape)

    held_out = [unpatchify(blocks, side) for blocks in patches.blocks[split:].split(side**2)]

    def select(predicted: Tensor) -> float:
        """Return the mIoU of predicted blocks on the held-out images."""
        counts = segmentation.ImageConfusions(len(val.classes) + len(extra))
        for blocks, truth in zip(predicted.split(side**2), held_out, strict=True):
            counts.add(truth, class_map(blocks, truth.shape))
        value = segmentation.mean_iou(counts.total(), absent=settings.absent)
        if np.isnan(value):
            raise BadInputError(
                f"The {len(held_out)} held-out training images have no labelled pixel, so nothing can be selected on "
                f"them. Use more images, or --set holdout_seed=1."
            )
        return value

    device = encoder.device if encoder.device.type == "cuda" else torch.device("cpu")
    probe: KnnProbe | LogisticProbe = LogisticProbe(settings, context, device)
    if settings.method == "knn":
        probe = KnnProbe(settings, len(val.classes), device)
    with context.phase("select"):
        grid = {point: select(blocks) for point, blocks in probe.grid(patches[:split], patches.features[split:])}
    best = max(grid, key=lambda point: grid[point])
    scores = {probe.name(point): value for point, value in grid.items()}
    context.note(held_out_mIoU=scores, chosen=probe.name(best))
    with context.phase("predict"):
        predicted = probe.predict(refit_rows(patches, split), queries.flatten(0, 1), best)

    score = SegmentationScore(val, settings, context, extra_classes=extra)
    with context.phase("score"):
        for item, (blocks, mask) in enumerate(zip(predicted.split(side**2), masks, strict=True)):
            features = partial(feature_map, queries[item], side)
            score.add(item, mask, class_map(blocks, mask.shape), features=features)
    return score.outcome(used_size=size, resize="bicubic squash")


def feature_map(rows: Tensor, columns: int) -> Tensor:
    """Return the features (h*w, D) of an image's patches as a map (D, h, w)."""
    return rows.T.unflatten(1, (-1, columns))
