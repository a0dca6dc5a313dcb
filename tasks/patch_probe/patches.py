"""Patches with their labels, and the selection of training patches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from neco_bench.tasks.patch_probe.settings import Settings
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from neco_bench.core.errors import BadInputError, UsageError
from neco_bench.core.rng import item_rng
from neco_bench.data.base import IGNORE, SegmentationDataset, Void
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.patches import majority_label, patchify
from neco_bench.features.transforms import ResizeSquare

CHUNK = 262144  # number of rows that are searched, multiplied or standardised at once


@dataclass
class Patches:
    """Rows on the CPU: features (N, D) float32, blocks (N, A) uint8 pixel labels, labels (N,) uint8 majority labels.

    Rows whose label is IGNORE are not used for fitting.
    """

    features: Tensor
    blocks: Tensor
    labels: Tensor

    @classmethod
    def empty(cls, rows: int, dimension: int, area: int) -> Patches:
        """Reserve memory for a number of rows with `dimension` features and `area` pixels each."""
        blocks, labels = torch.empty(rows, area, dtype=torch.uint8), torch.empty(rows, dtype=torch.uint8)
        return cls(torch.empty(rows, dimension), blocks, labels)

    def __getitem__(self, rows: slice | Tensor) -> Patches:
        return Patches(self.features[rows], self.blocks[rows], self.labels[rows])

    def __setitem__(self, rows: slice, other: Patches) -> None:
        self.features[rows], self.blocks[rows], self.labels[rows] = other.features, other.blocks, other.labels

    def __len__(self) -> int:
        return len(self.labels)


def standardise(features: Tensor, scaler: StandardScaler) -> None:
    """Standardise features (..., D) float32 in place, with the mean and deviation of a fitted scaler."""
    mean, deviation = torch.from_numpy(scaler.mean_).float(), torch.from_numpy(scaler.scale_).float()
    for part in features.view(-1, features.shape[-1]).split(CHUNK):
        part.sub_(mean).div_(deviation)


def hold_out(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split images into those for fitting and those held out for selection: sorted indices of each.

    floor(count * share) images are held out, but at least one: the first of a permutation that depends only on (seed,
    count). Raises UsageError for a single image.
    """
    if count < 2:
        raise UsageError(f"{count} training image leaves none to hold out for the grid. Use --limit 2 or more.")
    order = item_rng(seed, "holdout", count).permutation(count)
    first = min(count - 1, max(1, int(count * share + 1e-9)))
    return sorted(order[first:].tolist()), sorted(order[:first].tolist())


def read_train(
    extractor: FeatureExtractor, train: SegmentationDataset, settings: Settings, size: int
) -> tuple[Patches, int, StandardScaler]:
    """Read patches of the images for fitting, then, from the returned row on, all patches of the held-out images.

    Patches for fitting are stored only if they have a majority label, at most max_patches / images per image; the
    scaler is fitted on all of them. Raises UsageError for a single image, BadInputError if no patch has a majority
    label.
    """
    encoder, context = extractor.encoder, extractor.context
    fit, held_out = hold_out(len(train), settings.holdout, settings.holdout_seed)
    items = [(0, image) for image in fit + held_out]
    tokens, area, dimension = (size // encoder.stride) ** 2, encoder.stride**2, encoder.embed_dim
    quota = min(tokens, max(1, settings.max_patches // len(train))) if settings.max_patches else tokens
    patches = Patches.empty(len(fit) * quota + len(held_out) * tokens, dimension, area)
    # The same rule for ties as in votes; if void never votes, patches that are mostly void are dropped nevertheless.
    void: Void = "wins ties" if settings.void == "wins ties" else "loses ties"
    scaler = StandardScaler()
    stop = split = dropped = 0
    transform = ResizeSquare(size, "pil", bicubic=True)
    for batch in extractor.stream(train, transform, "train", items=items):
        features = batch.features.flatten(2).transpose(1, 2).cpu()
        for position, image, mask in zip(batch.positions, features, batch.masks, strict=True):
            blocks = patchify(train.eval_mask(mask), encoder.stride)
            rows = Patches(image, blocks, majority_label(blocks, len(train.classes), void))
            dropped += int((rows.labels == IGNORE).sum())
            drop_above(quota, rows.labels, item_rng(context.seed, "patches", train.ids[items[position][1]]))
            if position < len(fit):
                scaler.partial_fit(image.numpy())
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
    context.note(training_patches=fitted, dropped_patches=dropped, held_out_images=len(held_out))
    return patches[:stop], split, scaler


def drop_above(quota: int, labels: Tensor, rng: np.random.Generator) -> None:
    """Set random labels (N,) of an image to IGNORE, until `quota` are left."""
    usable = np.flatnonzero(labels.numpy() != IGNORE)
    if len(usable) > quota:
        labels[torch.from_numpy(rng.permutation(usable)[quota:])] = IGNORE


def read_val(
    extractor: FeatureExtractor, val: SegmentationDataset, settings: Settings, size: int
) -> tuple[Tensor, list[np.ndarray]]:
    """Read the features (n, N, D) of the patches of each image, on the CPU, and one mask per image for scoring."""
    encoder = extractor.encoder
    tokens = (size // encoder.stride) ** 2
    features, masks = torch.empty(len(val), tokens, encoder.embed_dim), list[np.ndarray]()
    transform = ResizeSquare(size, "pil" if settings.score_at == "input" else "native", bicubic=True)
    for batch in extractor.stream(val, transform, "val"):
        features[list(batch.positions)] = batch.features.flatten(2).transpose(1, 2).cpu()
        masks += batch.masks
    return features, masks


def refit_rows(patches: Patches, split: int) -> Patches:
    """Return all rows for fitting: held-out rows without a label are overwritten by the next ones."""
    held_out = patches[split:]
    usable = held_out[held_out.labels != IGNORE]
    stop = split + len(usable)
    patches[split:stop] = usable
    return patches[:stop]
