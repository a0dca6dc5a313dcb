"""User-defined data sets: readers made from a `dataset.toml` (`neco_bench.core.dataset_file`).

A split is a list of ids in a file, or, with {split} in the patterns, the content of a folder. An id is the part of the
image path that matches {id}, with "/" between folders.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from neco_bench.core.dataset_file import DatasetFile
from neco_bench.core.errors import BadInputError
from neco_bench.core.files import digest
from neco_bench.core.own_data import FILE, OwnDataset, read_own
from neco_bench.data.base import IGNORE, Dataset, Pair
from neco_bench.data.folder import (
    AbsentSplitError,
    Files,
    PairedFolders,
    PairFolder,
    Tree,
    checked_box,
    contents,
    first_entry,
    missing,
    read_lines,
    repeated,
)
from neco_bench.data.io import check_shape, id_table, near_files, read_image, read_json, valid_name

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")

_ANY_CASE = [text for suffix in SUFFIXES for text in (suffix, suffix.upper())]

PAIRS_FORM = (
    'a list of pairs such as {"source": "a", "target": "b", "source_points": [[x, y], ...], "target_points": '
    "[[x, y], ...]}, with ids of images and points in pixels"
)


def own_class(own: OwnDataset) -> type[Dataset]:
    """Return the reader class of a user-defined data set. Raises BadInputError if its `dataset.toml` is wrong."""
    if own.file is None:
        raise BadInputError(own.problem)
    file = own.file
    facts = {
        "name": own.name,
        "file": file,
        "splits": tuple(file.splits),
        "citation": file.citation,
        "class_colours": file.palette,
        # Settings on which numbers depend; colours that are used only in pictures are left out.
        "version": digest(
            file.model_dump(exclude={"citation", *(() if file.mask_values == "colours" else ("palette",))})
        ),
        "layout": "\n".join(
            f"  {own.folder}/{line}" for line in (FILE, *file.splits.values(), file.images, file.masks) if line
        ),
    }
    if file.kind == "pairs":
        return type("OwnPairs", (_OwnPairs,), facts)
    return type("OwnSegmentation", (_OwnSegmentation,), {**facts, "classes": file.classes})


def _restore(folder: Path, state: dict[str, Any]) -> Dataset:
    """Create the data set in a loading process."""
    cls = own_class(read_own(folder))
    data = cls.__new__(cls)
    data.__dict__.update(state)
    return data


class _AnySuffix(Files):
    """Files NAME + any image suffix; `after` is the text before the suffix."""

    def path(self, item: str) -> Path:
        stem = super().path(item)
        return next((path for suffix in _ANY_CASE if (path := Path(f"{stem}{suffix}")).is_file()), stem)

    def ids(self) -> set[str]:
        return {item for files in self._each() for item in files.ids()}

    def any(self) -> bool:
        return any(files.any() for files in self._each())

    def _each(self) -> list[Files]:
        return [Files(self.folder, self.after + suffix, self.before) for suffix in _ANY_CASE]


def files_of(folder: Path, pattern: str, split: str) -> Files:
    """Return the files of a pattern such as "images/{split}/{id}.jpg"; the suffix ".*" is any image suffix."""
    start, after = pattern.replace("{split}", split).split("{id}")
    place, slash, before = start.rpartition("/")
    if "/" in after:
        after_place, _, _ = after.rpartition("/")
        raise BadInputError(f"{folder / FILE}: in {pattern!r} no folder may follow {{id}}, but {after_place!r} does.")
    if after.endswith(".*"):
        return _AnySuffix(folder / f"{place}{slash}", after.removesuffix(".*"), before)
    return Files(folder / f"{place}{slash}", after, before)


class _OwnSegmentation(PairedFolders):
    """Images with masks, according to a `dataset.toml`."""

    file: ClassVar[DatasetFile]
    known_palette = False  # the palette of a mask file may have any colours

    def __init__(self, folder: Path, split: str) -> None:
        """Raises AbsentSplitError (no list, no images), MissingError (no image or mask), BadInputError (list)."""
        if not self.file.splits[split]:
            super().__init__(folder, split)
            return
        self._set_tree(self.tree(folder, split), split)
        self.list_file = folder / self.file.splits[split]
        self.ids = _listed_ids(self, self.list_file, self._images)
        for files, what in ((self._images, "image"), (self._masks, "mask")):
            _check_all_there(self, files, what)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.folder, vars(self))

    @classmethod
    def tree(cls, folder: Path, split: str) -> Tree:
        return Tree(folder, files_of(folder, cls.file.images, split), files_of(folder, cls.file.masks, split))

    @classmethod
    def has_images(cls, folder: Path, split: str) -> bool:
        return (folder / cls.file.splits[split]).exists() and super().has_images(folder, split)

    @property
    def table(self) -> np.ndarray:
        return id_table({**self.file.class_values, **dict.fromkeys(self.file.void_values, IGNORE)})

    def read_mask(self, item: str, size: tuple[int, int]) -> np.ndarray:
        if self.file.mask_values == "ids":
            return super().read_mask(item, size)
        path = self.files(item)[1]
        colours = read_image(path, listed_in=self.list_file).astype(np.int32)
        check_shape(path, colours.shape[:2], size, "Mask")
        return _ids_of_colours(colours @ _CODE, self.file, path)


_CODE = np.array([1 << 16, 1 << 8, 1], np.int32)  # weights to encode a colour as one number


def _ids_of_colours(codes: np.ndarray, file: DatasetFile, path: Path) -> np.ndarray:
    """Return the class ids (H, W) of the colours in a mask. Raises BadInputError if a colour is not in the palette."""
    known = np.array([*file.palette, *file.ignore_colours], np.int32) @ _CODE
    order = np.argsort(known)
    places = order[np.searchsorted(known, codes, sorter=order).clip(max=len(known) - 1)]
    wrong = codes[known[places] != codes]
    if wrong.size:
        colour = [int(wrong[0]) >> shift & 255 for shift in (16, 8, 0)]
        raise BadInputError(
            f"Mask {path} has the colour {colour} in {(wrong == wrong[0]).sum()} pixels, and {len(np.unique(wrong))} "
            f"colours in total that are neither in palette nor in ignore_colours in {FILE}. Add it there. Many such "
            f"colours mean that the mask was resized with interpolation or saved as JPEG."
        )
    return np.where(places < len(file.palette), places, IGNORE).astype(np.uint8)


def _listed_ids(data: _OwnSegmentation, path: Path, images: Files) -> tuple[str, ...]:
    """Return the ids in a list, whose lines are ids or image paths. Raises AbsentSplitError and BadInputError."""
    place = images.folder.relative_to(data.folder).as_posix() + "/"
    ids = [_id_of(line, place, images) for line in read_lines(type(data), path)]
    if twice := repeated(ids):
        raise BadInputError(f"Split list {path} names {twice!r} more than once. Delete all but one of these lines.")
    return tuple(ids)


def _id_of(line: str, place: str, images: Files) -> str:
    entry = first_entry(line)  # a line may also name the mask
    stem, suffix = os.path.splitext(entry)
    if suffix.lower() not in SUFFIXES:
        return line
    inner, slash, name = stem.removeprefix("./").removeprefix(place).rpartition("/")
    after = images.after if isinstance(images, _AnySuffix) else os.path.splitext(images.after)[0]
    return inner + slash + name.removeprefix(images.before).removesuffix(after)


def _check_all_there(data: _OwnSegmentation, files: Files, what: str) -> None:
    """Raise MissingError if listed ids have no image or no mask."""
    absent = [item for item in data.ids if not files.path(item).is_file()]
    if absent:
        first = files.path(absent[0])
        raise missing(
            type(data),
            f"{len(absent)} of the {len(data.ids)} ids in {data.list_file} have no {what}; the first is {absent[0]!r}, "
            f"whose {what} should be {first}. {near_files(first) or contents(first.parent)}",
        )


class _OwnPairs(PairFolder):
    """Pairs of images with keypoints, listed in a JSON file (PAIRS_FORM).

    A pair may have `category` (text), `source_box` and `target_box` ([x1, y1, x2, y2]; without them the tight boxes of
    the points), `point_ids` (names) and `id`.
    """

    file: ClassVar[DatasetFile]

    def __init__(self, folder: Path, split: str) -> None:
        """Raises MissingError (no JSON file, no image) and BadInputError (wrong content)."""
        self.folder, self.split = folder, split
        self._images = files_of(folder, self.file.images, split)
        path = folder / self.file.splits[split]
        try:
            self.pairs = read_json(path, _parse_pairs, f"file of keypoint pairs ({PAIRS_FORM})")
        except FileNotFoundError:
            hint = near_files(path) or contents(path.parent)
            raise missing(type(self), f"the file of pairs {path} does not exist. {hint}", AbsentSplitError) from None
        self.ids = tuple(pair.id for pair in self.pairs)
        absent = [name for name in self.image_ids if not self.image_file(name).is_file()]
        if absent:
            first = self.image_file(absent[0])
            raise missing(
                type(self),
                f"{len(absent)} of the {len(self.image_ids)} images that {path} names do not exist; the first should "
                f"be {first}. {near_files(first) or contents(first.parent)}",
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.folder, vars(self))

    @classmethod
    def has_images(cls, folder: Path, split: str) -> bool:
        return (folder / cls.file.splits[split]).is_file() and files_of(folder, cls.file.images, split).any()

    def image_file(self, image_id: str) -> Path:
        return self._images.path(image_id)


def _parse_pairs(document: Any) -> tuple[Pair, ...]:
    """Parse the pairs of a JSON document. Raises KeyError, TypeError and ValueError, which name the wrong pair."""
    if not isinstance(document, list) or not document:
        raise ValueError("it is not a list of pairs")
    pairs = []
    for number, raw in enumerate(document):
        try:
            pairs.append(_parse_pair(raw))
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"pair {number}: {what}") from error
    if twice := repeated(pair.id for pair in pairs):
        raise ValueError(f"two pairs have the id {twice!r}; ids must be unique")
    return tuple(pairs)


def _parse_pair(raw: Any) -> Pair:
    if not isinstance(raw, dict):
        raise TypeError("it is not an object")
    known = {"id", "source", "target", "category", "point_ids"}
    known |= {f"{image}_{what}" for image in ("source", "target") for what in ("points", "box")}
    if unknown := raw.keys() - known:
        raise ValueError(f"unknown key {min(unknown)!r}; known are {', '.join(sorted(known))}")
    points = [np.array(raw[key], np.float64) for key in ("source_points", "target_points")]
    valid = all(p.ndim == 2 and p.shape[1] == 2 and np.isfinite(p).all() for p in points)
    if not valid or len(points[0]) != len(points[1]):
        raise ValueError("source_points and target_points must have the same number of points [x, y], one or more")
    source, target = valid_name(raw["source"]), valid_name(raw["target"])
    point_ids = tuple(map(str, raw.get("point_ids", range(len(points[0])))))
    if len(point_ids) != len(points[0]):
        raise ValueError(f"{len(point_ids)} point_ids for {len(points[0])} points")
    boxes = [
        checked_box(raw[key] if key in raw else [*p.min(0), *p.max(0)])
        for key, p in zip(("source_box", "target_box"), points, strict=True)
    ]
    return Pair(
        id=str(raw.get("id", f"{source}-{target}")),
        source_id=source,
        target_id=target,
        source_points=points[0],
        target_points=points[1],
        point_ids=point_ids,
        source_box=boxes[0],
        target_box=boxes[1],
        category=str(raw.get("category", "all")),
    )
