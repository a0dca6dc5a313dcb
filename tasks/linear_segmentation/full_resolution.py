"""The full-resolution linear probe of feature-upsampler papers (`jafar-1`, `naf-1`, `anyup-1`).

Protocol of the segmentation probes of PaulCouairon/JAFAR and valeoai/NAF for their baseline, bilinear upsampling: a 1x1
convolution on features upsampled to the pixels of a central crop, trained and scored at these pixels. README.md lists
the sources, and the differences between the three.

Known deviations from the reference: order and flips are drawn per epoch and batch, not from global streams; a batch
without a labelled pixel, whose loss is undefined, is skipped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from neco_bench.tasks.linear_segmentation.batches import Batches, batched, with_targets
from neco_bench.tasks.linear_segmentation.full_resolution_settings import Settings
from neco_bench.tasks.linear_segmentation.heads import classify, logits_at, new_head
from neco_bench.tasks.segmentation import SegmentationScore
from PIL import Image
from torch import Tensor, nn

from neco_bench.core.errors import NOTHING_LABELLED, BadInputError, NumericalError
from neco_bench.core.rng import item_rng
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import IGNORE, Sample, SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.transforms import resize_nearest_pil, to_tensor


@dataclass(frozen=True)
class CentreCrop:
    """Resize the short side to `size` pixels, and crop the central square, both as torchvision does.

    Images are resized by Pillow's bilinear rule (antialiased), masks by Pillow's nearest rule (torchvision's
    nearest-exact).
    """

    size: int

    @property
    def pixels(self) -> str:
        """Identify the processing of the image, see `ResizeSquare.pixels`."""
        return f"{type(self).__name__}({self.size})"

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
        """Return the image (3, size, size) in [0, 1] and the mask (size, size); `rng` is not used."""
        image, mask = self.crop(sample)
        return to_tensor(image), mask

    def crop(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Resize and crop the image, to (size, size, 3) uint8, and the mask."""
        short = min(sample.mask.shape)
        height, width = (int(self.size * side / short) for side in sample.mask.shape)  # the long side is rounded down
        top, left = (round((side - self.size) / 2) for side in (height, width))  # halves are rounded to even
        place = slice(top, top + self.size), slice(left, left + self.size)
        image = Image.fromarray(sample.image).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image)[place], resize_nearest_pil(sample.mask, height, width)[place]


class MirroredBehind:
    """The images of a data set, followed by the mirrored crops of all of them.

    Images are cropped before they are mirrored, because rounding can move the central crop of a mirrored image.
    """

    def __init__(self, dataset: SegmentationDataset, crop: CentreCrop) -> None:
        self.dataset, self.crop = dataset, crop
        self.name, self.split = dataset.name, dataset.split
        self.ids = (*dataset.ids, *(f"{item} mirrored" for item in dataset.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        copy, number = divmod(index, len(self.dataset))
        sample = self.dataset[number]
        if not copy:
            return sample
        image, mask = self.crop.crop(sample)
        return Sample(image[:, ::-1], mask[:, ::-1], self.ids[index])

    def fingerprint(self) -> str:
        """Return the fingerprint of the data set."""
        return self.dataset.fingerprint()


def training_order(count: int, settings: Settings, seed: int) -> list[tuple[int, int]]:
    """Return the items (epoch, index) of all epochs; the index of a mirrored image is larger by `count`.

    Each epoch is a permutation, in batches; the last one may be smaller. All images of a batch are mirrored, or none.
    """
    items = []
    for epoch in range(settings.epochs):
        order = item_rng(seed, "order", epoch).permutation(count)
        for number, start in enumerate(range(0, count, settings.batch_size)):
            mirrored = item_rng(seed, "flip", epoch, number).random() < settings.flip_probability
            batch = order[start : start + settings.batch_size]
            items += [(epoch, int(i) + mirrored * count) for i in batch]
    return items


def train_probe(head: nn.Conv2d, epochs: Iterable[Batches], settings: Settings, iterations: int) -> None:
    """Train a head in place by AdamW, its logits upsampled bilinearly to the pixels of the targets.

    Args:
        head: a 1x1 convolution.
        epochs: the batches of each epoch.
        settings: settings of the protocol.
        iterations: total number of batches.

    Raises:
        NumericalError: if a loss is not finite.
        BadInputError: if all targets of the first epoch contain only void.
    """
    optimizer = torch.optim.AdamW(head.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    by_epoch = settings.schedule == "by epoch"
    length = iterations if settings.schedule == "by iteration" else settings.epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length)
    learned = False
    for batches in epochs:
        for features, target in batches:
            optimizer.zero_grad()
            if (target != IGNORE).any():
                logits = logits_at([head], features, *target.shape[1:])[0]
                loss = F.cross_entropy(logits, target, ignore_index=IGNORE)
                if not math.isfinite(loss.item()):
                    raise NumericalError(
                        f"The probe's loss is not finite at learning_rate={settings.learning_rate:g}. "
                        f"Lower it with --set learning_rate=0.0001"
                    )
                loss.backward()
                learned = True
            optimizer.step()  # does nothing without a gradient
            if not by_epoch:
                schedule.step()
        if not learned:
            raise BadInputError(NOTHING_LABELLED)
        if by_epoch:
            schedule.step()


def cost(settings: Settings, data: dict[str, SegmentationDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: every training image once per epoch, with the head's forward and backward pass."""
    size, classes = settings.input_size_for(stride), len(data["val"].classes)
    views, batch = settings.epochs * len(data["train"]), min(settings.batch_size, len(data["train"]))
    cells, pixels = (size // stride) ** 2, size**2
    return Cost(
        images=views + len(data["val"]),
        size=size,
        width=dimension,
        operations=views * classes * (6.0 * dimension * cells + 48.0 * pixels),
        memory=4.0 * batch * (dimension * cells + 4 * classes * pixels) + 4.0 * len(data["val"]) * classes**2,
    )


def run(encoder: Encoder, data: dict[str, SegmentationDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the mIoU of a linear head, trained on data["train"] and scored on data["val"] at the crop's pixels."""
    s, train, val, size = settings, data["train"], data["val"], settings.input_size_for(encoder.stride)
    crop = CentreCrop(size)
    extractor = FeatureExtractor(encoder, context, final_norm=True, mean=s.mean, std=s.std)
    items = training_order(len(train), s, context.seed)
    both = MirroredBehind(train, crop)
    extractor.store_ahead(both, crop, "encode", [(0, index) for index in sorted({index for _, index in items})])
    images = with_targets(extractor.stream(both, crop, "train", items=items), train.eval_mask)
    epochs = (batched(itertools.islice(images, len(train)), s.batch_size) for _ in range(s.epochs))
    head = new_head(encoder.embed_dim, len(val.classes), context.seed, encoder.device)
    train_probe(head, epochs, s, s.epochs * math.ceil(len(train) / s.batch_size))

    score = SegmentationScore(val, settings, context)
    for batch in extractor.stream(val, crop, "score", own=True):
        with context.phase("predict"):
            for item, features, mask in zip(batch.positions, batch.features, batch.masks, strict=True):
                prediction = classify([head], features, *mask.shape)[0].cpu().numpy()
                score.add(item, mask, prediction, features=features.cpu, image=partial(cropped, val, item, crop))
    context.note(scored_images=len(val))
    return score.outcome(used_size=size, resize="short side, central crop")


def cropped(dataset: SegmentationDataset, item: int, crop: CentreCrop) -> np.ndarray:
    """Read and crop an image of a data set for drawing: (size, size, 3) uint8."""
    return crop.crop(dataset[item])[0]
