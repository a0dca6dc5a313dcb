"""PF-WILLOW and PF-PASCAL: pairs of images with keypoints from MATLAB files.

MATLAB counts pixels from 1; points and boxes are given here with the centre of the first pixel at 0.
"""

from __future__ import annotations

import csv
import io
import itertools
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from neco_bench.core.errors import BadInputError
from neco_bench.data.base import Pair
from neco_bench.data.folder import AbsentSplitError, PairFolder, checked_box, contents, locate, missing
from neco_bench.data.io import decoding, read_mat, read_text, valid_name
from neco_bench.data.voc2012 import VOC2012

Box = tuple[float, float, float, float]


class PFWillow(PairFolder):
    """PF-WILLOW: all 900 ordered pairs within 10 sub-classes of 10 images, 10 points each, all visible.

    Boxes are the tight boxes of the points, as in all evaluations of this set.
    """

    name = "pf_willow"
    splits = ("test",)
    expected = {"test": 900}
    citation = "Ham et al., Proposal Flow, CVPR 2016"
    layout = """\
  <data root>/pf_willow/PF-dataset-WILLOW/    or directly pf_willow/
    SUBCLASS/NAME.png  SUBCLASS/NAME.mat      pts_coord: 2 x 10, x above y, 1-based; SUBCLASS as in car(G)"""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = locate(folder, "*(*)/*.mat", "*(*)/*.png", name="WILLOW"), split
        pairs = []
        for place in sorted(path for path in self.folder.iterdir() if path.is_dir()):
            points = {file.stem: self._read(file) for file in sorted(place.glob("[!.]*.mat"))}
            alone = points.keys() ^ {file.stem for file in place.glob("[!.]*.png")}
            if alone:
                raise missing(
                    type(self),
                    f"{place / min(alone)} has a .png or a .mat file, but not both: the archive was unpacked in part.",
                )
            for a, b in itertools.permutations(points, 2):
                pairs.append(
                    Pair(
                        id=f"{a}-{b}:{place.name}",
                        source_id=f"{place.name}/{a}",
                        target_id=f"{place.name}/{b}",
                        source_points=points[a],
                        target_points=points[b],
                        point_ids=tuple(map(str, range(10))),
                        source_box=_tight(points[a]),
                        target_box=_tight(points[b]),
                        category=place.name,
                    )
                )
        if not pairs:
            text = f"{self.folder} holds no sub-class folders with .mat files. {contents(self.folder)}"
            raise missing(type(self), text, AbsentSplitError)
        self.pairs = tuple(pairs)
        self.ids = tuple(pair.id for pair in pairs)

    @classmethod
    def has_images(cls, folder: Path, split: str) -> bool:
        """Return whether the folder has images of a split, without reading them."""
        return next(locate(folder, "*(*)/*.mat", name="WILLOW").glob("*(*)/*.png"), None) is not None

    def _read(self, path: Path) -> np.ndarray:
        def parse(variables: dict[str, Any]) -> np.ndarray:
            points = variables["pts_coord"]
            if points.shape != (2, 10) or points.dtype.kind not in "fiu" or not np.isfinite(points).all():
                raise ValueError("it lacks pts_coord, 2 x 10 finite numbers")
            checked_box(_tight(points.T))
            return points.T.astype(np.float64) - 1

        return read_mat(path, parse, "annotation of PF-WILLOW")

    def image_file(self, image_id: str) -> Path:
        """Return the path of an image."""
        return self.folder / f"{image_id}.png"


def _stem(file: str) -> str:
    return PureWindowsPath(valid_name(file)).stem


def _in_voc(number: str) -> int:
    """Check and return a class 1..20 of VOC."""
    if not 1 <= int(number) <= 20:
        raise ValueError(f"class {number}")
    return int(number)


def _tight(points: np.ndarray) -> Box:
    (x1, y1), (x2, y2) = points.min(0).tolist(), points.max(0).tolist()
    return x1, y1, x2, y2


