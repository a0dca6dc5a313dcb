"""The dataset contracts: segmentation sets and image-pair sets, read item by item, images never stored.

Masks hold class ids 0..C-1 and `IGNORE` (255 where C <= 255) for void. A dataset knows nothing of encoders or tasks.
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

# What IGNORE does where labels vote: it counts as a label that wins or loses ties, or it has no vote.
Void = Literal["wins ties", "loses ties", "never votes"]

FEW, MANY = 4, 16  # masks from which on their statistics, and their sizes, mean something


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
    """What all data sets share. A class is constructed as `Class(folder, split)`; folder is None without `needs_root`.

    name, split; version: of the reader and its id mapping. expected: number of items of each full split (empty where
    no such number exists). citation: short reference. ids: item ids in a fixed order (image ids, or pair ids).
    kind: "segmentation", "pairs", "boxes", "video", "views", "depth" or "normals". needs_root: whether it is read from
    the data root. folder_name: its folder there, the name if empty. layout: the tree of files expected there, shown in
    error messages. images_from: the collection that the images are from, the folder name if empty. fractions: parts
    that can be drawn from a split, as {split: {parts: items}}; see `fraction`. sampling_unit: what was drawn from a
    population, so that intervals can be made: "image", "pair", "frame" (of drives, in order), "sequence", "scene", ...;
    see `core.sampling`.
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
        """Name, split and number of items."""
        return f"<{self.kind} data set {self.name!r}, split {self.split!r}: {len(self)} items>"

    @property
    def coverage(self) -> dict[str, int] | None:
        """{"found": n, "expected": m} where the split on disk is not the full one, whatever `head` took; else None."""
        full = self._full or self.expected.get(self.split)
        count = self._before_head or len(self)
        return None if full is None or count == full else {"found": count, "expected": full}

    @classmethod
    def group_of(cls, item: str) -> str | None:
        """Name the drive, sequence or scene that an item is part of, from its id; None: it was drawn by itself."""
        return None

    @classmethod
    def has_images(cls, folder: Path | None, split: str) -> bool:
        """Whether a folder has images of a split, found without reading them. May raise what the constructor raises."""
        return folder is None or any(folder.iterdir())

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hex digest that changes with the list of items and with the files behind them (names and sizes)."""

    def sample_sanity_check(self) -> list[str]:
        """What a few items of the split say against its files; `run` looks before it starts, and stops."""
        return []

    def head(self, count: int) -> Self:
        """The same data set with its first `count` items only. Raises UsageError where count < 1."""
        if count < 1:
            raise UsageError(f"A data set cannot be limited to {count} items: give 1 or more.")
        part = self._part(range(min(count, len(self))))
        part._before_head = self._before_head or len(self)
        return part

    def fraction(self, parts: int, draw: int) -> Self:
        """Draw `draw` of one in `parts` items of this split, as its own split "<split>_1of<parts>_<draw>".

        The rule: item ids are ordered by the sha256 of "<folder name>/<split>/<draw>/<id>" and the first n are taken,
        in the order of the full split. So draws of equal number are nested, and none depends on the machine or on the
        order of files. n is `fractions[split][parts]`, and proportionally less where files of the full split are
        absent.
        """
        count, full = self.fractions[self.split][parts], self.expected[self.split]
        text = f"{self.folder_name or self.name}/{self.split}/{draw}/"
        order = sorted(range(len(self)), key=lambda i: hashlib.sha256(f"{text}{self.ids[i]}".encode()).digest())
        part = self._part(sorted(order[: max(1, round(count * len(self) / full))]))
        part.split, part._full = f"{self.split}_1of{parts}_{draw}", count
        return part

    def subset(self, ids: Iterable[str]) -> Self:
        """The items of a list of ids only, in the order of this split; the last component of an id is enough.

        Raises BadInputError naming ids that this split does not have.
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
    """What can be loaded and encoded item by item: a segmentation data set, or the frames of a clip."""

    split: str
    ids: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the data set."""

    def __len__(self) -> int:
        """Number of items."""

    def __getitem__(self, index: int) -> Sample:
        """Read an item."""

    def fingerprint(self) -> str:
        """Hex digest that changes with the items and the files behind them."""


class MaskSummary:
    """What masks of a split hold, in their order.

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
        """(256,) pixels of all masks by class id."""
        return np.array(self.counts, np.int64).reshape(-1, 256).sum(axis=0)

    def presence(self, class_id: int) -> float:
        """The fraction of masks that hold a class."""
        return float(np.mean([counts[class_id] > 0 for counts in self.counts]))


