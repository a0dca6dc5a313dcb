"""PASCAL VOC 2012 segmentation in the official VOCdevkit layout; masks are palette PNGs read as indices.

`trainaug` is the usual list of 10,582 images (VOC train plus SBD, VOC val removed); its masks lie in
SegmentationClassAug, a folder that is not part of the official archive. `train` and `val` use SegmentationClass.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from neco_bench.data.folder import SegmentationFolder, missing, read_list


class VOC2012(SegmentationFolder):
    """PASCAL VOC 2012, 20 classes and background, 255 = object border. Ids are file stems such as 2007_000032."""

    name = "voc2012"
    splits = ("train", "trainaug", "val")
    expected = {"train": 1464, "trainaug": 10582, "val": 1449}  # noqa: RUF012 (a ClassVar of the base class)
    citation = "Everingham et al., IJCV 2015; trainaug: Hariharan et al., ICCV 2011 (SBD)"
    layout = """\
  <data root>/voc2012/VOCdevkit/VOC2012/      or voc2012/VOC2012/, or directly voc2012/
    ImageSets/Segmentation/train.txt  val.txt  trainaug.txt   one image name per line
    JPEGImages/NAME.jpg
    SegmentationClass/NAME.png                train, val: palette indices 0..20, 255 = border
    SegmentationClassAug/NAME.png             trainaug: the same ids for VOC and SBD images"""
    classes = (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    )  # fmt: skip

    def __init__(self, folder: Path, split: str) -> None:
        candidates = (folder / "VOCdevkit" / "VOC2012", folder / "VOC2012", folder)
        self.folder = next((path for path in candidates if (path / "ImageSets").is_dir()), candidates[0])
        self.split = split
        self.list_file = self.folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        self.ids = tuple(Path(word).stem for word in read_list(type(self), self.list_file))
        self._masks = self.folder / ("SegmentationClassAug" if split == "trainaug" else "SegmentationClass")
        if not self._masks.is_dir():
            raise missing(type(self), f"the mask folder {self._masks} of split {split!r} is not there.")

    def files(self, item: str) -> tuple[Path, Path]:
        return self.folder / "JPEGImages" / f"{item}.jpg", self._masks / f"{item}.png"

    @property
    def palette(self) -> np.ndarray:
        """The official palette: the three bits of an id's octal digit b set bit 7-b of red, green and blue."""
        ids = np.arange(len(self.classes))[:, None]
        bits = [((ids >> (3 * b + np.arange(3))) & 1) << (7 - b) for b in range(3)]
        return np.sum(bits, axis=0).astype(np.uint8)
