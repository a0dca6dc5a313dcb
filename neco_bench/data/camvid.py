"""CamVid in the layout of the SegNet tutorial: 480x360 frames, 11 classes, mask value 11 is void.

The lists contain pairs of absolute paths of their author's machine; only the base names are used.
"""

from __future__ import annotations

from pathlib import Path

from neco_bench.data.folder import SegmentationFolder, locate, read_list


class CamVid(SegmentationFolder):
    """CamVid, 367/101/233 frames. Ids are file stems."""

    name = "camvid"
    splits = ("train", "val", "test")
    expected = {"train": 367, "val": 101, "test": 233}
    citation = (
        "Brostow et al., Pattern Recognition Letters 2009; split and classes of SegNet (Badrinarayanan et al. 2017)"
    )
    layout = """\
  <data root>/camvid/
    train.txt  val.txt  test.txt      one line per frame: image path, mask path
    train/  val/  test/               NAME.png, images
    trainannot/  valannot/  testannot/  NAME.png, class ids 0..10, 11 = void"""
    classes = (
        "Sky", "Building", "Pole", "Road", "Pavement", "Tree",
        "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
    )  # fmt: skip
    class_colours = (  # of the SegNet tutorial
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    )  # fmt: skip
    void = 11
    image_size = (360, 480)
    sampling_unit = "frame"
    larger = (3, 4)  # road, pavement
    causes = {255: "that void was rewritten from 11 to 255"}

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = locate(folder, "trainannot", "valannot", "testannot")
        self.split = split
        self.list_file = self.folder / f"{split}.txt"
        self.ids = read_list(type(self), self.list_file, stems=True)

    @classmethod
    def group_of(cls, item: str) -> str:
        """Return the drive, such as "0016E5" of "0016E5_07959": val is one drive, test is two."""
        return item.partition("_")[0]

    def files(self, item: str) -> tuple[Path, Path]:
        """Return the image file and the mask file of an item."""
        return self.folder / self.split / f"{item}.png", self.folder / f"{self.split}annot" / f"{item}.png"
