"""Depth in metres: NYU Depth v2 (the labelled frames, or the lists of 24,231 training frames) and KITTI (Eigen split).

Sources of the facts: NYU: Silberman et al., ECCV 2012; lists and PNGs as in cleinc/bts. KITTI: Eigen et al., NeurIPS
2014, improved ground truth of Uhrig et al., 3DV 2017; lists as in zhyever/Monocular-Depth-Estimation-Toolbox.
"""

from __future__ import annotations

import abc
import re
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from neco_bench.core.errors import BadInputError
from neco_bench.data.dense import DenseDataset, read_depth
from neco_bench.data.folder import AbsentSplitError, Files, contents, first_entry, locate, missing, read_lines
from neco_bench.data.nyuv2 import frames, scene_runs

MM = 1000.0  # file values of NYU per metre

NYU_SIZE = (480, 640)


class LabelledFrames(DenseDataset):
    """The 795/654 labelled frames of NYUv2 in the folders that `data prepare nyuv2` writes."""

    folder_name = "nyuv2"
    sampling_unit = "scene"
    splits = ("train", "test")
    expected: ClassVar[dict[str, int]] = {"train": 795, "test": 654}
    image_sizes = (NYU_SIZE,)
    parts: ClassVar[tuple[str, ...]]  # endings of folder names: images, then the files of targets

    def __init__(self, folder: Path, split: str) -> None:
        """Raises AbsentSplitError (no images), MissingError (files without partners), BadInputError (swapped)."""
        cls = type(self)
        self.folder, self.split = locate(folder, f"{split}_rgb", "train_rgb", "test_rgb"), split
        found = [Files(self.folder / f"{split}_{part}", ".png").ids() for part in cls.parts]
        if not found[0]:
            text = f"split {split!r} has no images in {self.folder / f'{split}_rgb'}. {contents(self.folder)}"
            raise missing(cls, text, AbsentSplitError)
        official = {f"{number:04d}" for number in frames(split)}
        if strange := sorted(found[0] - official):
            other = "test" if split == "train" else "train"
            raise BadInputError(
                f"{self.folder / f'{split}_rgb'} contains {len(strange)} frames that are not in the official {split} "
                f"split; the first is {strange[0]}.png: those of {split} and {other} were swapped, or were renumbered. "
                f"Restore them with `neco-bench data prepare nyuv2`."
            )
        for part, ids in zip(cls.parts[1:], found[1:], strict=True):
            if lacking := sorted(found[0] - ids):
                raise missing(
                    cls,
                    f"{len(lacking)} of {len(found[0])} images have no file in {self.folder / f'{split}_{part}'}, the "
                    f"first is {lacking[0]}.png.",
                )
        self.ids = tuple(sorted(found[0]))

    @classmethod
    def has_images(cls, folder: Path, split: str) -> bool:
        """Return whether images and targets of a split exist, without reading them."""
        place = locate(folder, f"{split}_rgb", "train_rgb", "test_rgb")
        return all(next((place / f"{split}_{part}").glob("*.png"), None) for part in cls.parts)

    def files(self, item: str) -> tuple[Path, ...]:
        """Return the paths of the image and of the files of its target."""
        return tuple(self.folder / f"{self.split}_{part}" / f"{item}.png" for part in self.parts)

    @classmethod
    def group_of(cls, item: str) -> str:
        """Return the run of frames of a scene (`scene_runs`)."""
        return str(scene_runs()[int(item)])


class NYUDepthLabelled(LabelledFrames):
    """Depth of the labelled frames: 795 for training, 654 for tests."""

    name = "nyu_depth_labelled"
    kind = "depth"
    parts = ("rgb", "depth")
    likely_median = (0.8, 6.0)
    file_unit = "millimetres"
    citation = "Silberman et al., Indoor Segmentation and Support Inference from RGBD Images, ECCV 2012"
    layout = """\
  <data root>/nyuv2/
    {train,test}_rgb/NNNN.png      640x480, NNNN = 1-based frame number of nyu_depth_v2_labeled.mat
    {train,test}_depth/NNNN.png    16-bit millimetres; 0 = none
  made from the official file by: neco-bench data prepare nyuv2 --source nyu_depth_v2_labeled.mat"""

    def read_target(self, item: str, size: tuple[int, int]) -> np.ndarray:
        """Read the target of an item whose image has the size (H, W)."""
        return read_depth(self.files(item)[1], MM, size)


