"""Dense regression: a linear head on frozen features predicts depth or surface normals at each pixel.

Depth is evaluated as in DINOv3 (`dinov3-1`) and DINOv2 (`dinov2-lin1`, its "lin. 1"), and normals as with probe3d's
linear head (`probe3d-1`), including quirks; `clean-1` is without them. README.md lists the quirks and the source of
every constant.

Known deviations from the references: augmentation and order are drawn per (epoch, image), not from global streams; the
frozen encoder is never in train mode; for encoders without a class token, the mean of the patches is used instead.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from neco_bench.tasks.dense_regression.heads import DenseHead, predict
from neco_bench.tasks.dense_regression.inputs import (
    Augment,
    Frame,
    FrameInput,
    InputGrid,
    crop_frame,
    train_crop,
    unpack,
)
from neco_bench.tasks.dense_regression.score import RegressionScore
from neco_bench.tasks.dense_regression.settings import Settings
from neco_bench.tasks.dense_regression.training import train_head
from neco_bench.tasks.linear_segmentation.batches import batched, training_order, with_targets
from torch import Tensor

from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.dense import DenseDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureExtractor


def cost(settings: Settings, data: dict[str, DenseDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: crops for all iterations, then the test images, twice if they are also mirrored."""
    s, test = settings, data["val" if "val" in data else "test"]
    frame = Frame.of(test, s, stride)
    crop, height = train_crop(frame, s), frame.resized
    iterations = s.iterations_used(len(data["train"]))
    crops, batch = iterations * s.batch_size, min(s.batch_size, len(data["train"]))
    width = dimension * (2 if s.class_token else 1)
    outputs = s.bins if s.target == "depth" else 4
    cells = crop[0] * crop[1] / stride**2
    area = cells * (s.upsample**2 if s.kernel > 1 else 1)
    per_crop = 6.0 * width * outputs * area * s.kernel**2 + 12.0 * outputs * cells * s.upsample**2
    pixels = crop[0] * crop[1] * (1 if s.target == "depth" else 4)
    return Cost(
        images=crops + len(test) * (2 if s.mirror_test else 1),
        size=round((height[0] * height[1]) ** 0.5),
        width=width,
        operations=crops * per_crop,
        memory=4.0 * batch * (3 * width * area + 3 * outputs * cells * s.upsample**2 + 8 * pixels),
    )


def run(encoder: Encoder, data: dict[str, DenseDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the errors on the test split of a linear head trained on data["train"]."""
    s, test = settings, data["val" if "val" in data else "test"]
    channels = encoder.embed_dim * (2 if s.class_token else 1)
    head = DenseHead(channels, s, context.seed).to(encoder.device)
    heads = trained_heads(head, encoder, data["train"], s, context)

    frame = Frame.of(test, s, encoder.stride)
    grid = InputGrid.of(frame.resized, encoder)
    transform = FrameInput(frame, grid, s.mean or encoder.mean)
    score = RegressionScore(test, s, context)
    extractor = extractor_of(encoder, s, context, mirrored=s.mirror_test)
    for batch in extractor.stream(test, transform, "score", own=True):
        with context.phase("predict"):
            for item, features, packed in zip(batch.positions, batch.features, batch.masks, strict=True):
                truth = unpack(packed, test.kind)
                maps = [predict_frame(own, features[None], grid, truth.shape[:2]) for own in heads.values()]
                score.add(item, truth, np.stack(maps), partial(frame_image, test, item, s.frame))

    selected = score.best("abs_rel") if s.select == "best" else len(heads) - 1
    context.note(iteration_reported=list(heads)[selected])
    if s.class_token:
        context.note(beside_patches="the first prefix token, or their mean")
    height, width = grid.size
    return score.outcome(
        selected,
        {
            "input_size": s.input_size,
            "used_size": f"{width}x{height}",
            "tokens": (height // encoder.stride) * (width // encoder.stride),
            "resize": "none" if grid.inner == frame.cropped else "squash" if encoder.only_size else "aspect kept",
            "final_norm": s.final_norm,
        },
    )


def frame_image(dataset: DenseDataset, item: int, frame: str) -> np.ndarray:
    """Return the used part of the image of an item, (H, W, 3)."""
    return crop_frame(dataset[item].image, frame)


@torch.inference_mode()
def predict_frame(head: DenseHead, features: Tensor, grid: InputGrid, size: tuple[int, ...]) -> np.ndarray:
    """Predict the depth (H, W) or directions (H, W, 3) of a frame from its features (1, D, h, w).

    With `mirror_test`, features are (1, 2 D, h, w), the second half of the mirrored image; predictions are averaged.
    """
    parts = features.chunk(2, 1) if head.settings.mirror_test else (features,)
    maps = torch.cat([predict(head, part, grid, (size[0], size[1])) for part in parts]).mean(0)
    prediction: np.ndarray = (maps if head.settings.target == "depth" else maps[..., :3]).cpu().numpy()
    return prediction


def trained_heads(
    head: DenseHead, encoder: Encoder, train: DenseDataset, settings: Settings, context: Context
) -> dict[int, DenseHead]:
    """Train a head on random crops, see `train_head`."""
    s = settings
    frame = Frame.of(train, s, encoder.stride)
    crop = train_crop(frame, s)
    grid = InputGrid.of(crop, encoder)
    transform = Augment(frame, grid, s.mean or encoder.mean, crop, s)
    total = s.iterations_used(len(train))
    items = training_order(len(train), total * s.batch_size, context.seed)
    batches = extractor_of(encoder, s, context).stream(train, transform, "train", items=items)
    pairs = with_targets(batches, partial(unpack, kind=train.kind))
    return train_head(head, batched(pairs, s.batch_size), grid, total)


def extractor_of(encoder: Encoder, settings: Settings, context: Context, *, mirrored: bool = False) -> FeatureExtractor:
    """Return an extractor of the features of the protocol; mirrored: with those of the mirrored images."""
    s = settings
    return FeatureExtractor(
        encoder,
        context,
        final_norm=s.final_norm,
        mean=s.mean,
        std=s.std,
        class_token=s.class_token,
        mirrored=mirrored,
    )
