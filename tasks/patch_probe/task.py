"""Patch probe: label patches by their nearest training patches, or by logistic regression on them.

Protocol of CAPI's `eval_segmentation.py` (`capi-1`, quirks included; Darcet et al., 2025) and without its quirks
(`clean-1`). README.md lists them. Every patch carries its block of pixel labels: k-NN votes per pixel of the block,
logistic regression gives the whole block one class. The grid (k and distance, or C) is chosen on held-out training
images, at the input size.

Known deviations from the reference: the held-out images are drawn by image count and seed, not by file order; features
are standardised by float64 sums; logistic regression is scikit-learn's in float64, not cuML's in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from scipy.optimize import minimize
from torch import Tensor

from neco_bench import metrics, statistics
from neco_bench.context import Context, Cost, Outcome, item_rng
from neco_bench.data.base import IGNORE, SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.errors import BadInputError, NumericalError, UsageError
from neco_bench.features.extract import stream
from neco_bench.features.patches import BicubicSquash, Void, cut, most_frequent, paste, rescaled, unit_length
from neco_bench.features.transforms import nearest_centre
from neco_bench.protocol import Settings as BaseSettings
from neco_bench.search import ExactIndex

Distance = Literal["cosine", "l2"]
CHUNK = 262144  # rows searched, multiplied or standardised at once
VOTE_BYTES = 128 * 2**20
LINE_SEARCH = 50  # steps of one line search at most


class Settings(BaseSettings):
    """Constants of a protocol and a card; sizes in pixels.

    ks and distances: the grid of method "knn"; regularisations: that of "logreg", the inverse strengths C.
    max_iterations, tolerance: L-BFGS stops after so many, or where all of the gradient of the mean loss is smaller.
    holdout: share of the training images that choose within the grid. void: whether ignored pixels vote, and who wins a
    tie. max_patches: of the training images together, equally many from each (None: all).
    """

    method: Literal["knn", "logreg"]
    ks: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    distances: Annotated[tuple[Distance, ...], Field(min_length=1)]
    regularisations: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    max_iterations: PositiveInt
    tolerance: NonNegativeFloat
    holdout: Annotated[float, Field(gt=0, lt=1)]
    holdout_seed: NonNegativeInt
    standardise: bool
    void: Void
    max_patches: PositiveInt | None = None
    score_at: Literal["input", "native"]
    absent: metrics.Absent


@dataclass
class Patches:
    """Rows on the CPU: features (N, D) float32, blocks (N, A) uint8 pixel labels, labels (N,) uint8 majority labels.

    A row whose label is IGNORE is not fitted on.
    """

    features: Tensor
    blocks: Tensor
    labels: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Patches:
        return Patches(self.features[rows], self.blocks[rows], self.labels[rows])

    def __setitem__(self, rows: slice, other: Patches) -> None:
        self.features[rows], self.blocks[rows], self.labels[rows] = other.features, other.blocks, other.labels

    def __len__(self) -> int:
        return len(self.labels)


class Moments:
    """Mean and population deviation of rows (n, D) as they come, in float64 (Chan et al. 1979)."""

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean, self._squares = torch.zeros(2, dimension, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        rows = rows.double()
        total, mean = self.count + len(rows), rows.mean(0)
        shift = mean - self.mean
        self._squares += (rows - mean).square().sum(0) + shift.square() * (self.count * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.count = total

    def standardise(self, features: Tensor) -> None:
        """(N, D) float32 in place: mean 0, deviation 1; dimensions that were constant are only shifted."""
        deviation = (self._squares / self.count).sqrt().float()
        deviation[deviation == 0] = 1
        for part in features.split(CHUNK):
            part.sub_(self.mean.float()).div_(deviation)


def hold_out(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Sorted image indices to fit on and to choose with: floor(count * share) held out, at least one.

    They are the first of a permutation that depends on (seed, count) alone. Raises UsageError for a single image.
    """
    if count < 2:
        raise UsageError(f"{count} training image leaves none to hold out for the grid. Use --limit 2 or more.")
    order = item_rng(seed, "holdout", count).permutation(count)
    held = min(count - 1, max(1, int(count * share + 1e-9)))
    return sorted(order[held:].tolist()), sorted(order[:held].tolist())


def search_keys(features: Tensor, distance: Distance) -> Tensor:
    """Rows whose inner product with `search_queries` of a query falls with its distance to the features (n, D)."""
    if distance == "cosine":
        return unit_length(features, 1)
    return torch.cat([features, features.square().sum(1, keepdim=True) / -2], 1)


