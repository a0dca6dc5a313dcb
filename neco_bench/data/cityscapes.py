"""Cityscapes (leftImg8bit and gtFine), the 19 classes that are scored, from labelIds or from labelTrainIds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from neco_bench.data.base import FEW, IGNORE, MaskSummary
from neco_bench.data.folder import Files, PairedFolders, Tree, locate
from neco_bench.data.io import id_table

# The file values 0..33 of labelIds that are scored, in the order of the train ids 0..18. Others are void.
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


class Cityscapes(PairedFolders):
    """Cityscapes, 19 classes, 2,975/500 images. Ids are "CITY/CITY_SEQUENCE_FRAME"; the test split has no masks."""

    name = "cityscapes"
    splits = ("train", "val")
    expected = {"train": 2975, "val": 500}
    citation = "Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016"
    layout = """\
  <data root>/cityscapes/
    leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png
    gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png   or, where there are none, NAME_gtFine_labelTrainIds.png"""
    classes = (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    )  # fmt: skip
    class_colours = (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
        (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    )  # fmt: skip
    image_size = (1024, 2048)
    larger = (0, 1)  # road, sidewalk
    sampling_unit = "frame"
    causes = {IGNORE: "that train ids (255 = void) are in a file of label ids (0..33)"}

    @classmethod
    def group_of(cls, item: str) -> str:
        """Return the city: its images are in the order of the drives through it, and val is three cities."""
        return item.partition("/")[0]

    @classmethod
    def tree(cls, folder: Path, split: str) -> Tree:
        """Return the paths of a split; the two archives may be unpacked into one folder or into separate ones."""
        images, masks = (locate(folder, f"{kind}/train", f"{kind}/val") / kind for kind in ("leftImg8bit", "gtFine"))
        source = "labelIds" if next((masks / split).glob("*/*_gtFine_labelIds.png"), None) else "labelTrainIds"
        files = (Files(images / split, "_leftImg8bit.png"), Files(masks / split, f"_gtFine_{source}.png"))
        return Tree(images.parent, *files, source)

    @property
    def _bases(self) -> Sequence[Path]:
        return self.folder, self._masks.folder.parents[1]

    def sanity_check(self, masks: MaskSummary) -> list[str]:
        """Return messages if masks have no void (official ones do), or train ids (0..18) instead of label ids."""
        counts, problems = masks.total, super().sanity_check(masks)
        if not counts[IGNORE]:
            problems.append(
                "No mask has void pixels, but all official ones do (the own car, the border): void was given the id of "
                "a class. Restore the original gtFine."
            )
        if len(masks) >= FEW and self.source == "labelIds" and not counts[6 : len(self.classes)].any():
            problems.append(
                "No label id of the masks is above 18: train ids (0..18) are in files of label ids (0..33). Name them "
                "*_gtFine_labelTrainIds.png, or restore the original gtFine."
            )
        return problems

    @property
    def table(self) -> np.ndarray:
        """Return the class id of each file value, see `id_table`."""
        if self.source == "labelTrainIds":
            return super().table
        return id_table({**dict.fromkeys(range(34), IGNORE), **{value: i for i, value in enumerate(LABEL_IDS)}})
