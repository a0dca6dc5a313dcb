"""Batches of views. Order, crops and colours depend only on (seed, epoch, image id).

They are therefore the same for any number of processes or workers, and after an interruption.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from neco_bench.core.errors import BadInputError
from neco_bench.core.rng import item_rng
from neco_bench.core.signals import leave_signals_to_the_parent
from neco_bench.encoders.base import Encoder
from neco_bench.training.images import Images
from neco_bench.training.recipe import Recipe
from neco_bench.training.views import Views, ViewSettings, make_views


class Item(NamedTuple):
    """Views of one image; unusable: images that were tried before it, each with the reason."""

    views: Views
    id: str
    unusable: list[tuple[str, str]]


class ViewData(Dataset[Any]):
    """Views of image `index` in `epoch` for keys (epoch, index), or of the next usable image if it cannot be used."""

    def __init__(self, images: Images, settings: ViewSettings, seed: int) -> None:
        self.images, self.settings, self.seed = images, settings, seed

    def __getitem__(self, key: tuple[int, int]) -> Item | BadInputError:
        epoch, first = key
        unusable: list[tuple[str, str]] = []
        for index in range(first, first + min(100, len(self.images))):
            name = self.images.ids[index % len(self.images)]
            try:
                image = self.images.read(index % len(self.images))
                if min(image.shape[:2]) < self.settings.local_size:
                    height, width = image.shape[:2]
                    raise BadInputError(f"{width}x{height} pixels, less than a local crop ({self.settings.local_size})")
                views = make_views(image, self.settings, item_rng(self.seed, "views", epoch, name))
            except BadInputError as error:
                unusable.append((name, str(error)))
            else:
                return Item(views, name, unusable)
        name, reason = unusable[0]  # returned, because an exception of a worker arrives wrapped in its traceback
        return BadInputError(f"{len(unusable)} training images in a row cannot be used; the first is {name}: {reason}")


class Order:
    """Keys of the batches from step `first` on: each epoch has its own permutation, without the last partial batch.

    A process reads `count` images from `start` on in each of the `accumulate` parts of a step's batch.
    """

    def __init__(self, images: int, recipe: Recipe, first: int, last: int, start: int, count: int) -> None:
        self.images, self.recipe, self.steps = images, recipe, range(first, last)
        self.start, self.count = start, count

    def __len__(self) -> int:
        return len(self.steps) * self.recipe.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size, part = self.recipe.batch_size, self.recipe.batch_size // self.recipe.accumulate
        per_epoch = self.images // size
        epoch, order = -1, None
        for step in self.steps:
            if order is None or step // per_epoch != epoch:
                epoch = step // per_epoch
                order = item_rng(self.recipe.seed, "order", epoch).permutation(self.images)
            begin = step % per_epoch * size + self.start
            for first in range(begin, begin + size, part):
                yield [(epoch, int(i)) for i in order[first : first + self.count]]


def collate(items: list[Any]) -> TrainBatch | BadInputError:
    """Stack the views of single images."""
    for item in items:
        if isinstance(item, BadInputError):
            return item
    stacked = {name: torch.stack([getattr(item.views, name) for item in items]) for name in TENSORS}
    unusable = [fault for item in items for fault in item.unusable]
    return TrainBatch(**stacked, ids=[item.id for item in items], unusable=unusable)


def loader(images: Images, recipe: Recipe, order: Order, workers: int, pin: bool) -> DataLoader[Any]:
    """Return the loader of batches in `order`. pin: use page-locked memory, for GPUs."""
    settings = ViewSettings(**{name: getattr(recipe, name) for name in ViewSettings.__dataclass_fields__})
    return DataLoader(
        ViewData(images, settings, recipe.seed),
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=pin,
    )


TENSORS = ("global_views", "local_views", "gc", "all")  # of a batch, and of the views of one image

# A network, or what wraps one for several processes: (groups of images, patches needed) to embeddings.
Embed = Callable[..., list[Tensor]]


@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Views of B images.

    global_views (B, 2, 3, g, g), local_views (B, V - 2, 3, l, l), uint8 RGB when loaded, float32 after normalisation;
    boxes as in `views.Views`, with a leading B. ids: ids of the images. unusable: images that could not be used, each
    with the reason.
    """

    global_views: Tensor
    local_views: Tensor
    gc: Tensor
    all: Tensor
    ids: list[str]
    unusable: list[tuple[str, str]]

    def normalised(self, encoder: Encoder, device: torch.device) -> TrainBatch:
        """Move the batch to a device and normalise its views with the encoder's statistics.

        Before, they are bytes, which need a quarter of the size of floats for transfers between processes and devices.
        """
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in TENSORS}
        shift, scale = (torch.tensor(of, device=device).view(3, 1, 1) for of in (encoder.mean, encoder.std))
        for name in ("global_views", "local_views"):
            moved[name] = moved[name].float().div_(255).sub_(shift).div_(scale)
        return dataclasses.replace(self, **moved)

    def groups(self) -> list[Tensor]:
        """Return the images of global views (2 B, 3, g, g) and, if any, of local ones ((V - 2) B, 3, l, l), by view."""
        return [by_view(views) for views in (self.global_views, self.local_views) if views.shape[1]]


def by_view(values: Tensor) -> Tensor:
    """Reshape (B, V, ...) to (V B, ...), view after view, as a group of images is ordered."""
    return values.transpose(0, 1).flatten(0, 1)
