"""Data sets in folders: split lists, errors that show the expected tree, digests, pair annotations, and base classes
for segmentation and pairs that are read file by file."""

from __future__ import annotations

import abc
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from neco_bench.core.errors import BadInputError, MissingError, first_names
from neco_bench.data.base import IGNORE, Dataset, Pair, PairDataset, Sample, Samples, SegmentationDataset
from neco_bench.data.io import (
    id_table,
    near_files,
    no_file,
    read_image,
    read_mask,
    read_size,
    read_text,
    valid_name,
    voc_colours,
)


class AbsentSplitError(MissingError):
    """The list of a split does not exist; the rest of the data set may be complete."""


def missing(dataset: type[Dataset], what: str, error: type[MissingError] = MissingError) -> MissingError:
    """Return an error that states what is missing, the expected tree, and the command that checks it."""
    return error(
        f"Data set {dataset.name!r}: {what}\nExpected files:\n{dataset.layout}\n"
        f"Check them with: neco-bench data check {dataset.name} --data-root DIR"
    )


def contents(path: Path) -> str:
    """Return a sentence with the nearest existing folder at or above `path`, and some of its content."""
    folder = next((place for place in (path, *path.parents) if place.is_dir()), path)
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return ""
    return f"{folder} contains {first_names(map(repr, names)) or 'nothing'}."


def locate(folder: Path, *markers: str, name: str = "") -> Path:
    """Return the nearest folder that contains one of the `markers` (globs), at most 4 levels below; else `folder`.

    name: part of the name of the right folder if several are equally near. Raises BadInputError if it is still
    ambiguous.
    """
    level = [folder]
    for _ in range(5):
        holders = [place for place in level if any(next(place.glob(marker), None) for marker in markers)]
        if len(holders) > 1 and name:
            holders = [place for place in holders if name in place.name] or holders
        if len(holders) > 1:
            raise BadInputError(
                f"{folder} contains several copies: {', '.join(map(str, holders[:5]))}. Move all but one of them away."
            )
        if holders:
            return holders[0]
        level = [inner for place in level if place.is_dir() for inner in sorted(place.iterdir()) if _searched(inner)]
    return folder


