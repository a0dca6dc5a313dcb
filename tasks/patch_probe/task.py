"""Patch probe: label patches by their nearest training patches, or by logistic regression on them.

Protocol of CAPI's `eval_segmentation.py` (`capi-1`, quirks included; Darcet et al., 2025) and without its quirks
(`clean-1`). README.md lists them. Every patch carries its block of pixel labels: k-NN votes per pixel of the block,
logistic regression gives the whole block one class. The grid (k and distance, or C) is chosen on held-out training
images, at the input size.

Known deviations from the reference: the held-out images are drawn by image count and seed, not by file order; features
are standardised by float64 sums; logistic regression is scikit-learn's in float64, not cuML's in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from neco_bench.tasks.patch_probe.knn import check_ks, nearest_rows, vote
from neco_bench.tasks.patch_probe.logistic import Logistic, fit_logistic
from neco_bench.tasks.patch_probe.patches import Moments, Patches
from neco_bench.tasks.patch_probe.settings import Settings
from torch import Tensor

from neco_bench.core.errors import BadInputError, UsageError
from neco_bench.core.rng import item_rng
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import IGNORE, SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import stream
from neco_bench.features.patches import BicubicResizeSquare, Void, majority_label, patchify, unpatchify
from neco_bench.features.transforms import resize_nearest_pil
from neco_bench.metrics import bootstrap, segmentation


def hold_out(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Sorted image indices to fit on and to choose with: floor(count * share) held out, at least one.

    They are the first of a permutation that depends on (seed, count) alone. Raises UsageError for a single image.
    """
    if count < 2:
        raise UsageError(f"{count} training image leaves none to hold out for the grid. Use --limit 2 or more.")
    order = item_rng(seed, "holdout", count).permutation(count)
    held = min(count - 1, max(1, int(count * share + 1e-9)))
    return sorted(order[held:].tolist()), sorted(order[:held].tolist())


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """What `run` will take: all patches are kept in memory; the grid on the held-out images, then the val images."""
    size, classes = settings.used_size(stride), len(data["val"].classes)
    patches, images = (size // stride) ** 2, len(data["train"])
    wide = 12.0 if settings.method == "logreg" else 4.0  # bytes of a number: logistic regression has a copy in float64
    rows = min(images * patches, settings.max_patches or images * patches)
    held, val = settings.holdout * images * patches, len(data["val"]) * patches
    found = 0.0
    if settings.method == "knn":
        fitted = len(hold_out(images, settings.holdout, settings.holdout_seed)[0]) * patches
        check_ks(max(settings.ks), fitted)
        found = 36.0 * max(settings.ks) * max(held, val)  # scores and ids, of two blocks at a time
        operations = 2.0 * rows * dimension * (len(settings.distances) * held + val)
    else:
        fits = len(settings.regularisations) + 1
        operations = 4.0 * rows * dimension * classes * fits * settings.max_iterations
    return Cost(
        images=images + len(data["val"]),
        size=size,
        width=dimension,
        operations=operations,
        memory=found
        + rows * wide * dimension
        + (held + val) * 4.0 * dimension
        + (rows + held + val) * 2.0 * stride**2
        + 4.0 * len(data["val"]) * classes**2,
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """mIoU on data["val"] of the probe fitted on the patches of data["train"]."""
    train, val = data["train"], data["val"]
    size = settings.used_size(encoder.stride)
    side = size // encoder.stride
    patches, split, moments = read_train(encoder, train, settings, context, size)
    queries, masks = read_val(encoder, val, settings, context, size)
    if settings.standardise:
        moments.standardise(patches.features)
        moments.standardise(queries)
    # What k-NN predicts may be void: a class of its own, which is in nobody's ground truth.
    void_row = settings.method == "knn" and settings.void != "never votes"
    names = (*val.classes, "void") if void_row else val.classes

    def score(predicted: Tensor, truths: list[np.ndarray]) -> segmentation.ImageConfusions:
        """Confusions of predicted blocks (N, A), image after image, with masks of any resolution."""
        confusions = segmentation.ImageConfusions(len(names))
        for blocks, truth in zip(predicted.split(side**2), truths, strict=True):
            labels = unpatchify(blocks.clamp(max=len(val.classes)), side)
            confusions.add(truth, resize_nearest_pil(labels, *truth.shape))
        return confusions

    held_out = [unpatchify(blocks, side) for blocks in patches.blocks[split:].split(side**2)]

    def select(predicted: Tensor) -> float:
        value = segmentation.mean_iou(score(predicted, held_out).total(), absent=settings.absent)
        if np.isnan(value):
            raise BadInputError(
                f"The {len(held_out)} held-out training images have no labelled pixel, so nothing can be chosen on "
                f"them. Use more images, or --set holdout_seed=1."
            )
        return value

    probe = probe_knn if settings.method == "knn" else probe_logistic
    device = encoder.device if encoder.device.type == "cuda" else torch.device("cpu")
    predicted = probe(patches, split, queries, select, settings, context, len(val.classes), device)
    with context.phase("score"):
        confusions = score(predicted, masks)
    for position, name in enumerate(val.ids):
        if name in context.watched:
            labels = unpatchify(predicted[position * side**2 : (position + 1) * side**2], side)
            context.seen[name]["prediction"] = resize_nearest_pil(
                labels.clip(max=len(val.classes)), *masks[position].shape
            )
    per_image, total = confusions.per_image(), confusions.total()
    return Outcome(
        metrics={
            "mIoU": segmentation.mean_iou(total, absent=settings.absent),
            "mIoU_present": segmentation.mean_iou(total, absent="exclude"),
            "pixel_accuracy": float(np.trace(total) / max(1, total.sum())),
        },
        per_class={"IoU": segmentation.by_class(segmentation.iou_per_class(total), names)},
        ci95={"mIoU": bootstrap.bootstrap_miou(per_image, absent=settings.absent, seed=context.seed)},
        n_images=len(confusions),
        statistics={"confusion": per_image},
        features={"input_size": settings.input_size, "used_size": size, "resize": "bicubic squash", "final_norm": True},
    )


def probe_knn(
    patches: Patches,
    split: int,
    queries: Tensor,
    select: Callable[[Tensor], float],
    settings: Settings,
    context: Context,
    classes: int,
    device: torch.device,
) -> Tensor:
    """(Q, A) blocks predicted for the queries by the best k and distance; one search per distance serves every k.

    patches[:split] are fitted on for the choice, patches[split:] are held out; `patches` is overwritten.
    """
    fitted, held = patches[:split], patches[split:]
    with context.phase("select"):
        found = {
            d: nearest_rows(fitted.features, held.features, max(settings.ks), d, device) for d in settings.distances
        }
        grid = {
            (k, d): select(vote(fitted, found[d][:, :k], classes, settings.void, device))
            for k in settings.ks
            for d in settings.distances
        }
    k, distance = max(grid, key=lambda point: grid[point])
    scores = {f"k={k} {d}": value for (k, d), value in grid.items()}
    context.notes |= {"held_out_mIoU": scores, "chosen": f"k={k} {distance}"}
    everything = refit_rows(patches, split)
    with context.phase("predict"):
        ids = nearest_rows(everything.features, queries, k, distance, device)
        return vote(everything, ids, classes, settings.void, device)


def probe_logistic(
    patches: Patches,
    split: int,
    queries: Tensor,
    select: Callable[[Tensor], float],
    settings: Settings,
    context: Context,
    classes: int,
    device: torch.device,
) -> Tensor:
    """As `probe_knn`, by logistic regression with the best C: one class for all of a block."""
    area = patches.blocks.shape[1]

    def fit(rows: Patches, c: float) -> Logistic:
        return fit_logistic(
            to_device(rows.features, device),
            rows.labels,
            c,
            max_iterations=settings.max_iterations,
            tolerance=settings.tolerance,
            device=device,
        )

    fitted, held = patches[:split], patches[split:]
    with context.phase("select"):
        grid = {
            c: select(fit(fitted, c).predict(held.features)[:, None].expand(-1, area))
            for c in context.track(settings.regularisations, "select")
        }
    c = max(grid, key=lambda point: grid[point])
    scores = {f"C={c:.4g}": value for c, value in grid.items()}
    context.notes |= {"held_out_mIoU": scores, "chosen": f"C={c:.4g}"}
    with context.phase("predict"):
        model = fit(refit_rows(patches, split), c)
        context.notes |= {"iterations": model.iterations, "converged": model.converged}
        return model.predict(queries)[:, None].expand(-1, area)


def refit_rows(patches: Patches, split: int) -> Patches:
    """All rows to fit on: the held-out ones without a label to fit are overwritten by those behind them."""
    held = patches[split:]
    kept = held[held.labels != IGNORE]
    stop = split + len(kept)
    patches[split:stop] = kept
    return patches[:stop]


def to_device(features: Tensor, device: torch.device) -> Tensor:
    """The features on the device, or where they are if they do not fit there: then they travel once per iteration."""
    try:
        return features.to(device)
    except torch.OutOfMemoryError:
        return features


def read_train(
    encoder: Encoder, train: SegmentationDataset, settings: Settings, context: Context, size: int
) -> tuple[Patches, int, Moments]:
    """Patches of the images to fit on, then, from the returned row on, all patches of the held-out images.

    Of the former only those with a majority label are kept, at most max_patches / images; the moments are of all their
    patches. Raises UsageError for a single image, BadInputError where no patch has a majority label.
    """
    fit, held = hold_out(len(train), settings.holdout, settings.holdout_seed)
    items = [(0, image) for image in fit + held]
    tokens, area, dimension = (size // encoder.stride) ** 2, encoder.stride**2, encoder.embed_dim
    quota = min(tokens, max(1, settings.max_patches // len(train))) if settings.max_patches else tokens
    capacity = len(fit) * quota + len(held) * tokens
    patches = Patches(
        torch.empty(capacity, dimension),
        torch.empty(capacity, area, dtype=torch.uint8),
        torch.empty(capacity, dtype=torch.uint8),
    )
    # Whoever wins a tie of a vote wins one of a patch; where void never votes, it still drops what is mostly void.
    void: Void = "wins ties" if settings.void == "wins ties" else "loses ties"
    moments = Moments(dimension)
    stop = split = dropped = 0
    transform = BicubicResizeSquare(size, resize_mask=True)
    for batch in stream(encoder, train, transform, context, "train", items=items, mean=settings.mean, std=settings.std):
        features = batch.features.flatten(2).transpose(1, 2).cpu()
        for position, image, mask in zip(batch.positions, features, batch.masks, strict=True):
            blocks = patchify(train.scored(mask), encoder.stride)
            rows = Patches(image, blocks, majority_label(blocks, len(train.classes), void))
            dropped += int((rows.labels == IGNORE).sum())
            usable = np.flatnonzero(rows.labels.numpy() != IGNORE)
            rng = item_rng(context.seed, "patches", train.ids[items[position][1]])
            if len(usable) > quota:
                rows.labels[torch.from_numpy(rng.permutation(usable)[quota:])] = IGNORE
            if position < len(fit):
                moments.add(image)
                rows = rows[rows.labels != IGNORE]
            patches[stop : stop + len(rows)] = rows
            stop += len(rows)
            split = stop if position < len(fit) else split
    if not split:
        raise BadInputError(
            f"No patch of the {len(fit)} training images of {train.name!r} has a class as its most frequent label: "
            f"their masks are all or mostly void."
        )
    fitted = split + int((patches.labels[split:stop] != IGNORE).sum())
    context.notes |= {"training_patches": fitted, "dropped_patches": dropped, "held_out_images": len(held)}
    return patches[:stop], split, moments


def read_val(
    encoder: Encoder, val: SegmentationDataset, settings: Settings, context: Context, size: int
) -> tuple[Tensor, list[np.ndarray]]:
    """(N, D) features of all patches, image after image, on the CPU, and one mask per image to score on."""
    tokens = (size // encoder.stride) ** 2
    features, masks = torch.empty(len(val), tokens, encoder.embed_dim), []
    transform = BicubicResizeSquare(size, resize_mask=settings.score_at == "input")
    for batch in stream(encoder, val, transform, context, "val", mean=settings.mean, std=settings.std):
        features[list(batch.positions)] = batch.features.flatten(2).transpose(1, 2).cpu()
        masks += [val.scored(mask) for mask in batch.masks]
        for position, image in zip(batch.positions, batch.features, strict=True):
            if val.ids[position] in context.watched:
                context.seen[val.ids[position]] = {"features": image.cpu(), "truth": masks[position]}
    return features.flatten(0, 1), masks