class ListedDepth(DenseDataset):
    """Depth for a list of images with lines "image depth focal"; images whose depth is "None" are left out.

    list_names: the list of each split. image_roots, depth_roots: folders of the data set in which listed files may be.
    per_metre: file values per metre.
    """

    kind = "depth"
    list_names: ClassVar[dict[str, str]]
    image_roots: ClassVar[tuple[str, ...]]
    depth_roots: ClassVar[tuple[str, ...]]
    per_metre: ClassVar[float]

    def __init__(self, folder: Path, split: str) -> None:
        """Raises AbsentSplitError (no list), BadInputError (bad list, swapped splits), MissingError (no files)."""
        cls = type(self)
        self.folder, self.split = locate(folder, *cls.list_names.values()), split
        self.list_file = self.folder / cls.list_names[split]
        pairs = {}
        for line in read_lines(cls, self.list_file):
            image = first_entry(line)
            rest = line[len(image) :].split()
            if not rest:
                raise BadInputError(f"{self.list_file} must list an image, its depth and the focal length: {line!r}.")
            if rest[0] != "None":
                paths = PurePosixPath(image.lstrip("/")), PurePosixPath(rest[0].lstrip("/"))
                pairs[str(paths[0].with_suffix(""))] = paths
        if not pairs:
            raise BadInputError(f"Split list {self.list_file} names no image with depth. Restore the official list.")
        self.ids = tuple(sorted(pairs))
        self._pairs = pairs
        if wrong := next((item for item in self.ids if self.is_test(item) != (split == "test")), None):
            raise BadInputError(
                f"{self.list_file} names {wrong!r}, which is not in the official {split} split: the lists of train and "
                f"test were swapped, or are of another split. Restore the official list."
            )

    @classmethod
    @abc.abstractmethod
    def is_test(cls, item: str) -> bool:
        """Return whether an image belongs to the official test split, according to its name."""

    def files(self, item: str) -> tuple[Path, ...]:
        """Return the paths of the image and of the files of its target."""
        image, depth = self._pairs[item]
        return self._place(self.image_roots, image), self._place(self.depth_roots, depth)

    def _place(self, roots: tuple[str, ...], path: PurePosixPath) -> Path:
        """Return the path in the first root that contains the file, else in the first root."""
        places = [self.folder / root.format(split=self.split) / path for root in roots]
        return next((place for place in places if place.is_file()), places[0])

    def read_target(self, item: str, size: tuple[int, int]) -> np.ndarray:
        """Read the target of an item whose image has the size (H, W)."""
        return read_depth(self.files(item)[1], self.per_metre, size, listed_in=self.list_file)


class NYUDepth(ListedDepth):
    """NYUv2 as used in most depth papers: 24,231 frames of the raw videos for training, 654 labelled ones for tests.

    Test images have a black border of 7 to 8 pixels, as in the files of BTS; frames are numbered from 0.
    """

    name = "nyu_depth"
    sampling_unit = "scene"
    splits = ("train", "test")
    expected: ClassVar[dict[str, int]] = {"train": 24_231, "test": 654}
    images_from = "nyuv2"
    image_sizes = (NYU_SIZE,)
    likely_median = (0.8, 6.0)
    file_unit = "millimetres"
    per_metre = MM
    list_names: ClassVar[dict[str, str]] = {"train": "nyu_train.txt", "test": "nyu_test.txt"}
    image_roots = ("", "sync", "official_splits/{split}", "{split}")
    depth_roots = image_roots
    citation = (
        "Silberman et al., Indoor Segmentation and Support Inference from RGBD Images, ECCV 2012; lists of Lee et al., "
        "From Big to Small, 2019"
    )
    layout = """\
  <data root>/nyu_depth/
    nyu_train.txt  nyu_test.txt              BTS's nyudepthv2_{train,test}_files_with_gt.txt: "image depth focal"
    [sync/]SCENE/rgb_NNNNN.jpg               640x480
    [sync/]SCENE/sync_depth_NNNNN.png        16-bit millimetres; 0 = none
    [official_splits/test/]TYPE/rgb_NNNNN.jpg, sync_depth_NNNNN.png   NNNNN = frame number from 0"""
    _OFFICIAL: ClassVar[frozenset[int]] = frozenset(frames("test"))

    @classmethod
    def is_test(cls, item: str) -> bool:
        """Return whether an image is a test frame: in a folder of a scene type (without a number), official split."""
        path = PurePosixPath(item)
        number = re.search(r"_(\d{5})$", path.stem)
        return not re.search(r"\d", path.parent.name) and number is not None and int(number[1]) + 1 in cls._OFFICIAL

    @classmethod
    def group_of(cls, item: str) -> str:
        """Return the scene of a training frame, or the run of frames (`scene_runs`) of a test frame."""
        path = PurePosixPath(item)
        return str(scene_runs()[int(path.stem[-5:]) + 1]) if cls.is_test(item) else str(path.parent)


