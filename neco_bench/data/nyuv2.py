"""NYU Depth v2, the 1,449 labelled frames: 40 or 13 semantic classes, 0 = void in files.

Images and masks are PNGs extracted from nyu_depth_v2_labeled.mat by `neco-bench data prepare nyuv2`, or PNGs from other
sources with 40 or 13 classes, named by the 1-based frame number with four digits.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import ClassVar

import numpy as np

from neco_bench.data.base import FEW, IGNORE, MaskSummary
from neco_bench.data.folder import Files, PairedFolders, Tree, locate
from neco_bench.data.io import id_table

FRAMES, LABELS = 1449, 894


# The 40 classes of Gupta et al. (mapClass of their classMapping40.mat): the only label of each of 1..37, the labels of
# 38 and of 39; all others are 40.
_LABELS_OF_40 = (
    *([label] for label in (
        21, 11, 3, 157, 5, 83, 19, 28, 59, 88, 64, 7, 80, 36, 42, 89, 169, 119, 122, 143, 141, 4, 85, 17, 172, 15,
        135, 123, 26, 45, 331, 158, 124, 24, 144, 136, 55,
    )),
    [
        8, 25, 33, 38, 51, 53, 57, 58, 62, 65, 79, 94, 104, 112, 134, 153, 215, 216, 223, 225, 238, 241, 242, 256,
        295, 301, 339, 342, 354, 363, 372, 380, 392, 408, 412, 453, 456, 463, 477, 497, 541, 550, 553, 567, 573, 582,
        591, 609, 612, 615, 642, 645, 657, 658, 659, 663, 667, 668, 686, 700, 702, 777, 778, 782, 850, 861, 868, 874,
    ],
    [
        12, 43, 48, 50, 87, 106, 111, 161, 163, 174, 183, 204, 214, 219, 221, 224, 236, 262, 278, 291, 298, 313, 343,
        344, 356, 359, 373, 393, 401, 414, 418, 419, 430, 443, 444, 447, 448, 457, 458, 460, 462, 475, 479, 485, 486,
        493, 494, 498, 499, 509, 510, 515, 521, 524, 540, 549, 551, 554, 556, 558, 576, 580, 608, 625, 703, 734, 770,
        772, 797, 800, 803, 804, 813, 814, 815, 820, 829, 835, 858, 863, 882, 892,
    ],
)  # fmt: skip


# The 13 classes of Couprie et al. (labels13 of class13Mapping.mat), by the 40 classes.
_13_OF_40 = (
    12, 5, 6, 1, 4, 9, 10, 12, 13, 6, 8, 6, 13, 10, 6, 13, 6, 7, 7, 5,
    7, 3, 2, 6, 11, 7, 7, 7, 7, 7, 7, 6, 7, 7, 7, 7, 7, 7, 6, 7,
)  # fmt: skip


# Frames of the official test split (testNdxs of splits.mat); the others are for training.
_TEST = """
    1-2 9 14-18 21 28-43 46-47 56-57 59-63 76-79 84-91 117-119 125-129 131-134 137 153-155 167-169 171-176 180-202
    207-212 220-222 250 264 271-273 279-285 296-302 310-312 315-317 325-335 351-352 355-364 384-390 395-397 411-414
    430-435 441-448 462-466 469-477 508-513 515-526 531-533 537-539 549-551 555-571 579-583 591-594 603-607 612-613
    617-621 633-638 644-645 650-651 656-658 663-664 668-673 676-681 686-690 693-694 697-699 706-713 717-718 724-728
    731-734 743-744 759-787 800-804 810-814 821-823 833-846 850-852 857-862 869-871 906-908 917-919 926-928 932-935
    945-947 959-962 965-967 970-977 991-995 1001-1004 1010-1012 1021-1023 1032-1034 1038-1039 1048-1049 1052-1053
    1057-1058 1075-1084 1088-1096 1098-1104 1106-1109 1117-1119 1123-1131 1135-1136 1144-1158 1162-1167 1170-1171
    1174-1176 1179-1184 1192-1196 1201-1212 1216-1220 1226-1230 1233-1235 1247-1250 1254-1265 1275-1280 1285-1295
    1297-1299 1302-1308 1314-1315 1329-1332 1335-1340 1347-1349 1353-1356 1364-1365 1368-1369 1384-1391 1394-1401
    1407-1414 1421-1424 1430-1433 1441-1449
