"""The memory bank: selection, storage and search of labelled patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from neco_bench.tasks.in_context.augment import HummingbirdTrain
from neco_bench.tasks.in_context.settings import Settings
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from neco_bench.core import distributed
from neco_bench.core.errors import NOTHING_LABELLED, BadInputError
from neco_bench.core.rng import item_rng
from neco_bench.core.task import Neighbour
from neco_bench.data.base import IGNORE, SegmentationDataset
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.patches import patch_view, rescaled, unit_length
from neco_bench.search.approximate import ApproximateIndex
from neco_bench.search.exact import ExactIndex, SharedIndex


def patch_labels(mask: np.ndarray, stride: int, classes: int) -> np.ndarray:
    """Compute class shares (N, C) float32 of stride x stride patches, row-major; void pixels belong to no class."""
    rows, columns = mask.shape[0] // stride, mask.shape[1] // stride
    patches = mask.reshape(rows, stride, columns, stride).swapaxes(1, 2).reshape(rows * columns, -1).astype(np.int64)
    cells = np.arange(rows * columns)[:, None] * (classes + 1) + np.where(patches == IGNORE, classes, patches)
    counts = np.bincount(cells.ravel(), minlength=rows * columns * (classes + 1))
    return (counts.reshape(-1, classes + 1)[:, :classes] / stride**2).astype(np.float32)


def choose_patches(labels: np.ndarray, noise: np.ndarray, count: int) -> np.ndarray:
    """Select at most `count` patches of an image, preferring rare classes; return indices by increasing noisy score.

    The score is the sum, over the classes in the patch, of the number of patches in this image that contain the class;
    labelled patches with the smallest score * noise are selected. labels: (N, C) class shares; noise: (N,) in [0, 1).
    """
    present = labels > 0
    score = (present * present.sum(0)).sum(1).astype(np.float32) * noise
    score[~present.any(1)] = np.inf
    order = np.argsort(score, kind="stable")[:count]
    return order[np.isfinite(score[order])]


Index = ExactIndex | ApproximateIndex | SharedIndex


@dataclass
class Memory:
    """Labelled patches and their origins.

    index: search index over their unit-length features; with several processes, each has a part of it. labels: (M, C)
    float32 class shares. origins: (epoch, image, its patches) of each augmented training image, in the order of the
    rows. view: returns the input (3, H, W) of an image in an epoch. stride: side of a patch in pixels.
    """

    index: Index
    labels: csr_matrix
    origins: list[tuple[int, int, np.ndarray]]
    view: Callable[[int, int], Tensor]
    stride: int

    def nearest(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the k rows nearest to each patch of features (B, D, h, w): cosines and row ids, (B, h*w, k) each."""
        queries = features.flatten(2).transpose(1, 2)
        cosines, rows = retrieve(self.index, queries.flatten(0, 1), k)
        return cosines.view(*queries.shape[:2], k), rows.view(*queries.shape[:2], k)

    def neighbours_of(self, cosines: Tensor, rows: Tensor) -> Callable[[], Callable[[int], list[Neighbour]]]:
        """Return, for `Context.record`, a function to the neighbours of each patch of an image; cosines, rows: (N, k).

        It applies the augmentation to the training images again.
        """
        return lambda: partial(self._neighbours, cosines, rows)

    def _neighbours(self, cosines: Tensor, rows: Tensor, patch: int) -> list[Neighbour]:
        ends = np.cumsum([len(patches) for _, _, patches in self.origins])
        neighbours = []
        for cosine, row in zip(cosines[patch].tolist(), rows[patch].tolist(), strict=True):
            place = int(np.searchsorted(ends, row, side="right"))
            epoch, image, patches = self.origins[place]
            origin = int(patches[row - int(ends[place])])  # counted from the end of its image
            label = int(self.labels[row].toarray().argmax())
            neighbours.append(Neighbour(cosine, label, patch_view(self.view(epoch, image), self.stride, origin)))
        return neighbours


def retrieve(index: Index, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the memory rows nearest to queries (Q, D): cosines and row ids (Q, k).

    Queries are not normalised before the search, as in the reference, so that rounding decides ties of rows as there.
    They are divided by powers of two, which is exact.
    """
    queries = rescaled(queries, 1)
    scores, ids = index.search(queries, k)
    return scores / queries.norm(dim=1, keepdim=True).clamp_min(1e-12).to(scores.device), ids


def read_labels(scores: Tensor, ids: Tensor, labels: csr_matrix, temperature: float) -> Tensor:
    """Predict class shares (Q, C): softmax over the k cosines (Q, k) / temperature, times the neighbours' labels.

    labels: (M, C) float32 shares; sparse, because a patch has few classes.
    """
    weights = torch.softmax(scores / temperature, dim=1).numpy()
    starts = np.arange(len(ids) + 1) * ids.shape[1]
    mix = csr_matrix((weights.ravel(), ids.numpy().ravel(), starts), (len(ids), labels.shape[0]))
    return torch.from_numpy((mix @ labels).toarray())


def build_memory(extractor: FeatureExtractor, train: SegmentationDataset, settings: Settings, size: int) -> Memory:
    """Build the memory from `settings.passes` augmented copies, of size x size pixels, of each training image.

    Raises BadInputError if no pixel is labelled.
    """
    encoder, context = extractor.encoder, extractor.context
    transform = HummingbirdTrain(
        size, settings.jitter, settings.jitter_probability, settings.crop_scale, settings.crop_ratio
    )
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
    for batch in extractor.stream(train, transform, "memory", items=items, own=True):
        with context.phase("memory"):
            features = unit_length(batch.features.flatten(2).transpose(1, 2), 2)
            for position, tokens, mask in zip(batch.positions, features, batch.masks, strict=True):
                labelled = labelled or bool((mask != IGNORE).any())
                if settings.void_in_memory == "class 0":
                    mask = np.where(mask == IGNORE, 0, mask)
                share = patch_labels(mask, encoder.stride, len(train.classes))
                epoch, image = items[position]
                noise = item_rng(context.seed, "memory", epoch, train.ids[image]).random(len(share), np.float32)
                selected = (
                    np.flatnonzero(share.any(1)) if per_image is None else choose_patches(share, noise, per_image)
                )
                share = share[selected]
                labels.append(csr_matrix(share / share.sum(1, keepdims=True)))
                origins.append((epoch, image, selected.astype(np.int32)))
                index.add(tokens[torch.from_numpy(selected).to(tokens.device)])
    if not any(distributed.gather(labelled)):
        raise BadInputError(NOTHING_LABELLED)
    every = [row for part in distributed.gather(labels) for row in part]
    places = [row for part in distributed.gather(origins) for row in part]

    def view(epoch: int, image: int) -> Tensor:
        return transform(train[image], item_rng(context.seed, "augment", epoch, train.ids[image]))[0]

    whole = index if distributed.world() == 1 else SharedIndex(index)
    return Memory(whole, vstack(every, format="csr"), places, view, encoder.stride)