class KITTIDepth(ListedDepth):
    """KITTI, Eigen split: 23,158 training images and 652 of the 697 test images, which have improved ground truth."""

    name = "kitti_depth"
    sampling_unit = "drive"
    splits = ("train", "test")
    expected: ClassVar[dict[str, int]] = {"train": 23_158, "test": 652}
    images_from = "kitti"
    image_sizes = ((375, 1242), (370, 1224), (370, 1226), (374, 1238), (376, 1241))
    likely_median = (5.0, 40.0)
    file_unit = "metres / 256"
    per_metre = 256.0
    list_names: ClassVar[dict[str, str]] = {"train": "kitti_eigen_train.txt", "test": "kitti_eigen_test.txt"}
    image_roots = ("input", "", "raw")
    depth_roots = ("gt_depth", "gt_depth/train", "gt_depth/val", "", "train", "val")
    citation = (
        "Geiger et al., CVPR 2012; split of Eigen et al., NeurIPS 2014; ground truth of Uhrig et al., Sparsity "
        "Invariant CNNs, 3DV 2017"
    )
    layout = """\
  <data root>/kitti_depth/
    kitti_eigen_train.txt  kitti_eigen_test.txt    lines "image depth focal"; "None" for no depth
    input/DATE/DRIVE/image_02/data/NNNNNNNNNN.png  or .jpg, about 1242x375
    gt_depth/[train/ or val/]DRIVE/proj_depth/groundtruth/image_02/NNNNNNNNNN.png   16-bit, 256 to a metre; 0 = none
  unpack the official archives by: neco-bench data prepare kitti_depth --source data_depth_annotated.zip
  and the same for each 2011_..._sync.zip of the raw data; lists: those of the Monocular-Depth-Estimation-Toolbox"""
    # Drives of Eigen's 697 test images.
    _TEST: ClassVar[dict[str, str]] = {
        "2011_09_26": "0002 0009 0013 0020 0023 0027 0029 0036 0046 0048 0052 0056 0059 0064 0084 0086 0093 0096 0101 "
        "0106 0117",
        "2011_09_28": "0002",
        "2011_09_29": "0071",
        "2011_09_30": "0016 0018 0027",
        "2011_10_03": "0027 0047",
    }

    @classmethod
    def is_test(cls, item: str) -> bool:
        """Return whether an image belongs to a drive of Eigen's test images."""
        date, number = cls._drive(item)
        return number in cls._TEST.get(date, "").split()

    def files(self, item: str) -> tuple[Path, ...]:
        """Return the listed paths; images may have been saved as JPEG to save space."""
        image, depth = super().files(item)
        other = image.with_suffix(".jpg")
        return (other if not image.is_file() and other.is_file() else image), depth

    @classmethod
    def group_of(cls, item: str) -> str:
        """Return the drive."""
        return "_drive_".join(cls._drive(item))

    @staticmethod
    def _drive(item: str) -> tuple[str, str]:
        match = re.search(r"(\d{4}_\d\d_\d\d)_drive_(\d{4})", item)
        return (match[1], match[2]) if match else ("", "")
