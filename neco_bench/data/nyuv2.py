"""NYU Depth v2, the 1,449 labelled frames: 40 or 13 semantic classes, 0 = void in files.

Images and masks are PNGs taken out of nyu_depth_v2_labeled.mat, named by the 1-based frame number in four digits.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from neco_bench.data.base import IGNORE
from neco_bench.data.folder import Files, PairedFolders
from neco_bench.data.io import id_table, read_mat
from neco_bench.errors import BadInputError


class NYUv2(PairedFolders):
    """NYUv2, 40 classes, 795/654 images, from 40-class masks or from the 894 labels with their official mapping."""

    name = "nyuv2"
    folder_name = "nyuv2"
    splits = ("train", "test")
    expected = {"train": 795, "test": 654}  # noqa: RUF012 (a ClassVar of the base class)
    citation = "Silberman et al., ECCV 2012; 40 classes: Gupta et al., CVPR 2013; 13 classes: Couprie et al., ICLR 2013"
    layout = """\
  <data root>/nyuv2/
    {train,test}_rgb/NNNN.png                                  640x480, NNNN = 1-based frame number
    {train,test}_labels_40/new_nyu_class40_NNNN.png            0 = void, 1..40; or
    {train,test}_labels_894/NNNN.png and classMapping40.mat    16-bit labels of nyu_depth_v2_labeled.mat
    {train,test}_labels_13/new_nyu_class13_NNNN.png            0 = void, 1..13; for nyuv2_13"""
    classes: ClassVar[tuple[str, ...]] = (
        "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture",
        "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes",
        "ceiling", "books", "refridgerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard",
        "person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure", "otherfurniture",
        "otherprop",
    )  # fmt: skip

    def __init__(self, folder: Path, split: str) -> None:
        count = len(self.classes)
        self._mapping: dict[int, int] = {i + 1: i for i in range(count)}
        masks = Files(folder / f"{split}_labels_{count}", ".png", f"new_nyu_class{count}_")
        raw = folder / f"{split}_labels_894"
        if count == 40 and raw.is_dir() and not masks.folder.is_dir():
            self.source = "labels_894"
            self.shared_files = (folder / "classMapping40.mat",)
            masks = Files(raw, ".png")
            mapping = read_mat(self.shared_files[0]).get("mapClass", np.zeros(0)).ravel()
            if len(mapping) != 894 or mapping.min() < 1 or mapping.max() > 40:
                raise BadInputError(f"{self.shared_files[0]} lacks mapClass, 894 ids 1..40. Restore the official file.")
            self._mapping = {i + 1: int(id_) - 1 for i, id_ in enumerate(mapping)}
        self.pair(folder, split, Files(folder / f"{split}_rgb", ".png"), masks)

    @property
    def table(self) -> np.ndarray:
        return id_table({0: IGNORE, **self._mapping})


class NYUv213(NYUv2):
    """NYUv2 with 13 classes, in the order of class13Mapping.mat."""

    name = "nyuv2_13"
    classes = (
        "bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table", "tv", "wall",
        "window",
    )  # fmt: skip
