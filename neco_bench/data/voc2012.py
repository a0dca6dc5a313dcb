"""PASCAL VOC 2012 segmentation in the official VOCdevkit layout; masks are palette PNGs read as indices.

`trainaug` is the usual list of 10,582 images (VOC train plus SBD, VOC val removed); its masks are in
SegmentationClassAug, a folder that is not part of the official archive. `train` and `val` use SegmentationClass.
"""

from __future__ import annotations

from pathlib import Path

from neco_bench.core.errors import MissingError
from neco_bench.data.base import FEW, IGNORE, MaskSummary
from neco_bench.data.folder import AbsentSplitError, SegmentationFolder, locate, missing, read_list


class VOC2012(SegmentationFolder):
    """PASCAL VOC 2012, 20 classes and background, 255 = object border. Ids are file stems such as 2007_000032."""

    name = "voc2012"
    images_from = "voc"
    splits = ("train", "trainaug", "val")
    expected = {"train": 1464, "trainaug": 10582, "val": 1449}
    citation = "Everingham et al., IJCV 2015; trainaug: Hariharan et al., ICCV 2011 (SBD)"
    layout = """\
  <data root>/voc2012/VOCdevkit/VOC2012/      or voc2012/VOC2012/, or directly voc2012/
    ImageSets/Segmentation/train.txt  val.txt  trainaug.txt   one image name per line
    JPEGImages/NAME.jpg
    SegmentationClass/NAME.png                train, val: palette indices 0..20, 255 = border
    SegmentationClassAug/NAME.png             trainaug: the same ids for VOC and SBD images
  or the layout of the NeCo code, where train reads SegmentationClassAug too:
  <data root>/voc2012/VOCSegmentation/
    sets/{train,trainaug,val}.txt  images/NAME.jpg  SegmentationClass/NAME.png  SegmentationClassAug/NAME.png"""
    classes = (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    )  # fmt: skip

    longest_side = 500
    sizes_differ = True
    fractions = {"trainaug": {128: 80, 64: 160, 8: 1320}}

    def __init__(self, folder: Path, split: str) -> None:
        neco = folder / "VOCSegmentation"
        if (neco / "sets").is_dir():
            self.folder, self._images, lists = neco, neco / "images", neco / "sets"
        else:
            places = ("ImageSets/Segmentation/train*.txt", "ImageSets/Segmentation/val.txt")
            self.folder = locate(folder, *places, name="2012")  # the archive of the test images has test.txt alone
            self._images, lists = self.folder / "JPEGImages", self.folder / "ImageSets" / "Segmentation"
        self.split = split
        self.list_file = lists / f"{split}.txt"
        augmented = split == "trainaug" or (split == "train" and self.folder == neco)
        self._masks = self.folder / ("SegmentationClassAug" if augmented else "SegmentationClass")
        if split == "trainaug" and not (self.list_file.is_file() and self._masks.is_dir()):
            absent = self._masks if self.list_file.is_file() else self.list_file
            raise missing(
                type(self),
                f"{absent} does not exist. SegmentationClassAug and trainaug.txt are not part of the official archive: "
                f"create both from SBD with `neco-bench data prepare voc_sbd --source SBD --data-root DIR`.",
                MissingError if self.list_file.is_file() or self._masks.is_dir() else AbsentSplitError,
            )
        self.ids = read_list(type(self), self.list_file, stems=True)
        if not self._masks.is_dir():
            raise missing(type(self), f"the mask folder {self._masks} of split {split!r} does not exist.")

    def files(self, item: str) -> tuple[Path, Path]:
        """Return the image file and the mask file of an item."""
        return self._images / f"{item}.jpg", self._masks / f"{item}.png"

    def sanity_check(self, masks: MaskSummary) -> list[str]:
        """Return messages if masks have no void border or no background; official masks have both."""
        counts, problems = masks.total, super().sanity_check(masks)
        if not self.split.startswith("trainaug") and not counts[IGNORE]:
            problems.append(
                "No mask has a void border (255), but all official ones do: 255 was changed to background (0). "
                "Use the original SegmentationClass."
            )
        if len(masks) >= FEW and not counts[0]:
            problems.append(
                "No mask has background (0): ids are shifted, or background was made void. Restore the original masks."
            )
        return problems