def search_queries(features: Tensor, distance: Distance) -> Tensor:
    return F.pad(features, (0, 1), value=1.0) if distance == "l2" else rescaled(features, 1)


def check_ks(k: int, patches: int) -> None:
    """Raise UsageError where k exceeds the number of training patches."""
    if k > patches:
        raise UsageError(
            f"{k} neighbours were asked for, but there are {patches} training patches. Use smaller numbers in "
            f"--set 'ks=[1, 3]', or more images."
        )


def nearest_rows(keys: Tensor, queries: Tensor, k: int, distance: Distance, device: torch.device) -> Tensor:
    """(Q, k) int64 ids of the rows of `keys` (N, D) nearest to each query (Q, D), nearest first; exact.

    Both stay where they are, CHUNK rows of each go to the device. Raises UsageError where k exceeds N.
    """
    check_ks(k, len(keys))
    offset = keys.mean(0) if distance == "l2" else 0  # left in, it would cancel digits
    scores = torch.full((len(queries), k), -torch.inf)
    ids = torch.zeros(len(queries), k, dtype=torch.int64)
    for start in range(0, len(keys), CHUNK):
        rows = search_keys(keys[start : start + CHUNK] - offset, distance)
        index = ExactIndex(rows.shape[1], device)
        index.add(rows)
        for s, i, part in zip(scores.split(CHUNK), ids.split(CHUNK), queries.split(CHUNK), strict=True):
            found, where = index.search(search_queries(part - offset, distance), min(k, len(rows)))
            s[:], order = torch.cat([s, found], 1).topk(k)
            i[:] = torch.cat([i, where + start], 1).gather(1, order)
    return ids


def vote(patches: Patches, ids: Tensor, classes: int, void: Void, device: torch.device) -> Tensor:
    """(Q, A) uint8 most frequent label of the neighbours `ids` (Q, k), for each pixel of the block on its own.

    IGNORE where void won. Where void never votes and no neighbour has a label at a pixel, their majority labels vote.
    """
    (count, k), area = ids.shape, patches.blocks.shape[1]
    voted = torch.empty(count, area, dtype=torch.uint8)
    step = max(1, VOTE_BYTES // (area * (12 * k + 8 * classes)))
    for out, rows in zip(voted.split(step), ids.split(step), strict=True):
        pixels = patches.blocks[rows].to(device).transpose(1, 2).reshape(-1, k)
        winners = most_frequent(pixels, classes, void).view(-1, area)
        if void == "never votes":
            fallback = most_frequent(patches.labels[rows].to(device), classes, void)
            winners = torch.where(winners == IGNORE, fallback[:, None], winners)
        out[:] = winners
    return voted


@dataclass
class Logistic:
    """A fitted multinomial model: weights (K, D + 1), the last column the intercepts, of the classes (K,) uint8.

    converged: False where it was stopped before the optimum, by the number of iterations or by the line search.
    """

    weights: Tensor
    classes: Tensor
    iterations: int
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """(n, K) of features (n, D), on the device of the weights."""
        return F.linear(features.to(self.weights), self.weights[:, :-1], self.weights[:, -1])

    def predict(self, features: Tensor) -> Tensor:
        """(N,) uint8 class ids, on the CPU."""
        return torch.cat([self.classes[self.logits(part).argmax(1).cpu()] for part in features.split(CHUNK)])


def fit_logistic(
    features: Tensor, labels: Tensor, c: float, *, max_iterations: int, tolerance: float, device: torch.device
) -> Logistic:
    """Minimise c * (sum of cross-entropies) + |W|²/2 over features (N, D) and labels (N,) uint8; intercepts are free.

    By scikit-learn on CPUs, by its optimiser on GPUs, both in float64: in float32, L-BFGS stops before the optimum.
    Only classes that occur are fitted; two of them by one vector of weights. Raises NumericalError where features are
    not finite.
    """
    if not torch.isfinite(features).all():
        raise NumericalError(f"Logistic regression with C = {c:g} was given features that are not finite.")
    present, target = labels.unique(return_inverse=True)
    if len(present) == 1:
        weights = torch.zeros(1, features.shape[1] + 1, dtype=torch.float64, device=device)
        return Logistic(weights, present, 0, converged=True)
    if device.type == "cuda":
        return fit_on_device(features, target, present, c, max_iterations, tolerance, device)
    from sklearn.exceptions import ConvergenceWarning  # takes a second
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ConvergenceWarning)
        model = LogisticRegression(C=c, max_iter=max_iterations, tol=tolerance).fit(
            features.double().numpy(), target.numpy()
        )
    weights = torch.from_numpy(np.column_stack([model.coef_, model.intercept_]))
    if len(present) == 2:  # of the second class alone
        weights = torch.cat([torch.zeros_like(weights), weights])
    stopped = any(issubclass(warning.category, ConvergenceWarning) for warning in told)
    return Logistic(weights, present, int(model.n_iter_[0]), converged=not stopped)


