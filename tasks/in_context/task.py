"""In-context segmentation: label the patches of an image by retrieval from a memory of labelled patches.

Protocol of Balazevic et al., *Towards In-context Scene Understanding* (NeurIPS 2023), as implemented by
open-hummingbird-eval v2.0.0 (`hbird-2`, quirks included) and without its quirks (`clean-1`). README.md lists them.

Known deviations from the reference: augmentation and sampling noise are drawn per image, not from one global stream, so
the result does not depend on batch size or workers; search is exact (the reference's ScaNN is not).
"""

from __future__ import annotations

import numpy as np
from neco_bench.tasks.in_context.memory import build_memory, find_neighbours, read_labels, retrieve
from neco_bench.tasks.in_context.settings import Settings

from neco_bench.core import distributed
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import stream
from neco_bench.features.transforms import ResizeSquare, upsample_argmax
from neco_bench.metrics import bootstrap, segmentation
from neco_bench.search.exact import check_neighbours

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

    confusions = segmentation.ImageConfusions(classes)
    scored: list[int] = []
    transform = ResizeSquare(size, "legacy" if settings.score_at == "input" else "native")
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
                truth, prediction = val.scored(mask), upsample_argmax(share, *mask.shape).cpu().numpy()
                confusions.add(truth, prediction)
                name = val.ids[batch.positions[row]]
                if name in context.watched:
                    mine = slice(row * rows * columns, (row + 1) * rows * columns)
                    context.seen[name] = {
                        "features": batch.features[row].cpu(),
                        "truth": truth,
                        "prediction": prediction,
                        "neighbours": find_neighbours(
                            memory, scores[mine], ids[mine], train, settings, size, encoder.stride, context.seed
                        ),
                    }

    confusions = segmentation.ImageConfusions.joined(distributed.gather(confusions), distributed.gather(scored))
    context.notes |= {"memory_patches": memory.index.rows, "search": memory.index.facts}
    total = confusions.total()
    identity = np.arange(classes)
    mapping = segmentation.hungarian_match(total) if settings.matching == "hungarian" else identity
    for seen in context.seen.values():
        seen["prediction"] = mapping[seen["prediction"]]
    per_image = confusions.per_image(mapping)
    matched = per_image.sum(0)
    return Outcome(
        metrics={
            "mIoU": segmentation.mean_iou(matched, absent=settings.absent),
            "mIoU_identity": segmentation.mean_iou(total, absent=settings.absent),
            "mIoU_present": segmentation.mean_iou(matched, absent="exclude"),
            "pixel_accuracy": float(np.trace(matched) / max(1, matched.sum())),
        },
        per_class={"IoU": segmentation.by_class(segmentation.iou_per_class(matched), train.classes)},
        ci95={"mIoU": bootstrap.bootstrap_miou(per_image, absent=settings.absent, seed=context.seed)},
        n_images=len(confusions),
        statistics={"confusion": per_image, "mapping": mapping},
        features={"input_size": settings.input_size, "used_size": size, "resize": "squash", "final_norm": True},
    )