def _searched(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith((".", "__MACOSX"))


def read_lines(dataset: type[Dataset], path: Path) -> list[str]:
    """Return the non-blank lines of a list, stripped; folders are separated by "/".

    Raises AbsentSplitError and BadInputError (no text, empty).
    """
    try:
        text = read_text(path, "Split list")
    except FileNotFoundError:
        hint = near_files(path) or contents(path.parent)
        raise missing(dataset, f"the split list {path} does not exist. {hint}", AbsentSplitError) from None
    lines = [line.strip().replace("\\", "/") for line in text.splitlines() if line.strip()]
    if not lines:
        raise BadInputError(f"Split list {path} is empty. Restore it from the original archive.")
    return lines


def read_list(dataset: type[Dataset], path: Path, *, stems: bool = False) -> tuple[str, ...]:
    """Return the first file or word of each line of a split list; with `stems`, the stem of a file.

    Raises AbsentSplitError, and BadInputError (empty, repeated).
    """
    words = tuple(map(first_entry, read_lines(dataset, path)))
    if stems:
        words = tuple(PurePosixPath(word).stem for word in words)
    if twice := repeated(words):
        raise BadInputError(f"Split list {path} names {twice!r} more than once. Restore it from the original archive.")
    return words


def repeated(names: Iterable[str]) -> str | None:
    """Return a name that occurs more than once; None if there is none."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def first_entry(line: str) -> str:
    """Return the first file of a line (which may contain spaces before an image suffix), else the first word."""
    file = re.match(r".*?\.(?:png|jpe?g|bmp|ppm|tiff?|webp)(?=\s|$)", line, re.IGNORECASE)
    return file[0] if file else line.split()[0]


def shared_items(train: Dataset, scored: Dataset) -> str:
    """Return a message if two splits of a data set have items in common, of equal ids and files; else ""."""
    shared = sorted(set(train.ids) & set(scored.ids))
    files: list[Any] = [getattr(split, "files", None) for split in (train, scored)]
    if not shared or None in files or files[0](shared[0]) != files[1](shared[0]):
        return ""
    share = f"{len(shared)} of the {len(scored)} items of split {scored.split}"
    return f"{share} are also in split {train.split}: {first_names(shared)}."


_times: ContextVar[list[int] | None] = ContextVar("times", default=None)  # those that `fingerprint_and_times` collects


def fingerprint_and_times(dataset: Dataset | Samples) -> tuple[str, list[int]]:
    """Return the fingerprint of a data set, and the times (ns) at which its files were last changed.

    The fingerprint depends only on names and sizes, so that it is the same on every machine. Times also show, on one
    machine, changes that keep the size.
    """
    times: list[int] = []
    token = _times.set(times)
    try:
        return dataset.fingerprint(), times
    finally:
        _times.reset(token)


def file_digest(facts: Iterable[str], bases: Path | Sequence[Path], files: Iterable[Path]) -> str:
    """Return the sha256 over `facts` and over names (relative to the first of `bases` above them) and sizes of files.

    Raises MissingError and BadInputError, whose messages name a file.
    """
    digest = hashlib.sha256()
    bases = [bases] if isinstance(bases, Path) else bases
    for fact in facts:
        digest.update(f"{fact}\n".encode("utf-8", "surrogateescape"))
    for path in files:
        try:
            status = path.stat()
        except FileNotFoundError:
            raise no_file("file", path) from None
        except OSError as error:
            raise BadInputError(f"{path} cannot be read: {error.strerror or error}. Make it readable.") from error
        if (times := _times.get()) is not None:
            times.append(status.st_mtime_ns)
        name = next(path.relative_to(base) for base in bases if path.is_relative_to(base))
        digest.update(f"{name.as_posix()} {status.st_size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def parse_pair(name: str, raw: dict[str, Any]) -> Pair:
    """Parse the JSON object of a SPair-71k pair file. Raises KeyError, TypeError, ValueError on wrong content."""
    category = valid_name(raw["category"])
    source, target = (np.array(raw[key], np.float64).reshape(-1, 2) for key in ("src_kps", "trg_kps"))
    if not len(source) == len(target) == len(raw["kps_ids"]):
        raise ValueError(f"{len(source)} source points, {len(target)} target points, {len(raw['kps_ids'])} point names")
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise ValueError("a keypoint is not a finite number")
    names = ("viewpoint_variation", "scale_variation", "truncation", "occlusion")
    attributes = {name: int(raw[name]) for name in names}
    if not all(0 <= level <= 3 for level in attributes.values()):
        raise ValueError(f"levels of attributes are 0..3, got {attributes}")
    return Pair(
        id=name,
        source_id=f"{category}/{Path(valid_name(raw['src_imname'])).stem}",
        target_id=f"{category}/{Path(valid_name(raw['trg_imname'])).stem}",
        source_points=source,
        target_points=target,
        point_ids=tuple(map(str, raw["kps_ids"])),
        source_box=checked_box(raw["src_bndbox"]),
        target_box=checked_box(raw["trg_bndbox"]),
        category=category,
        attributes=attributes,
    )


def checked_box(values: Iterable[Any]) -> tuple[float, float, float, float]:
    """Return (x1, y1, x2, y2). Raises ValueError if they are not four finite numbers, or enclose no area."""
    box = tuple(map(float, values))
    if len(box) != 4 or not np.isfinite(box).all():
        raise ValueError(f"a box needs four finite numbers, got {box}")
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"the box {box} has no area")
    return box


class SegmentationFolder(SegmentationDataset):
    """Segmentation read from files. A subclass sets `folder`, `split`, `ids`, and defines the paths of files.

    first_value: the value of class 0 in mask files; those of the other classes follow. void: the value that means void,
    if there is one. causes: likely causes of certain wrong values, for messages. class_colours: colours of the classes
    in pictures; VOC's if empty. image_size: (H, W) of every image of the set, None if they differ. list_file: the list
    of items, if any. source: the kind of annotation that is read, if there are several. shared_files: other files on
    which masks depend.
    """

    first_value: ClassVar[int] = 0
    void: ClassVar[int | None] = IGNORE
    class_colours: ClassVar[Sequence[tuple[int, int, int]]] = ()
    causes: ClassVar[dict[int, str]] = {}
    image_size: ClassVar[tuple[int, int] | None] = None
    folder: Path
    list_file: Path | None = None
    source: str = ""
    shared_files: tuple[Path, ...] = ()

    @abc.abstractmethod
    def files(self, item: str) -> tuple[Path, Path]:
        """Return the paths of the image and the mask of an item id."""

    @property
    def table(self) -> np.ndarray:
        """Return the class id of each file value, see `id_table`."""
        void = {} if self.void is None else {self.void: IGNORE}
        return id_table({self.first_value + i: i for i in range(len(self.classes))} | void)

    @classmethod
    def has_images(cls, folder: Path, split: str) -> bool:
        """Return whether the first image of a split and its mask exist, without reading them."""
        data = cls(folder, split)  # type: ignore[call-arg]
        return all(path.is_file() for path in data.files(data.ids[0]))

    def __getitem__(self, index: int) -> Sample:
        item = self.ids[index]
        path = self.files(item)[0]
        image = read_image(path, listed_in=self.list_file)
        self._check_size(path, image.shape[:2])
        return Sample(image, self.read_mask(item, image.shape[:2]), item)

    def mask(self, index: int) -> np.ndarray:
        """Read only the mask of sample `index`, (H, W) class ids. Raises the errors of `[index]`."""
        item = self.ids[index]
        path = self.files(item)[0]
        size = read_size(path, listed_in=self.list_file)
        self._check_size(path, size)
        return self.read_mask(item, size)

    def _check_size(self, path: Path, size: tuple[int, ...]) -> None:
        """Raise BadInputError if an image cannot have its original size."""
        if self.image_size is not None and size != self.image_size:
            fact = f"all images of {self.name} are {self.image_size[1]}x{self.image_size[0]}"
        elif self.longest_side is not None and max(size) > self.longest_side:
            fact = f"no image of {self.name} has a side longer than {self.longest_side}"
        else:
            return
        raise BadInputError(
            f"Image {path} is {size[1]}x{size[0]} pixels (width x height), {fact}: it was resized or belongs to "
            f"another data set. Scores of resized copies cannot be compared: restore the original files."
        )

    def read_mask(self, item: str, size: tuple[int, int]) -> np.ndarray:
        """Read the mask of an item id, which must have the size (H, W) of its image."""
        table = self.table
        colours = np.zeros((256, 3), np.uint8)
        colours[: len(self.classes)] = self.palette
        return read_mask(
            self.files(item)[1],
            table=table,
            colours=colours[table[:256]],
            known_palette=self.known_palette,
            causes=self.causes,
            size=size,
            listed_in=self.list_file,
        )

    def fingerprint(self) -> str:
        """Return the sha256 over name, reader version, split, source, ids, and names and sizes of all files."""
        facts = (self.name, self.version, self.split, *filter(None, [self.source]), *self.ids)
        paths = dict.fromkeys(path for item in self.ids for path in self.files(item))
        return file_digest(facts, self._bases, {**paths, **dict.fromkeys(self.shared_files)})

    @property
    def _bases(self) -> Sequence[Path]:
        """Return the folders to which file names in the fingerprint are relative."""
        return (self.folder,)

    @property
    def known_palette(self) -> bool:
        """Whether palette masks of this set have the colours of VOC, of grey levels or of `palette`."""
        return True

    @property
    def palette(self) -> np.ndarray:
        """Return `class_colours`, else VOC's colours."""
        return np.array(self.class_colours, np.uint8) if self.class_colours else voc_colours(len(self.classes))


class PairFolder(PairDataset):
    """Image pairs read from files. A subclass sets `folder`, `split`, `pairs`, `ids`, and defines paths of images."""

    folder: Path

    @abc.abstractmethod
    def image_file(self, image_id: str) -> Path:
        """Return the path of an image."""

    def read_image(self, image_id: str) -> np.ndarray:
        """Read an image, (H, W, 3) uint8 RGB. Raises MissingError and BadInputError."""
        return read_image(self.image_file(image_id))

    def fingerprint(self) -> str:
        """Return the sha256 over name, reader version, split, pairs with all points, and image names and sizes."""
        pairs = [
            repr(
                (
                    *(pair.id, pair.source_id, pair.target_id),
                    (pair.source_points.tolist(), pair.target_points.tolist(), pair.point_ids),
                    *((pair.source_box, pair.target_box), pair.category, sorted(pair.attributes.items())),
                )
            )
            for pair in self.pairs
        ]
        facts = (self.name, self.version, self.split, *pairs)
        return file_digest(facts, self.folder, map(self.image_file, self.image_ids))


@dataclass(frozen=True)
class Files:
    """Files BEFORE + NAME + AFTER below a folder, by id."""

    folder: Path
    after: str
    before: str = ""

    def path(self, item: str) -> Path:
        """Return the file of an item."""
        start, slash, name = item.rpartition("/")
        return self.folder / f"{start}{slash}{self.before}{name}{self.after}"

    def ids(self) -> set[str]:
        """Return ids of all existing files: relative paths without BEFORE and AFTER, such as "aachen/0001"."""
        ids: set[str] = set()

        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        for place, _, names in os.walk(self.folder, onerror=fail):
            inner = Path(place).relative_to(self.folder).as_posix()
            start = "" if inner == "." else f"{inner}/"
            ids.update(
                start + name[len(self.before) : len(name) - len(self.after)] for name in names if self._matches(name)
            )
        return ids

    def any(self) -> bool:
        """Return whether there is such a file; stops at the first."""
        folders = []
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        folders.append(Path(entry.path))
                    elif self._matches(entry.name):
                        return True
        except OSError:
            return False
        return any(replace(self, folder=folder).any() for folder in folders)

    def _matches(self, name: str) -> bool:
        return name.startswith(self.before) and name.endswith(self.after) and not name.startswith(".")


@dataclass(frozen=True)
class Tree:
    """Paths of a split without a list. folder: the folder of both, or of the images if masks are elsewhere.

    source, shared_files: see SegmentationFolder.
    """

    folder: Path
    images: Files
    masks: Files
    source: str = ""
    shared_files: tuple[Path, ...] = ()


class PairedFolders(SegmentationFolder):
    """Segmentation without split lists: a split is two folders, in which each image has a mask with the same name.

    A subclass defines their paths (`tree`).
    """

    def __init__(self, folder: Path, split: str) -> None:
        """Raises AbsentSplitError (no images), MissingError (images without masks, or masks without images)."""
        self._set_tree(self.tree(folder, split), split)
        image_ids = self._images.ids()
        self.check_pairing(image_ids, self._masks.ids())
        self.ids = tuple(sorted(image_ids))

    @classmethod
    @abc.abstractmethod
    def tree(cls, folder: Path, split: str) -> Tree:
        """Return where the files of a split should be."""

    @classmethod
    def has_images(cls, folder: Path, split: str) -> bool:
        """Return whether the folder has images and masks of a split, without reading them."""
        tree = cls.tree(folder, split)
        return tree.images.any() and tree.masks.any()

    def _set_tree(self, tree: Tree, split: str) -> None:
        self.split, self.folder, self._images, self._masks = split, tree.folder, tree.images, tree.masks
        self.source, self.shared_files = tree.source, tree.shared_files

    def check_pairing(self, image_ids: set[str], mask_ids: set[str]) -> None:
        """Raise AbsentSplitError if there are no images, and MissingError if only one of the two has an id."""
        cls, images, masks = type(self), self._images, self._masks
        if not image_ids:
            text = f"split {self.split!r} has no images in {images.folder}."
            hint = _other_files(images)
            raise missing(cls, f"{text} {hint}") if hint else missing(cls, text, AbsentSplitError)
        if not mask_ids and (hint := _other_files(masks)):
            raise missing(cls, f"split {self.split!r} has no masks in {masks.folder}. {hint}")
        # Converters of other projects write NAME_labelTrainIds.png next to NAME.png.
        mask_ids = mask_ids - ({f"{name}_labelTrainIds" for name in mask_ids} - image_ids)
        for have, lack, one, other in ((image_ids, mask_ids, images, masks), (mask_ids, image_ids, masks, images)):
            if alone := sorted(have - lack):
                shown = ", ".join(one.path(name).name for name in alone[:3]) + (", ..." if len(alone) > 3 else "")
                example = other.path(min(lack) if lack else "NAME").name
                raise missing(
                    cls,
                    f"{len(alone)} of {len(have)} files in {one.folder} have no partner in {other.folder}, whose "
                    f"names look like {example!r}: {shown}. {_why_alone(alone, have, lack, one, other)}",
                )

    def files(self, item: str) -> tuple[Path, Path]:
        """Return the image file and the mask file of an item."""
        return self._images.path(item), self._masks.path(item)


def _other_files(files: Files) -> str:
    """Return a sentence on other files in the folder of `files`; empty if there are none."""
    if present := sorted(Files(files.folder, "").ids()):
        wanted = files.path("NAME").name
        return f"It has {len(present)} files such as {Path(present[0]).name!r}; {wanted} is expected: rename them."
    return ""


def _why_alone(alone: list[str], have: set[str], lack: set[str], one: Files, other: Files) -> str:
    """Return why files probably have no partner, and the fix. alone: ids of `one` in `have` but not in `lack`."""
    if copies := [name for name in alone if re.search(r" ?\(\d+\)$| - [Cc]opy$", name)]:
        return f"{one.path(copies[0]).name!r} looks like a second download of a file: delete such copies."
    if {name.rpartition("/")[2] for name in have} == {name.rpartition("/")[2] for name in lack}:
        return (
            f"The same names are at different depths, {one.path(alone[0])} and {other.path(min(lack))}: move the files "
            f"to the expected paths."
        )
    if _shifted(have, lack):
        return "The numbers of the two differ by one: one counts from 0, the other from 1. Restore the original names."
    if near := near_files(other.path(alone[0])):
        return f"In {other.folder}, {near}"
    expected = other.path(alone[0])
    stem = alone[0].rpartition("/")[2]
    names = os.listdir(expected.parent) if expected.parent.is_dir() else []
    if variants := sorted(name for name in names if name.startswith(stem) and not name[len(stem)].isalnum()):
        return f"There is {variants[0]!r} instead of {expected.name!r}: all must be of the same kind."
    return "An archive was unpacked only in part: unpack both again completely."


def _shifted(first: set[str], second: set[str]) -> bool:
    """Return whether names end in numbers, and those of one set are one larger than those of the other."""
    parsed = [[re.fullmatch(r"(.*?)(\d+)", name) for name in names] for names in (first, second)]
    numbers, others = ({(match[1], int(match[2])) for match in matches if match} for matches in parsed)
    return len(numbers) == len(first) > 1 and others in (
        {(start, number + 1) for start, number in numbers},
        {(start, number - 1) for start, number in numbers},
    )
