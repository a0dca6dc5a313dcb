"""Interfaces of data sets (segmentation, pairs, boxes), which are read item by item without keeping images.

Masks contain class ids 0..C-1 and `IGNORE` (255 if C <= 255) for void. Data sets are independent of encoders and tasks.
"""

from __future__ import annotations

import abc
import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np

from neco_bench.core.errors import BadInputError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

IGNORE = 255

# How IGNORE is treated in votes of labels: as a label that wins or loses ties, or without a vote.
Void = Literal["wins ties", "loses ties", "never votes"]

FEW, MANY = 4, 16  # minimum numbers of masks for checks of their statistics and of their sizes


@dataclass(frozen=True)
class Sample:
    """image: (H, W, 3) uint8 RGB. mask: (H, W) integer class ids, IGNORE for void. id: unique in its split."""

    image: np.ndarray
    mask: np.ndarray
    id: str


@dataclass(frozen=True)
class Pair:
    """Annotation of one image pair. Points are (P, 2) float64 (x, y) pixels of the original images, x right, y down.

    point_ids: semantic names of the points. boxes: (x1, y1, x2, y2). attributes: integer variation levels, such as
    viewpoint_variation and scale_variation.
    """

    id: str
    source_id: str
    target_id: str
    source_points: np.ndarray
    target_points: np.ndarray
    point_ids: tuple[str, ...]
    source_box: tuple[float, float, float, float]
    target_box: tuple[float, float, float, float]
    category: str
    attributes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PairSample:
    """A pair with its two images, (H, W, 3) uint8 RGB each."""

    pair: Pair
    source_image: np.ndarray
    target_image: np.ndarray


@dataclass(frozen=True)
class BoxSample:
    """image: (H, W, 3) uint8 RGB. boxes: (n, 4) float64 (x1, y1, x2, y2) pixels of its objects, x2 and y2 outside."""

    image: np.ndarray
    boxes: np.ndarray
    id: str


class Dataset(abc.ABC):
    """Base class of all data sets. Constructed as `Class(folder, split)`; folder is None without `needs_root`.

    name, split; version: version of the reader and its id mapping. expected: number of items of each full split (empty
    if no such number exists). citation: short reference. ids: item ids in a fixed order (image ids, or pair ids).
    kind: "segmentation", "pairs", "boxes", "video", "views", "depth" or "normals". needs_root: whether it is read from
    the data root. folder_name: its folder there; the name if empty. layout: the expected file tree, shown in error
    messages. images_from: the source collection of the images; the folder name if empty. fractions: parts that can be
    drawn from a split, as {split: {parts: items}}; see `fraction`. sampling_unit: the unit that was sampled from a
    population, for intervals: "image", "pair", "frame" (of drives, in order), "sequence", "scene", ...; see
    `core.sampling`.
    """

    name: ClassVar[str]
    version: ClassVar[str] = "1"
    expected: ClassVar[dict[str, int]] = {}
    citation: ClassVar[str] = ""
    kind: ClassVar[str]
    needs_root: ClassVar[bool] = True
    folder_name: ClassVar[str] = ""
    layout: ClassVar[str] = ""
    images_from: ClassVar[str] = ""
    splits: ClassVar[tuple[str, ...]]
    fractions: ClassVar[dict[str, dict[int, int]]] = {}
    sampling_unit: ClassVar[str] = "image"
    split: str
    ids: tuple[str, ...]
    _before_head: int | None = None
    _full: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        """Return name, split and number of items."""
        return f"<{self.kind} data set {self.name!r}, split {self.split!r}: {len(self)} items>"

    @property
    def coverage(self) -> dict[str, int] | None:
        """{"found": n, "expected": m} if the split on disk is incomplete (independent of `head`), else None."""
        full = self._full or self.expected.get(self.split)
        count = self._before_head or len(self)
        return None if full is None or count == full else {"found": count, "expected": full}

    @classmethod
    def group_of(cls, item: str) -> str | None:
        """Return the drive, sequence or scene of an item, from its id; None if items were sampled independently."""
        return None

    @classmethod
    def has_images(cls, folder: Path, split: str) -> bool:
        """Return whether a folder has images of a split, without reading them. May raise errors of the constructor."""
        return any(folder.iterdir())

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Return a hex digest that changes with the list of items and with their files (names and sizes)."""

    def sample_sanity_check(self) -> list[str]:
        """Return problems found in a few items of the split; `run` checks them first, and stops if there are any."""
        return []

    def head(self, count: int) -> Self:
        """Return the data set with its first `count` items only. Raises UsageError if count < 1."""
        if count < 1:
            raise UsageError(f"A data set cannot be limited to {count} items: give 1 or more.")
        part = self._part(range(min(count, len(self))))
        part._before_head = self._before_head or len(self)
        return part

    def fraction(self, parts: int, draw: int) -> Self:
        """Return draw number `draw` of one in `parts` items of this split, named "<split>_1of<parts>_<draw>".

        Item ids are sorted by the sha256 of "<folder name>/<split>/<draw>/<id>", and the first n are used, in the order
        of the full split. Draws with the same number are therefore nested, and do not depend on the machine or on the
        order of files. n is `fractions[split][parts]`, and proportionally smaller if files of the full split are
        missing.
        """
        count, full = self.fractions[self.split][parts], self.expected[self.split]
        text = f"{self.folder_name or self.name}/{self.split}/{draw}/"
        order = sorted(range(len(self)), key=lambda i: hashlib.sha256(f"{text}{self.ids[i]}".encode()).digest())
        part = self._part(sorted(order[: max(1, round(count * len(self) / full))]))
        part.split, part._full = f"{self.split}_1of{parts}_{draw}", count
        return part

    def subset(self, ids: Iterable[str]) -> Self:
        """Return the data set with only these ids, in the order of this split; the last component of an id is enough.

        Raises BadInputError, which names ids that are not in this split.
        """
        known = {name: i for i, item in enumerate(self.ids) for name in (item.rpartition("/")[2], item)}
        names = {item: next(filter(known.__contains__, _readings(item)), None) for item in ids}
        unknown = [item for item, name in names.items() if name is None]
        if unknown:
            shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            raise BadInputError(
                f"{len(unknown)} ids are not in split {self.split!r} of {self.name!r}: {shown}. "
                f"Its ids look like {self.ids[0]!r}."
            )
        part = self._part(sorted({known[name] for name in names.values() if name is not None}))
        part._full = self._full or self.expected.get(self.split) or len(self)
        return part

    def _part(self, indices: Sequence[int]) -> Self:
        part = copy.copy(self)
        part.ids = tuple(self.ids[i] for i in indices)
        return part


class Samples(Protocol):
    """Images that can be loaded and encoded item by item: a segmentation data set, or the frames of a clip."""

    split: str
    ids: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the data set."""

    def __len__(self) -> int:
        """Number of items."""

    def __getitem__(self, index: int) -> Sample:
        """Read an item."""

    def fingerprint(self) -> str:
        """Return a hex digest that changes with the items and their files."""