def _readings(entry: str) -> Iterator[str]:
    """The ids that a line of a list may mean: all of it, its file's stem, or those of its first word."""
    for text in (entry, entry.split()[0]):
        yield from (text, PurePosixPath(text).stem)


class SegmentationDataset(Dataset):
    """A split of images with masks. classes: names of ids 0..C-1. palette: (C, 3) uint8 colours for pictures.

    void_class: id of a class that is one of the C rows (of a memory, a head, an average) though pixels of it in the
    ground truth are not scored, such as "other" in the 151-class form of ADE20K; None where there is none.
    Facts of the official files that wrong copies are recognised by: rare_class, the id of a class that few images have;
    larger, two ids of which the first covers more pixels than the second; sizes_differ, that images have many sizes;
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
        """Sample `index`. Raises MissingError (no such file) and BadInputError (truncated file, bad ids, sizes)."""

    def mask(self, index: int) -> np.ndarray:
        """The mask of sample `index` alone."""
        return self[index].mask

    def eval_mask(self, mask: np.ndarray) -> np.ndarray:
        """The mask as losses and scores see it: pixels of `void_class` are IGNORE too."""
        return mask if self.void_class is None else np.where(mask == self.void_class, np.uint8(IGNORE), mask)

    def sanity_check(self, masks: MaskSummary) -> list[str]:
        """List what shows that the masks of a split, or 16 across it, are not the official ones.

        `data check` reports it for whole splits; `run` looks at 16 masks before it starts, and stops.
        """
        counts, problems = masks.total, []
        if len(self.classes) > 2 and counts[0] and counts[IGNORE] and not counts[1:IGNORE].any():
            problems.append(
                f"The masks hold {self.classes[0]!r} and void only: they are black-and-white pictures (0 and 255), "
                f"not class ids. Restore the original masks."
            )
        if len(masks) < FEW:
            return problems
        rare = self.rare_class
        if rare is not None and masks.presence(rare) > 0.5 and counts[rare] > 0.02 * counts.sum():
            problems.append(
                f"{100 * masks.presence(rare):.0f} % of the masks hold {self.classes[rare]!r}, which is rare: ids are "
                f"shifted by one, with void as the last id. Restore the original masks."
            )
        if self.larger and counts[self.larger[1]] > 2 * counts[self.larger[0]]:
            first, second = (self.classes[i] for i in self.larger)
            problems.append(
                f"The masks hold more {second!r} than {first!r}: ids are shifted or of another mapping. Restore the "
                f"original masks."
            )
        whole = self.coverage is None  # a part is marked as such anyway
        if self.sizes_differ and whole and len(masks) >= MANY and len(set(masks.sizes)) == 1:
            height, width = masks.sizes[0]
            problems.append(
                f"All images are {width}x{height} pixels, those of {self.name} differ in size: they were resized. "
                f"Scores of resized copies cannot be compared: restore the original files."
            )
        elif self.longest_side and whole and len(masks) >= MANY and max(map(max, masks.sizes)) < self.longest_side:
            problems.append(
                f"No image has a side of {self.longest_side} pixels, as most of {self.name} have; the longest is "
                f"{max(map(max, masks.sizes))}: they were resized. Scores of resized copies cannot be compared: "
                f"restore the original files."
            )
        return problems

    def sample_sanity_check(self) -> list[str]:
        """`sanity_check` of 16 masks across the split."""
        indices = np.unique(np.linspace(0, len(self) - 1, MANY).astype(int))
        return self.sanity_check(MaskSummary(self.mask(index) for index in indices))

    @property
    @abc.abstractmethod
    def palette(self) -> np.ndarray:
        """(C, 3) uint8."""


class PairDataset(Dataset):
    """A split of image pairs. `pairs` is the annotation; images are read one by one by id.

    expected_attributes: for full splits, how many pairs have level 0, 1, ... of an attribute.
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
        """(H, W, 3) uint8 RGB. Raises MissingError and BadInputError."""

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