"""


def frames(split: str) -> list[int]:
    """Return the 1-based numbers of the frames of a split, in order."""
    test = {n for part in _TEST.split() for n in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)}
    return sorted(test) if split == "test" else sorted(set(range(1, FRAMES + 1)) - test)


@functools.cache
def scene_runs() -> dict[int, int]:
    """Return, for each frame, the first frame of its run: consecutive frames of one split (one scene or several).

    Frames of a scene are consecutive in the file, and no scene is in both splits. The file names scenes, but masks do
    not.
    """
    runs: dict[int, int] = {}
    for split in ("train", "test"):
        own = set(frames(split))
        for frame in sorted(own):
            runs[frame] = runs[frame - 1] if frame - 1 in own else frame
    return runs


def labels_to_classes(classes: int) -> dict[int, int]:
    """Return the class id 0..39, or 0..12, of each label 1..894."""
    of_40 = dict.fromkeys(range(1, LABELS + 1), 39)
    of_40 |= {label: id_ for id_, labels in enumerate(_LABELS_OF_40) for label in labels}
    return of_40 if classes == 40 else {label: _13_OF_40[id_] - 1 for label, id_ in of_40.items()}


class NYUv2(PairedFolders):
    """NYUv2, 40 classes, 795/654 images, from masks of 40 classes or from the 894 labels."""

    name = "nyuv2"
    folder_name = "nyuv2"
    splits = ("train", "test")
    expected = {"train": 795, "test": 654}
    first_value, void = 1, 0
    image_size = (480, 640)
    sampling_unit = "scene"
    citation = "Silberman et al., ECCV 2012; 40 classes: Gupta et al., CVPR 2013; 13 classes: Couprie et al., ICLR 2013"
    layout = """\
  <data root>/nyuv2/
    {train,test}_rgb/NNNN.png                          640x480, NNNN = 1-based frame number
    {train,test}_labels_894/NNNN.png                   16-bit labels; 0 = void, 1..894
  made from the official file by: neco-bench data prepare nyuv2 --source nyu_depth_v2_labeled.mat
  or masks of classes, which are preferred:
    {train,test}_labels_40/new_nyu_class40_NNNN.png    0 = void, 1..40; for nyuv2
    {train,test}_labels_13/new_nyu_class13_NNNN.png    0 = void, 1..13; for nyuv2_13"""
    classes: ClassVar[tuple[str, ...]] = (
        "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture",
        "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes",
        "ceiling", "books", "refridgerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard",
        "person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure", "otherfurniture",
        "otherprop",
    )  # fmt: skip

    @classmethod
    def group_of(cls, item: str) -> str | None:
        """Return the run (`scene_runs`) of a frame, such as "0014"."""
        number = re.search(r"\d+$", item)
        return str(scene_runs()[int(number[0])]) if number and int(number[0]) in scene_runs() else None

    @classmethod
    def tree(cls, folder: Path, split: str) -> Tree:
        """Return where the files of a split should be."""
        folder = locate(folder, "train_rgb", "test_rgb")
        count = len(cls.classes)
        images = Files(folder / f"{split}_rgb", ".png")
        masks = Files(folder / f"{split}_labels_{count}", ".png", f"new_nyu_class{count}_")
        raw = folder / f"{split}_labels_894"
        if raw.is_dir() and not masks.folder.is_dir():
            return Tree(folder, images, Files(raw, ".png"), "labels_894")
        return Tree(folder, images, masks)

    @property
    def table(self) -> np.ndarray:
        """Return the class id of each file value, see `id_table`."""
        if not self.source:
            return super().table
        return id_table({0: IGNORE, **labels_to_classes(len(self.classes))})

    def sanity_check(self, masks: MaskSummary) -> list[str]:
        """Return messages if the masks have no void border; official ones do."""
        problems = super().sanity_check(masks)
        if len(masks) >= FEW and np.mean(np.array(masks.corners) == IGNORE) < 0.5:
            problems.append(
                "The borders of the masks have a class, but those of official ones are void (0): ids are shifted, or "
                "void was given the id of a class. Restore the original masks."
            )
        return problems


class NYUv213(NYUv2):
    """NYUv2 with 13 classes, in the order of class13Mapping.mat."""

    name = "nyuv2_13"
    classes = (
        "bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table", "tv", "wall",
        "window",
    )  # fmt: skip