def fit_on_device(
    features: Tensor,
    target: Tensor,
    present: Tensor,
    c: float,
    max_iterations: int,
    tolerance: float,
    device: torch.device,
) -> Logistic:
    """The same by SciPy's L-BFGS-B with the options of scikit-learn, products on the device, CHUNK rows at a time.

    A step on all of ADE20K is 10^12 operations, and scikit-learn uses GPUs on Python 3.11 and newer only.
    target: (N,) int64 places among the classes `present`.
    """
    target = target.to(device)
    shape = len(present), features.shape[1] + 1
    strength = 1 / (c * len(features)) * (2 if len(present) == 2 else 1)  # a vector is there as two halves here

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.tensor(flat.reshape(shape), device=device, requires_grad=True)
        loss = weights[:, :-1].square().sum() * strength / 2
        loss.backward()
        total = loss.item()
        for x, y in zip(features.split(CHUNK), target.split(CHUNK), strict=True):
            logits = F.linear(x.to(weights), weights[:, :-1], weights[:, -1])
            loss = F.cross_entropy(logits, y, reduction="sum") / len(features)
            loss.backward()
            total += loss.item()
        assert weights.grad is not None
        return total, weights.grad.cpu().numpy().ravel()

    found = minimize(
        objective,
        np.zeros(shape).ravel(),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": max_iterations,
            "maxfun": LINE_SEARCH * max_iterations,
            "maxls": LINE_SEARCH,
            "gtol": tolerance,
            "ftol": 64 * np.finfo(float).eps,
        },
    )
    weights = torch.from_numpy(found.x.reshape(shape)).to(device)
    return Logistic(weights, present, found.nit, found.success)


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

    def score(predicted: Tensor, truths: list[np.ndarray]) -> metrics.ImageConfusions:
        """Confusions of predicted blocks (N, A), image after image, with masks of any resolution."""
        confusions = metrics.ImageConfusions(len(names))
        for blocks, truth in zip(predicted.split(side**2), truths, strict=True):
            labels = paste(blocks.clamp(max=len(val.classes)), side)
            confusions.add(truth, nearest_centre(labels, *truth.shape))
        return confusions

    held_out = [paste(blocks, side) for blocks in patches.blocks[split:].split(side**2)]

    def select(predicted: Tensor) -> float:
        value = metrics.mean_iou(score(predicted, held_out).total(), absent=settings.absent)
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
            labels = paste(predicted[position * side**2 : (position + 1) * side**2], side)
            context.seen[name]["prediction"] = nearest_centre(labels.clip(max=len(val.classes)), *masks[position].shape)
    per_image, total = confusions.per_image(), confusions.total()
    return Outcome(
        metrics={
            "mIoU": metrics.mean_iou(total, absent=settings.absent),
            "mIoU_present": metrics.mean_iou(total, absent="exclude"),
            "pixel_accuracy": float(np.trace(total) / max(1, total.sum())),
        },
        per_class={"IoU": metrics.named(metrics.iou_per_class(total), names)},
        ci95={"mIoU": statistics.bootstrap_miou(per_image, absent=settings.absent, seed=context.seed)},
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
    transform = BicubicSquash(size, resize_mask=True)
    for batch in stream(encoder, train, transform, context, "train", items=items, mean=settings.mean, std=settings.std):
        features = batch.features.flatten(2).transpose(1, 2).cpu()
        for position, image, mask in zip(batch.positions, features, batch.masks, strict=True):
            blocks = cut(train.scored(mask), encoder.stride)
            rows = Patches(image, blocks, most_frequent(blocks, len(train.classes), void))
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
    transform = BicubicSquash(size, resize_mask=settings.score_at == "input")
    for batch in stream(encoder, val, transform, context, "val", mean=settings.mean, std=settings.std):
        features[list(batch.positions)] = batch.features.flatten(2).transpose(1, 2).cpu()
        masks += [val.scored(mask) for mask in batch.masks]
        for position, image in zip(batch.positions, batch.features, strict=True):
            if val.ids[position] in context.watched:
                context.seen[val.ids[position]] = {"features": image.cpu(), "truth": masks[position]}
    return features.flatten(0, 1), masks