class PFPascal(PairFolder):
    """PF-PASCAL: the 299 test and 308 val pairs of the lists of Rocco et al. (ncnet), 20 VOC classes.

    Points are those visible in both images, from the .mat file of each image; boxes are the object boxes there. The
    train list (with mirrored copies) is for methods that are trained, and is not read.
    """

    name = "pf_pascal"
    images_from = "voc"
    splits = ("val", "test")
    expected = {"val": 308, "test": 299}
    citation = (
        "Ham et al., Proposal Flow, TPAMI 2018; lists: Rocco et al., Neighbourhood Consensus Networks, NeurIPS 2018"
    )
    layout = """\
  <data root>/pf_pascal/PF-dataset-PASCAL/    or directly pf_pascal/
    test_pairs.csv  val_pairs.csv             or {test,val}_pairs_pf_pascal.csv: source_image,target_image,class,...
    JPEGImages/NAME.jpg
    Annotations/CLASS/NAME.mat                kps: N x 2, 1-based, NaN = not visible; bbox: x1 y1 x2 y2"""

    def __init__(self, folder: Path, split: str) -> None:
        self.split = split
        rows = self._read_list(folder)
        self.pairs = tuple(self._pair(f"{i:03d}-{a}-{b}:{name}", a, b, name) for i, (a, b, name) in enumerate(rows))
        self.ids = tuple(pair.id for pair in self.pairs)

    @classmethod
    def has_images(cls, folder: Path, split: str) -> bool:
        """Return whether the folder has the first image of a split, without reading it."""
        data = cls.__new__(cls)
        data.split = split
        return data.image_file(data._read_list(folder)[0][0]).is_file()

    def _read_list(self, folder: Path) -> list[tuple[str, str, str]]:
        """Return source, target and class of each pair; lists may be next to the archive's folder, or as in ncnet."""
        self.folder = locate(folder, "Annotations/*/*.mat", name="PASCAL")
        names = (f"{self.split}_pairs.csv", f"{self.split}_pairs_pf_pascal.csv")
        places = (self.folder, folder, folder / "image_pairs")
        path = next((path for place in places for name in names if (path := place / name).is_file()), None)
        if path is None:
            text = f"the pair list {self.folder / names[0]} does not exist. {contents(self.folder)}"
            raise missing(type(self), text, AbsentSplitError)
        with decoding(
            f"Pair list {path} needs the columns source_image, target_image and class 1..20",
            "Restore the official list.",
        ):
            rows = [
                (_stem(row["source_image"]), _stem(row["target_image"]), VOC2012.classes[_in_voc(row["class"])])
                for row in csv.DictReader(io.StringIO(read_text(path, "Pair list")), skipinitialspace=True)
            ]
        if not rows:
            raise BadInputError(f"Pair list {path} is empty. Restore the official list.")
        return rows

    def _pair(self, name: str, source: str, target: str, category: str) -> Pair:
        first, first_box = self._read(category, source)
        second, second_box = self._read(category, target)
        if len(first) != len(second):
            raise BadInputError(f"The annotations of {source} and {target} have {len(first)} and {len(second)} points.")
        common = np.flatnonzero(np.isfinite(first).all(1) & np.isfinite(second).all(1))
        return Pair(
            id=name,
            source_id=source,
            target_id=target,
            source_points=first[common],
            target_points=second[common],
            point_ids=tuple(map(str, common)),
            source_box=first_box,
            target_box=second_box,
            category=category,
        )

    def _read(self, category: str, name: str) -> tuple[np.ndarray, Box]:
        path = self.folder / "Annotations" / category / f"{name}.mat"

        def parse(variables: dict[str, Any]) -> tuple[np.ndarray, Box]:
            points, box = variables["kps"].astype(np.float64), variables["bbox"].astype(np.float64).ravel()
            if points.ndim != 2 or points.shape[1] != 2 or np.isinf(points).any():
                raise ValueError("kps are not N x 2 numbers, NaN where not visible")
            return points - 1, checked_box((box - 1).tolist())

        return read_mat(path, parse, "annotation of PF-PASCAL")

    def image_file(self, image_id: str) -> Path:
        """Return the path of an image."""
        return self.folder / "JPEGImages" / f"{image_id}.jpg"
