"""In-context segmentation: label the patches of an image by retrieval from a memory of labelled patches.

Protocol of Balazevic et al., *Towards In-context Scene Understanding* (NeurIPS 2023), as implemented by
open-hummingbird-eval v2.0.0 (`hbird-2`, quirks included) and without its quirks (`clean-1`). README.md lists them.

Known deviations from the reference: augmentation and sampling noise are drawn per image, not from one global stream, so
the result does not depend on batch size or workers; search is exact (the reference's ScaNN is not).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from neco_bench import distributed, metrics, statistics
from neco_bench.context import Context, Cost, Neighbour, Outcome, item_rng
from neco_bench.data.base import IGNORE, SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.errors import NOTHING_LABELLED, BadInputError
from neco_bench.features.extract import stream
from neco_bench.features.patches import patch_view, rescaled, unit_length
from neco_bench.features.transforms import HummingbirdTrain, Squash, largest_upsampled
from neco_bench.protocol import Range, Share, Temperature
from neco_bench.protocol import Settings as BaseSettings
from neco_bench.search import ExactIndex, SharedIndex, check_neighbours
from neco_bench.search.approximate import ApproximateIndex


class Settings(BaseSettings):
    """Constants of a protocol and a card. Sizes in pixels; memory_size in patches (None: every patch).

    passes: augmented copies of each training image. search: other than "exact" see `neco_bench.search.approximate`.
    """

    memory_size: PositiveInt | None = None
    passes: PositiveInt
    neighbours: PositiveInt
    temperature: Temperature
    jitter: Annotated[float, Field(ge=0, le=0.5)]  # a hue turns by half a circle at most
    jitter_probability: Share
    crop_scale: Range
    crop_ratio: Range
    void_in_memory: Literal["class 0", "dropped"]
    matching: Literal["hungarian", "identity"]
    absent: metrics.Absent
    score_at: Literal["input", "native"]
    search: Literal["exact", "bf16", "ivf", "ivfpq"] = "exact"


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


BYTES = {"exact": 6.0, "bf16": 6.0, "ivf": 4.0, "ivfpq": 0.5}  # of memory, per row and dimension


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """What `run` will take: every query against every row of the memory, which lies beside its labels.

    Raises UsageError for more neighbours than there can be rows.
    """
    size, classes = settings.used_size(stride), len(data["val"].classes)
    views, patches = settings.passes * len(data["train"]), (size // stride) ** 2
    rows = min(views * patches, settings.memory_size or views * patches)
    check_neighbours(settings.neighbours, rows)
    return Cost(
        images=views + len(data["val"]),
        size=size,
        width=dimension,
        operations=2.0 * rows * dimension * patches * len(data["val"]),
        memory=rows * (BYTES[settings.search] * dimension + 32) + 4.0 * len(data["val"]) * classes**2,
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """mIoU of retrieval segmentation: memory from data["train"], queries from data["val"]."""
    train, val = data["train"], data["val"]
    classes = len(train.classes)
    size = settings.used_size(encoder.stride)
    memory = build_memory(encoder, train, settings, context, size)

    confusions = metrics.ImageConfusions(classes)
    scored: list[int] = []
    transform = Squash(size, "legacy" if settings.score_at == "input" else "native")
    batches = stream(encoder, val, transform, context, "query", mean=settings.mean, std=settings.std)
    for turn, batch in enumerate(batches):
        count, _, rows, columns = batch.features.shape
        queries = batch.features.flatten(2).transpose(1, 2).flatten(0, 1)
        with context.phase("search"):
            scores, ids = retrieve(memory.index, queries, settings.neighbours)
        if turn % distributed.world() != distributed.rank():  # another process reads these labels
            continue
        scored += batch.positions
        with context.phase("predict"):
            shares = read_labels(scores, ids, memory.labels, settings.temperature)
            shares = shares.view(count, rows, columns, classes).permute(0, 3, 1, 2).to(batch.features.device)
            for row, (share, mask) in enumerate(zip(shares, batch.masks, strict=True)):
                truth, prediction = val.scored(mask), largest_upsampled(share, *mask.shape).cpu().numpy()
                confusions.add(truth, prediction)
                name = val.ids[batch.positions[row]]
                if name in context.watched:
                    mine = slice(row * rows * columns, (row + 1) * rows * columns)
                    context.seen[name] = {
                        "features": batch.features[row].cpu(),
                        "truth": truth,
                        "prediction": prediction,
                        "neighbours": _neighbours(
                            memory, scores[mine], ids[mine], train, settings, size, encoder.stride, context.seed
                        ),
                    }

    confusions = metrics.ImageConfusions.joined(distributed.gather(confusions), distributed.gather(scored))
    context.notes |= {"memory_patches": memory.index.rows, "search": memory.index.facts}
    total = confusions.total()
    identity = np.arange(classes)
    mapping = metrics.hungarian_match(total) if settings.matching == "hungarian" else identity
    for seen in context.seen.values():
        seen["prediction"] = mapping[seen["prediction"]]
    per_image = confusions.per_image(mapping)
    matched = per_image.sum(0)
    return Outcome(
        metrics={
            "mIoU": metrics.mean_iou(matched, absent=settings.absent),
            "mIoU_identity": metrics.mean_iou(total, absent=settings.absent),
            "mIoU_present": metrics.mean_iou(matched, absent="exclude"),
            "pixel_accuracy": float(np.trace(matched) / max(1, matched.sum())),
        },
        per_class={"IoU": metrics.named(metrics.iou_per_class(matched), train.classes)},
        ci95={"mIoU": statistics.bootstrap_miou(per_image, absent=settings.absent, seed=context.seed)},
        n_images=len(confusions),
        statistics={"confusion": per_image, "mapping": mapping},
        features={"input_size": settings.input_size, "used_size": size, "resize": "squash", "final_norm": True},
    )


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
        index = ApproximateIndex(settings.search, encoder.embed_dim, encoder.device)
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


def _neighbours(
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
