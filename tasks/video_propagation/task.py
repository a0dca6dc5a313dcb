"""Label propagation in video: the mask of a clip's first frame is propagated by the similarity of patch features.

Nothing is trained. `dino-1` reproduces the evaluation of DINO (Caron et al., ICCV 2021), `dinov3-1` that of DINOv3
(Simeoni et al., 2025); `clean-1` is the same measurement without their quirks. README.md lists constants and quirks.
"""

from __future__ import annotations

import math

import numpy as np
from neco_bench.tasks.video_propagation.frames import ResizeFrame, input_shape
from neco_bench.tasks.video_propagation.propagation import TILE, Tracker, first_labels, mask_of
from neco_bench.tasks.video_propagation.score import ClipScore, Track
from neco_bench.tasks.video_propagation.settings import Settings

from neco_bench.core import distributed
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import IGNORE
from neco_bench.data.video import Clip, VideoDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.patches import unit_length


def cost(settings: Settings, data: dict[str, VideoDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: every frame once; each cell is compared with its window in all context frames."""
    dataset = data["val"]
    height, width = settings.input_shape(*dataset.clip(0).size, stride, stride)
    rows, columns = height // stride, width // stride
    side = 2 * math.floor(settings.radius_in_cells(rows, columns)) + TILE
    compared = min(side, rows) * min(side, columns) * (settings.context_frames + 1)
    frames = sum(len(dataset.frames(name)) for name in dataset.ids)
    return Cost(
        images=frames,
        size=stride * math.ceil(math.sqrt(rows * columns)),  # a square with the same number of cells
        width=dimension,
        operations=2.0 * frames * rows * columns * compared * dimension,
        memory=4.0 * rows * columns * dimension * (2 * settings.context_frames + 4),
    )


def run(encoder: Encoder, data: dict[str, VideoDataset], settings: Settings, context: Context) -> Outcome:
    """Track the objects of data["val"], clip by clip, and score them; several processes divide the clips."""
    dataset = data["val"]
    score = ClipScore(dataset, settings, context)
    mine = range(distributed.rank(), len(dataset), distributed.world())
    for number in context.track(mine, "clips"):
        clip = dataset.clip(number)
        shape = input_shape(encoder, clip, settings)
        score.add(track_clip(encoder, clip, shape, settings, context))
    shapes = {input_shape(encoder, dataset.clip(number), settings) for number in range(len(dataset))}
    return score.outcome(shapes, encoder.stride)


def track_clip(encoder: Encoder, clip: Clip, shape: tuple[int, int], settings: Settings, context: Context) -> Track:
    """Propagate the first mask of a clip, and score each frame. shape: size (H, W) of the input."""
    transform = ResizeFrame(shape, "bilinear" if settings.resize == "floor_64" else "bicubic")
    extractor = FeatureExtractor(encoder, context, final_norm=True, mean=settings.mean, std=settings.std)
    batches = extractor.stream(clip, transform, clip.id, alone=True)
    frames = ((features, mask) for batch in batches for features, mask in zip(batch.features, batch.masks, strict=True))
    features, mask = next(frames)
    first = np.where(mask == IGNORE, np.uint8(0), mask)
    _, rows, columns = features.shape
    tracker = Tracker(unit_length(features, 0), first_labels(first, rows, columns, settings), settings)
    track = Track(clip, first, settings, recorded=clip.id in context.recorded_ids)
    for features, truth in frames:
        with context.phase("propagate"):
            labels = tracker.step(unit_length(features, 0))
            prediction = mask_of(labels, first.shape, shape, settings)
        with context.phase("score"):
            track.add(truth, prediction)
    return track
