"""Pascal Context on VOC 2010 images, 59 classes, or 60 with background, from 8-bit PNGs: 0 = background, 1..59.

The official annotation consists of MATLAB files with 459 labels. The PNGs are written by its `detail` API, or by the
converter of mmsegmentation that calls it, into SegmentationClassContext, with the split lists. `pascal_context` has the
59 classes with background as void; `pascal_context60` also scores background.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from neco_bench.data.base import IGNORE
from neco_bench.data.folder import SegmentationFolder, locate, read_list


class PascalContext(SegmentationFolder):
    """Pascal Context, 59 classes, 4,998/5,105 images. Ids are file stems such as 2008_000002."""

    name = "pascal_context"
    images_from = "voc"
    folder_name = "pascal_context"
    splits = ("train", "val")
    expected = {"train": 4998, "val": 5105}
    citation = (
        "Mottaghi et al., The Role of Context for Object Detection and Semantic Segmentation in the Wild, CVPR 2014"
    )
    layout = """\
  <data root>/pascal_context/VOCdevkit/VOC2010/   or pascal_context/VOC2010/, or directly pascal_context/
    ImageSets/SegmentationContext/train.txt  val.txt
    JPEGImages/NAME.jpg
    SegmentationClassContext/NAME.png             8-bit ids, 0 = background, 1..59"""
    classes: ClassVar[tuple[str, ...]] = (
        "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "table", "dog", "horse",
        "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor", "bag", "bed", "bench", "book",
        "building", "cabinet", "ceiling", "cloth", "computer", "cup", "door", "fence", "floor", "flower", "food",
        "grass", "ground", "keyboard", "light", "mountain", "mouse", "curtain", "platform", "sign", "plate", "road",
        "rock", "shelves", "sidewalk", "sky", "snow", "bedclothes", "track", "tree", "truck", "wall", "water",
        "window", "wood",
    )  # fmt: skip
    longest_side = 500
    rare_class = 58  # "wood"
    sizes_differ = True
    first_value = 1
    void: ClassVar[int | None] = 0
    causes = {IGNORE: "that ids were already shifted to 0..58 with 255 for background, while 0 = background is needed"}

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = locate(folder, "ImageSets/SegmentationContext", name="2010")
        self.split = split
        self.list_file = self.folder / "ImageSets" / "SegmentationContext" / f"{split}.txt"
        self.ids = read_list(type(self), self.list_file, stems=True)

    def files(self, item: str) -> tuple[Path, Path]:
        """Return the image file and the mask file of an item."""
        return self.folder / "JPEGImages" / f"{item}.jpg", self.folder / "SegmentationClassContext" / f"{item}.png"


class PascalContext60(PascalContext):
    """Pascal Context with background as class 0 of 60."""

    name = "pascal_context60"
    classes = ("background", *PascalContext.classes)
    first_value, void = 0, None
    rare_class = 59
