"""What data sets in a folder share: split lists, errors that show the expected tree, digests, pair
annotations, segmentation read file by file."""

from __future__ import annotations

import abc
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from neco_bench.data.base import IGNORE, Dataset, Pair, Sample, SegmentationDataset
from neco_bench.data.io import id_table, read_image, read_mask, read_size
from neco_bench.errors import BadInputError, MissingError

PAIR_ATTRIBUTES = ("viewpoint_variation", "scale_variation", "truncation", "occlusion")


class AbsentSplitError(MissingError):
    """The list of a split is not there: the rest of the data set may be whole."""


def missing(dataset: type[Dataset], what: str, error: type[MissingError] = MissingError) -> MissingError:
    """An error whose first line says what is missing, followed by the expected tree and the command that checks it."""
    return error(
        f"Data set {dataset.name!r}: {what}\nExpected files:\n{dataset.layout}\n"
        f"Check them with: neco-bench data check {dataset.name} --data-root DIR"
    )


def read_list(dataset: type[Dataset], path: Path, *, stems: bool = False) -> tuple[str, ...]:
    """The first word of each line of a split list, or of the file it names the stem. Raises AbsentSplitError, and
    BadInputError (empty, repeated)."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise missing(dataset, f"the split list {path} is not there.", AbsentSplitError) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"Split list {path} is not a readable text file: {error}. Restore it.") from error
    words = tuple(line.split()[0] for line in lines if line.strip())
    if stems:
        words = tuple(Path(word).stem for word in words)
    if not words:
        raise BadInputError(f"Split list {path} is empty. Restore it from the original archive.")
    if len(set(words)) < len(words):
        twice = next(word for i, word in enumerate(words) if word in words[:i])
        raise BadInputError(f"Split list {path} names {twice!r} more than once. Restore it from the original archive.")
    return words


def file_digest(facts: Iterable[str], base: Path, files: Iterable[Path]) -> str:
    """Sha256 over `facts` and over names (relative to `base`) and sizes of files. Raises MissingError and BadInputError
    naming a file."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{fact}\n".encode("utf-8", "surrogateescape"))
    for path in files:
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise MissingError(
                f"No file {path}, though the split lists it. Restore it from the original archive."
            ) from None
        except OSError as error:
            raise BadInputError(f"{path} cannot be read: {error.strerror or error}. Make it readable.") from error
        digest.update(f"{path.relative_to(base).as_posix()} {size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def pair_text(pair: Pair) -> str:
    """Everything in a pair as one line, for digests."""
    points = (pair.source_points.tolist(), pair.target_points.tolist(), pair.point_ids)
    boxes = (pair.source_box, pair.target_box)
    return repr(
        (pair.id, pair.source_id, pair.target_id, points, boxes, pair.category, sorted(pair.attributes.items()))
    )


def parse_pair(name: str, raw: dict[str, Any]) -> Pair:
    """A pair from the JSON object of a SPair-71k pair file. Raises KeyError, TypeError, ValueError on wrong content."""
    category = raw["category"]
    source, target = (np.array(raw[key], np.float64).reshape(-1, 2) for key in ("src_kps", "trg_kps"))
    if not len(source) == len(target) == len(raw["kps_ids"]):
        raise ValueError(f"{len(source)} source points, {len(target)} target points, {len(raw['kps_ids'])} point names")
    source_box, target_box = (tuple(map(float, raw[key])) for key in ("src_bndbox", "trg_bndbox"))
    if not len(source_box) == len(target_box) == 4:
        raise ValueError("a box needs four numbers")
    return Pair(
        id=name,
        source_id=f"{category}/{Path(raw['src_imname']).stem}",
        target_id=f"{category}/{Path(raw['trg_imname']).stem}",
        source_points=source,
        target_points=target,
        point_ids=tuple(map(str, raw["kps_ids"])),
        source_box=source_box,
        target_box=target_box,
        category=category,
        attributes={key: int(raw[key]) for key in PAIR_ATTRIBUTES},
    )


def file_ids(folder: Path, before: str, after: str) -> set[str]:
    """Ids of all files BEFORE + NAME + AFTER below a folder: the path from it without the two, as in "aachen/0001"."""
    found: set[str] = set()

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for place, _, names in os.walk(folder, onerror=fail):
        inner = Path(place).relative_to(folder).as_posix()
        start = "" if inner == "." else f"{inner}/"
        found.update(
            start + name[len(before) : len(name) - len(after)]
            for name in names
            if name.startswith(before) and name.endswith(after) and not name.startswith(".")
        )
    return found


def voc_colours(count: int) -> np.ndarray:
    """(count, 3) uint8, VOC's palette: the three bits of an id's octal digit b set bit 7-b of red, green and blue."""
    ids = np.arange(count)[:, None]
    bits = [((ids >> (3 * b + np.arange(3))) & 1) << (7 - b) for b in range(3)]
    return np.sum(bits, axis=0).astype(np.uint8)


class SegmentationFolder(SegmentationDataset):
    """Segmentation read from files. A subclass sets `folder`, `split`, `ids`, and says where files lie.

    void: the mask value in files that means void. causes: what a file is that holds a certain wrong value, for
    messages. list_file: the list that names the items, if any. source: which of several kinds of annotation is read.
    shared_files: files besides images and masks that the masks depend on.
    """

    void: ClassVar[int] = IGNORE
    causes: ClassVar[dict[int, str]] = {}
    folder: Path
    list_file: Path | None = None
    source: str = ""
    shared_files: tuple[Path, ...] = ()

    @abc.abstractmethod
    def files(self, item: str) -> tuple[Path, Path]:
        """Paths of the image and the mask of an item id."""

    @property
    def table(self) -> np.ndarray:
        """Class id of each file value, see `id_table`: as in the file, and IGNORE for `void`, unless a set differs."""
        return id_table({**{i: i for i in range(len(self.classes))}, self.void: IGNORE})

    def __getitem__(self, index: int) -> Sample:
        item = self.ids[index]
        image = read_image(self.files(item)[0], listed_in=self.list_file)
        return Sample(image, self.read_mask(item, image.shape[:2]), item)

    def mask(self, index: int) -> np.ndarray:
        item = self.ids[index]
        return self.read_mask(item, read_size(self.files(item)[0], listed_in=self.list_file))

    def read_mask(self, item: str, size: tuple[int, int]) -> np.ndarray:
        """The mask of an item id, which must have the size (H, W) of its image."""
        path = self.files(item)[1]
        return read_mask(path, table=self.table, causes=self.causes, size=size, listed_in=self.list_file)

    def fingerprint(self) -> str:
        """Sha256 over name, reader version, split, source, ids, and names and sizes of the image and mask files."""
        facts = (self.name, self.version, self.split, *filter(None, [self.source]), *self.ids)
        paths = dict.fromkeys(path for item in self.ids for path in self.files(item))
        return file_digest(facts, self.folder, {**paths, **dict.fromkeys(self.shared_files)})

    @property
    def palette(self) -> np.ndarray:
        """VOC's colours, unless a set has its own."""
        return voc_colours(len(self.classes))


@dataclass(frozen=True)
class Files:
    """Files BEFORE + NAME + AFTER below a folder, by id."""

    folder: Path
    after: str
    before: str = ""

    def path(self, item: str) -> Path:
        start, slash, name = item.rpartition("/")
        return self.folder / f"{start}{slash}{self.before}{name}{self.after}"


class PairedFolders(SegmentationFolder):
    """Segmentation without split lists: a split is what lies in two folders, each image with a mask of its name.

    A subclass calls `pair`, which sets everything that reading needs.
    """

    def pair(self, folder: Path, split: str, images: Files, masks: Files) -> None:
        """Raises AbsentSplitError (no images), MissingError (images without masks, or masks without images)."""
        self.folder, self.split, self._images, self._masks = folder, split, images, masks
        image_ids = file_ids(images.folder, images.before, images.after)
        self.check_pairing(image_ids, file_ids(masks.folder, masks.before, masks.after))
        self.ids = tuple(sorted(image_ids))

    def check_pairing(self, image_ids: set[str], mask_ids: set[str]) -> None:
        """Raises AbsentSplitError (no images) and MissingError (ids that only one of the two has)."""
        cls, images, masks = type(self), self._images, self._masks
        if not image_ids:
            raise missing(cls, f"split {self.split!r} has no images in {images.folder}.", AbsentSplitError)
        for have, lack, one, other in ((image_ids, mask_ids, images, masks), (mask_ids, image_ids, masks, images)):
            if alone := sorted(have - lack):
                raise missing(
                    cls,
                    f"{len(alone)} of {len(have)} files in {one.folder} have no partner in {other.folder}, the first "
                    f"is {one.path(alone[0]).name}. An archive was unpacked in part: unpack both again, wholly.",
                )

    def files(self, item: str) -> tuple[Path, Path]:
        return self._images.path(item), self._masks.path(item)