class MaskSummary:
    """Statistics of masks of a split, in their order.

    counts: pixels (256,) by class id. sizes: (H, W). corners: the class id of the top left pixel.
    """

    def __init__(self, masks: Iterable[np.ndarray] = ()) -> None:
        self.counts: list[np.ndarray] = []
        self.sizes: list[tuple[int, ...]] = []
        self.corners: list[int] = []
        for mask in masks:
            self.add(mask)

    def add(self, mask: np.ndarray) -> None:
        """Add the mask (H, W) of the next image."""
        self.counts.append(np.bincount(mask.ravel(), minlength=256)[:256])
        self.sizes.append(mask.shape)
        self.corners.append(int(mask[0, 0]))

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> np.ndarray:
        """Pixels of all masks by class id, (256,)."""
        return np.array(self.counts, np.int64).reshape(-1, 256).sum(axis=0)

    def presence(self, class_id: int) -> float:
        """Return the fraction of masks that contain a class."""
        return float(np.mean([counts[class_id] > 0 for counts in self.counts]))


def _readings(entry: str) -> Iterator[str]:
    """Yield the ids that a line of a list may mean: the line, its file stem, its first word, and the word's stem."""
    for text in (entry, entry.split()[0]):
        yield from (text, PurePosixPath(text).stem)


def spread_indices(length: int, count: int) -> np.ndarray:
    """Return at most `count` indices of a sequence, evenly spread from its first to its last item."""
    return np.unique(np.linspace(0, length - 1, count).astype(int))


