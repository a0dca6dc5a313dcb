"""In-context segmentation: label the patches of an image by retrieval from a memory of labelled patches.

Protocol of Balazevic et al., *Towards In-context Scene Understanding* (NeurIPS 2023), as implemented by
open-hummingbird-eval v2.0.0 (`hbird-2`, including quirks), and without its quirks (`clean-1`). README.md lists them.

Known deviations from the reference: augmentation and sampling noise are drawn per image, not from one global stream, so
the result does not depend on batch size or workers; search is exact (the reference's ScaNN is not).
"""

from __future__ import annotations

from neco_bench.tasks.in_context.memory import build_memory, read_labels
from neco_bench.tasks.in_context.settings import Settings
from neco_bench.tasks.segmentation import SegmentationScore

from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.transforms import ResizeSquare, upsample_argmax
from neco_bench.metrics.segmentation import hungarian_match, identity_match
from neco_bench.search.exact import check_neighbours


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: every query is compared with every row of the memory.

    Raises UsageError if there are more neighbours than possible rows.
    """
    size, classes = settings.input_size_for(stride), len(data["val"].classes)
    views, patches = settings.passes * len(data["train"]), (size // stride) ** 2
    rows = min(views * patches, settings.memory_size or views * patches)
    check_neighbours(settings.neighbours, rows)
    stored = {"ivf": 4.0, "ivfpq": 0.5}.get(settings.search, 6.0)  # bytes per row and dimension
    return Cost(
        images=views + len(data["val"]),
        size=size,
        width=dimension,
        operations=2.0 * rows * dimension * patches * len(data["val"]),
        memory=rows * (stored * dimension + 32) + 4.0 * len(data["val"]) * classes**2,
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the mIoU of retrieval segmentation: memory from data["train"], queries from data["val"]."""
    size = settings.input_size_for(encoder.stride)
    extractor = FeatureExtractor(encoder, context, mean=settings.mean, std=settings.std)
    memory = build_memory(extractor, data["train"], settings, size)

    score = SegmentationScore(data["val"], settings, context)
    transform = ResizeSquare(size, "torch" if settings.score_at == "input" else "native")
    for batch in extractor.stream(data["val"], transform, "query"):
        with context.phase("search"):
            cosines, rows = memory.nearest(batch.features, settings.neighbours)
        with context.phase("predict"):
            for image, item in score.to_predict(batch.positions):
                features, mask = batch.features[image], batch.masks[image]
                shares = read_labels(cosines[image], rows[image], memory.labels, settings.temperature)
                maps = shares.T.unflatten(1, features.shape[1:]).to(features.device)
                prediction = upsample_argmax(maps, *mask.shape).cpu().numpy()
                neighbours = memory.neighbours_of(cosines[image], rows[image])
                score.add(item, mask, prediction, features=features.cpu, neighbours=neighbours)

    context.note(memory_patches=memory.index.rows, search=memory.index.facts)
    metrics = {"mIoU_identity": float(score.mean_ious())}
    score.match(hungarian_match if settings.matching == "hungarian" else identity_match)
    return score.outcome(used_size=size, resize="squash", metrics=metrics)
