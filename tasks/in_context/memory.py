"""The memory bank: labelled patches, how they are chosen and searched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from neco_bench.tasks.in_context.augment import HummingbirdTrain
from neco_bench.tasks.in_context.settings import Settings
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from neco_bench.core import distributed
from neco_bench.core.errors import NOTHING_LABELLED, BadInputError
from neco_bench.core.rng import item_rng
from neco_bench.core.task import Context, Neighbour
from neco_bench.data.base import IGNORE, SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import stream
from neco_bench.features.patches import patch_view, rescaled, unit_length
from neco_bench.search.approximate import ApproximateIndex
from neco_bench.search.exact import ExactIndex, SharedIndex


def patch_labels(mask: np.ndarray, stride: int, classes: int) -> np.ndarray:
    """(N, C) float32 class shares of each stride x stride patch, row-major; void pixels count for no class."""
    rows, columns = mask.shape[0] // stride, mask.shape[1] // stride
    patches = mask.reshape(rows, stride, columns, stride).swapaxes(1, 2).reshape(rows * columns, -1).astype(np.int64)
    cells = np.arange(rows * columns)[:, None] * (classes + 1) + np.where(patches == IGNORE, classes, patches)
    counts = np.bincount(cells.ravel(), minlength=rows * columns * (classes + 1))
    return (counts.reshape(-1, classes + 1)[:, :classes] / stride**2).astype(np.float32)


def choose_patches(labels: np.ndarray, noise: np.ndarray, count: int) -> np.ndarray:
    """Ids of at most `count` patches of one image, rare classes favoured, by increasing noisy score.

    score = sum over the classes in the patch of how many patches of this image hold that class; the patches with the
    smallest score * noise are kept. labels (N, C), noise (N,) in [0, 1). Patches without any label are never chosen.
    """
    present = labels > 0
    score = (present * present.sum(0)).sum(1).astype(np.float32) * noise
    score[~present.any(1)] = np.inf
    order = np.argsort(score, kind="stable")[:count]
    return order[np.isfinite(score[order])]


Index = ExactIndex | ApproximateIndex | SharedIndex


@dataclass
class Memory:
    """Labelled patches: the index over their unit-length features, their class shares (M, C) float32, and where they
    come from: (epoch, image, its patches) of each augmented training image, in the order of the rows. Of several
    processes each has its own part of the index."""

    index: Index
    labels: csr_matrix
    origins: list[tuple[int, int, np.ndarray]]


def retrieve(index: Index, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and row ids (Q, k) of the nearest memory rows, which have unit length; queries (Q, D) as they are.

    Queries are not normalised before the search, as in the reference: the order is the same, but where two rows tie the
    rounding decides, and so decides alike. They are divided by powers of two, which alters no digit.
    """
    queries = rescaled(queries, 1)
    scores, ids = index.search(queries, k)
    return scores / queries.norm(dim=1, keepdim=True).clamp_min(1e-12).to(scores.device), ids


def read_labels(scores: Tensor, ids: Tensor, labels: csr_matrix, temperature: float) -> Tensor:
    """(Q, C) predicted class shares: softmax over the k cosines (Q, k) / temperature, times the neighbours' labels.

    labels: (M, C) float32 shares, sparse, as a patch holds few classes.
    """
    weights = torch.softmax(scores / temperature, dim=1).numpy()
    starts = np.arange(len(ids) + 1) * ids.shape[1]
    mix = csr_matrix((weights.ravel(), ids.numpy().ravel(), starts), (len(ids), labels.shape[0]))
    return torch.from_numpy((mix @ labels).toarray())


def build_memory(
    encoder: Encoder, train: SegmentationDataset, settings: Settings, context: Context, size: int
) -> Memory:
    """The memory of `settings.passes` augmented copies of each training image, size x size pixels each.

    Raises BadInputError where they have no labelled pixel.
    """
    transform = _augmentation(settings, size)
    items = [(epoch, i) for epoch in range(settings.passes) for i in range(len(train))]
    per_image = None if settings.memory_size is None else max(1, settings.memory_size // len(items))
    patches = (size // encoder.stride) ** 2
    most = -(-len(items) // distributed.world()) * min(patches, per_image or patches)
    index: ExactIndex | ApproximateIndex
    if settings.search == "exact":
        index = ExactIndex(encoder.embed_dim, encoder.device, capacity=most)
    else:
        index = ApproximateIndex(settings.search, encoder.embed_dim)
    labels, origins, labelled = [], [], False
    for batch in stream(
        encoder, train, transform, context, "memory", items=items, own=True, mean=settings.mean, std=settings.std
    ):
        with context.phase("memory"):
            features = unit_length(batch.features.flatten(2).transpose(1, 2), 2)
            for position, tokens, mask in zip(batch.positions, features, batch.masks, strict=True):
                labelled = labelled or bool((mask != IGNORE).any())
                if settings.void_in_memory == "class 0":
                    mask = np.where(mask == IGNORE, 0, mask)
                share = patch_labels(mask, encoder.stride, len(train.classes))
                epoch, image = items[position]
                noise = item_rng(context.seed, "memory", epoch, train.ids[image]).random(len(share), np.float32)
                chosen = np.flatnonzero(share.any(1)) if per_image is None else choose_patches(share, noise, per_image)
                share = share[chosen]
                labels.append(csr_matrix(share / share.sum(1, keepdims=True)))
                origins.append((epoch, image, chosen.astype(np.int32)))
                index.add(tokens[torch.from_numpy(chosen).to(tokens.device)])
    if not any(distributed.gather(labelled)):
        raise BadInputError(NOTHING_LABELLED)
    if distributed.world() == 1:
        return Memory(index, vstack(labels, format="csr"), origins)
    every = [row for part in distributed.gather(labels) for row in part]
    return Memory(
        SharedIndex(index), vstack(every, format="csr"), [row for part in distributed.gather(origins) for row in part]
    )


def _augmentation(settings: Settings, size: int) -> HummingbirdTrain:
    return HummingbirdTrain(
        size, settings.jitter, settings.jitter_probability, settings.crop_scale, settings.crop_ratio
    )


def find_neighbours(
    memory: Memory,
    scores: Tensor,
    ids: Tensor,
    train: SegmentationDataset,
    settings: Settings,
    size: int,
    stride: int,
    seed: int,
) -> Callable[[int], list[Neighbour]]:
    """What a patch of an image with scores and ids (N, k) found; to be looked at, images are augmented again."""
    ends = np.cumsum([len(patches) for _, _, patches in memory.origins])

    def found(patch: int) -> list[Neighbour]:
        rows = []
        for cosine, row in zip(scores[patch].tolist(), ids[patch].tolist(), strict=True):
            place = int(np.searchsorted(ends, row, side="right"))
            epoch, number, patches = memory.origins[place]
            image, _ = _augmentation(settings, size)(train[number], item_rng(seed, "augment", epoch, train.ids[number]))
            origin = int(patches[row - int(ends[place])])  # counted from the end of its image
            label = int(memory.labels[row].toarray().argmax())
            rows.append(Neighbour(cosine, label, patch_view(image, stride, origin)))
        return rows

    return found