class SegmentationDataset(Dataset):
    """A split of images with masks. classes: names of ids 0..C-1. palette: (C, 3) uint8 colours for pictures.

    void_class: id of a class that is one of the C classes (of a memory, a head, a mean) but is not scored in ground
    truth, such as "other" in the 151-class form of ADE20K; None if there is none.
    Facts about the official files, used to recognise wrong copies: rare_class, the id of a class in few images;
    larger, two ids of which the first covers more pixels than the second; sizes_differ, images have many sizes;
    longest_side, which no image exceeds and most reach (91 % of 470 of VOC, 82 % of 61 of COCO).
    """

    kind = "segmentation"
    classes: ClassVar[tuple[str, ...]]
    void_class: ClassVar[int | None] = None
    rare_class: ClassVar[int | None] = None
    larger: ClassVar[tuple[int, int] | None] = None
    sizes_differ: ClassVar[bool] = False
    longest_side: ClassVar[int | None] = None

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Read sample `index`. Raises MissingError (no such file), BadInputError (truncated file, bad ids or sizes)."""

    def mask(self, index: int) -> np.ndarray:
        """Read only the mask of sample `index`."""
        return self[index].mask

    def eval_mask(self, mask: np.ndarray) -> np.ndarray:
        """Return the mask for losses and scores, in which pixels of `void_class` are IGNORE too."""
        return mask if self.void_class is None else np.where(mask == self.void_class, np.uint8(IGNORE), mask)

    def sanity_check(self, masks: MaskSummary) -> list[str]:
        """Return messages if the masks of a split (or 16 of them) are not the official ones.

        `data check` reports them for whole splits. `run` checks 16 masks before it starts, and stops if there are any.
        """
        counts, problems = masks.total, []
        if len(self.classes) > 2 and counts[0] and counts[IGNORE] and not counts[1:IGNORE].any():
            problems.append(
                f"The masks contain {self.classes[0]!r} and void only: they are black-and-white pictures (0 and 255), "
                f"not class ids. Restore the original masks."
            )
        if len(masks) < FEW:
            return problems
        rare = self.rare_class
        if rare is not None and masks.presence(rare) > 0.5 and counts[rare] > 0.02 * counts.sum():
            problems.append(
                f"{100 * masks.presence(rare):.0f} % of the masks have {self.classes[rare]!r}, which is rare: ids are "
                f"shifted by one, with void as the last id. Restore the original masks."
            )
        if self.larger and counts[self.larger[1]] > 2 * counts[self.larger[0]]:
            first, second = (self.classes[i] for i in self.larger)
            problems.append(
                f"The masks have more {second!r} than {first!r}: ids are shifted or of another mapping. Restore the "
                f"original masks."
            )
        whole = self.coverage is None  # a part is marked anyway
        if self.sizes_differ and whole and len(masks) >= MANY and len(set(masks.sizes)) == 1:
            height, width = masks.sizes[0]
            problems.append(
                f"All images are {width}x{height} pixels, but those of {self.name} differ in size: they were resized. "
                f"Scores of resized copies cannot be compared: restore the original files."
            )
        elif self.longest_side and whole and len(masks) >= MANY and max(map(max, masks.sizes)) < self.longest_side:
            problems.append(
                f"No image has a side of {self.longest_side} pixels, but most of {self.name} do; the longest is "
                f"{max(map(max, masks.sizes))}: they were resized. Scores of resized copies cannot be compared: "
                f"restore the original files."
            )
        return problems

    def sample_sanity_check(self) -> list[str]:
        """Return the messages of `sanity_check` for 16 masks across the split."""
        return self.sanity_check(MaskSummary(self.mask(index) for index in spread_indices(len(self), MANY)))

    @property
    @abc.abstractmethod
    def palette(self) -> np.ndarray:
        """(C, 3) uint8."""


class PairDataset(Dataset):
    """A split of image pairs. `pairs` is the annotation; images are read one by one by id.

    expected_attributes: for full splits, the number of pairs with level 0, 1, ... of an attribute.
    """

    kind = "pairs"
    sampling_unit = "pair"
    expected_attributes: ClassVar[dict[str, dict[str, tuple[int, ...]]]] = {}
    pairs: Sequence[Pair]

    @property
    def image_ids(self) -> tuple[str, ...]:
        """Sorted ids of all images that some pair uses."""
        return tuple(sorted({i for pair in self.pairs for i in (pair.source_id, pair.target_id)}))

    def _part(self, indices: Sequence[int]) -> Self:
        part = super()._part(indices)
        part.pairs = tuple(self.pairs[i] for i in indices)
        return part

    @abc.abstractmethod
    def read_image(self, image_id: str) -> np.ndarray:
        """Read an image, (H, W, 3) uint8 RGB. Raises MissingError and BadInputError."""

    def __getitem__(self, index: int) -> PairSample:
        pair = self.pairs[index]
        return PairSample(pair, self.read_image(pair.source_id), self.read_image(pair.target_id))


class BoxDataset(Dataset):
    """A split of images with the boxes of their objects, read item by item."""

    kind = "boxes"

    @abc.abstractmethod
    def read_image(self, image_id: str) -> np.ndarray:
        """Read an image, (H, W, 3) uint8 RGB. Raises MissingError and BadInputError."""

    @abc.abstractmethod
    def boxes(self, image_id: str) -> np.ndarray:
        """Read the boxes of an image, (n, 4) as in `BoxSample`, n may be 0. Raises MissingError and BadInputError."""

    def __getitem__(self, index: int) -> BoxSample:
        item = self.ids[index]
        return BoxSample(self.read_image(item), self.boxes(item), item)
