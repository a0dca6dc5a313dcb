"""DAVIS 2017 (several objects a sequence) and DAVIS 2016 (one) in their official layout, at 480p.

Items are sequences. Masks of 2017 are palette images with the object ids, those of 2016 grey images with 0 and 255.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from neco_bench.core.errors import BadInputError
from neco_bench.data.folder import AbsentSplitError, Files, contents, locate, missing, read_lines
from neco_bench.data.io import id_table, voc_colours
from neco_bench.data.video import VideoDataset

# The validation sequences of DAVIS 2016, and those that 2017 adds. No other sequence belongs to the two splits.
_VAL_2016 = (
    "blackswan", "bmx-trees", "breakdance", "camel", "car-roundabout", "car-shadow", "cows", "dance-twirl", "dog",
    "drift-chicane", "drift-straight", "goat", "horsejump-high", "kite-surf", "libby", "motocross-jump",
    "paragliding-launch", "parkour", "scooter-black", "soapbox",
)  # fmt: skip
_ADDED_2017 = (
    "bike-packing", "dogs-jump", "gold-fish", "india", "judo", "lab-coat", "loading", "mbike-trick", "pigs", "shooting",
)  # fmt: skip


class _Davis(VideoDataset):
    """Base class of both. A split is its list in ImageSets, or, without a list, all its existing sequences.

    validation: names of the sequences of "val"; all others belong to "train".
    """

    validation: ClassVar[tuple[str, ...]]
    lists: ClassVar[str]  # folder of the split lists in ImageSets
    splits = ("train", "val")
    frame_height = 480

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = locate(folder, "JPEGImages", "Annotations"), split
        self._frames: dict[str, tuple[str, ...]] = {}
        self.ids = tuple(sorted(self._listed()))
        self._check_split()
        for sequence in self.ids:
            self._frames[sequence] = self._paired(sequence)

    @property
    def _images(self) -> Path:
        return self.folder / "JPEGImages" / "480p"

    @property
    def _masks(self) -> Path:
        return self.folder / "Annotations" / "480p"

    @classmethod
    def has_images(cls, folder: Path, split: str) -> bool:
        """Return whether the folder has images of a split, without reading them."""
        data = cls.__new__(cls)
        data.folder, data.split = locate(folder, "JPEGImages", "Annotations"), split
        return any(next((data._images / name).glob("[!.]*.jpg"), None) is not None for name in data._listed())

    def _listed(self) -> set[str]:
        """Return the sequences of the list of the split, whose lines name sequences or their frames."""
        path = self.folder / "ImageSets" / self.lists / f"{self.split}.txt"
        if path.is_file():
            return set(map(_sequence, read_lines(type(self), path)))
        if not self._images.is_dir():
            text = f"there are no frames at 480p: {self._images} is not a folder. {contents(self._images)}"
            raise missing(type(self), text)
        present = {place.name for place in self._images.iterdir() if place.is_dir() and not place.name.startswith(".")}
        own = present & set(self.validation) if self.split == "val" else present - set(self.validation)
        if not own:
            text = f"there is no split list {path}, and no sequence of {self.split!r} in {self._images}."
            raise missing(type(self), f"{text} {contents(self._images)}", AbsentSplitError)
        return own

    def _check_split(self) -> None:
        """Raise BadInputError if the list of one split names sequences of the other."""
        official = set(self.validation)
        wrong = sorted(set(self.ids) - official if self.split == "val" else set(self.ids) & official)
        if wrong:
            other = "train" if self.split == "val" else "val"
            raise BadInputError(
                f"The list of split {self.split!r} in {self.folder / 'ImageSets' / self.lists} names {wrong[0]!r}, "
                f"which does not belong to it ({len(wrong)} of {len(self.ids)} do not): the lists of {self.split!r} "
                f"and {other!r} were swapped or mixed, or are of another version. Restore the official lists."
            )

    def _paired(self, sequence: str) -> tuple[str, ...]:
        """Return the names of the frames of a sequence, and check that each has an image and a mask."""
        images, masks = Files(self._images / sequence, ".jpg").ids(), Files(self._masks / sequence, ".png").ids()
        if not images:
            raise missing(type(self), f"sequence {sequence!r} has no frames: {self._images / sequence}/NNNNN.jpg.")
        if alone := sorted(images ^ masks):
            place = self._masks if alone[0] in images else self._images
            raise missing(
                type(self),
                f"{len(alone)} of the {len(images)} frames of {sequence!r} have no partner in {place / sequence}; the "
                f"first is {alone[0]}: the archive was unpacked only in part, or has masks of the first frames only.",
            )
        if len(images) < 3:  # the first and the last are not scored
            raise BadInputError(f"Sequence {self._images / sequence} has {len(images)} frames; 3 are needed.")
        return tuple(sorted(images))

    def frames(self, sequence: str) -> tuple[str, ...]:
        """Return the names of the frames of a sequence, in order."""
        return self._frames[sequence]

    def files(self, sequence: str, frame: str) -> tuple[Path, Path]:
        """Return the paths of the image and the mask of a frame."""
        return self._images / sequence / f"{frame}.jpg", self._masks / sequence / f"{frame}.png"

    @property
    def colours(self) -> np.ndarray | None:
        """Return the palette of DAVIS: VOC's with 191 for 192."""
        colours = voc_colours(256)
        return np.where(colours == 192, np.uint8(191), colours)


def _sequence(line: str) -> str:
    """Return the sequence of a line: "bear", or "/JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/..."."""
    parts = line.split()[0].strip("/").split("/")
    return parts[-1] if len(parts) == 1 else parts[-2]


class DAVIS2017(_Davis):
    """DAVIS 2017, 60/30 sequences, 1 to 10 objects each (val: 1,999 frames, 61 objects)."""

    name = "davis2017"
    images_from = "davis"
    expected = {"train": 60, "val": 30}
    frame_counts = {"val": 1999}
    object_counts = {"val": 61}
    validation = (*_VAL_2016, *_ADDED_2017)
    lists = "2017"
    citation = "Pont-Tuset et al., The 2017 DAVIS Challenge on Video Object Segmentation, arXiv 1704.00675"
    layout = """\
  <data root>/davis2017/DAVIS/                or directly davis2017/
    ImageSets/2017/train.txt  val.txt         one sequence per line
    JPEGImages/480p/SEQUENCE/NNNNN.jpg        480 high
    Annotations/480p/SEQUENCE/NNNNN.png       palette images: 0 = background, 1, 2, ... = objects, 255 = void
  unpacked from the official file by: neco-bench data prepare davis2017 --source DAVIS-2017-trainval-480p.zip"""


class DAVIS2016(_Davis):
    """DAVIS 2016, 30/20 sequences, one object each."""

    name = "davis2016"
    images_from = "davis"
    expected = {"train": 30, "val": 20}
    object_counts = {"train": 30, "val": 20}
    validation = _VAL_2016
    lists = "480p"
    citation = "Perazzi et al., A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation, CVPR 2016"
    layout = """\
  <data root>/davis2016/DAVIS/                or directly davis2016/
    ImageSets/480p/train.txt  val.txt         one line per frame: image path, mask path; without the lists, all
                                              sequences of the split that are there
    JPEGImages/480p/SEQUENCE/NNNNN.jpg        480 high
    Annotations/480p/SEQUENCE/NNNNN.png       grey images: 0 = background, 255 = the object
  unpacked from the official file by: neco-bench data prepare davis2016 --source DAVIS-data.zip"""

    @property
    def object_ids(self) -> np.ndarray:
        """Return the object id of each file value."""
        return id_table({0: 0, 255: 1})
