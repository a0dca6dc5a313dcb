"""What data sets in a folder share: split lists, errors that show the expected tree, digests, pair
annotations, segmentation read file by file."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from neco_bench.data.base import IGNORE, Dataset, Pair, Sample, SegmentationDataset
from neco_bench.data.io import read_image, read_mask
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


def read_list(dataset: type[Dataset], path: Path) -> tuple[str, ...]:
    """The first word of each line of a split list. Raises AbsentSplitError, and BadInputError (empty, repeated)."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise missing(dataset, f"the split list {path} is not there.", AbsentSplitError) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"Split list {path} is not a readable text file: {error}. Restore it.") from error
    words = tuple(line.split()[0] for line in lines if line.strip())
    if not words:
        raise BadInputError(f"Split list {path} is empty. Restore it from the original archive.")
    if len(set(words)) < len(words):
        twice = next(word for i, word in enumerate(words) if word in words[:i])
        raise BadInputError(f"Split list {path} names {twice!r} more than once. Restore it from the original archive.")
    return words


def file_digest(facts: Iterable[str], base: Path, files: Iterable[Path]) -> str:
    """Sha256 over `facts` and over names (relative to `base`) and sizes of files. Raises MissingError naming a file."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{fact}\n".encode())
    for path in files:
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise MissingError(
                f"No file {path}, though the split lists it. Restore it from the original archive."
            ) from None
        digest.update(f"{path.relative_to(base).as_posix()} {size}\n".encode())
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


class SegmentationFolder(SegmentationDataset):
    """Segmentation read from files. A subclass sets `folder`, `split`, `list_file`, `ids`, and says where files lie.

    void: the mask value in files that means void.
    """

    void: ClassVar[int] = IGNORE
    folder: Path
    list_file: Path

    @abc.abstractmethod
    def files(self, item: str) -> tuple[Path, Path]:
        """Paths of the image and the mask of an item id."""

    def __getitem__(self, index: int) -> Sample:
        item = self.ids[index]
        image_file, mask_file = self.files(item)
        image = read_image(image_file, listed_in=self.list_file)
        mask = read_mask(
            mask_file, classes=len(self.classes), void=self.void, size=image.shape[:2], listed_in=self.list_file
        )
        return Sample(image, mask, item)

    def fingerprint(self) -> str:
        """Sha256 over name, reader version, split, ids, and names and sizes of the image and mask files."""
        facts = (self.name, self.version, self.split, *self.ids)
        return file_digest(facts, self.folder, (path for item in self.ids for path in self.files(item)))
