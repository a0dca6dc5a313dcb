"""Surface normals of NYU Depth v2: the labelled frames, and the training frames of GeoNet's release.

Sources: ground truth of the labelled frames by Ladicky, Zeisl and Pollefeys, ECCV 2014; training frames of Qi et al.,
GeoNet, CVPR 2018, read as in probe3d (El Banani et al., CVPR 2024).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from neco_bench.data.dense import DenseDataset, DenseSample, read_depth, read_normals, unit_normals
from neco_bench.data.depth import MM, NYU_SIZE, LabelledFrames
from neco_bench.data.folder import AbsentSplitError, contents, missing
from neco_bench.data.io import no_file, read_mat

_FILES = 30_816

_LEFT_OUT = (6919, 21181)  # indices in the sorted files that probe3d leaves out as damaged


class NYUNormalsLabelled(LabelledFrames):
    """Normals of the labelled frames, 795/654; pixels without sensor depth have no normal."""

    name = "nyu_normals_labelled"
    kind = "normals"
    parts = ("rgb", "normals", "depth")
    citation = "Ladicky et al., Discriminatively Trained Dense Surface Normal Estimation, ECCV 2014"
    layout = """\
  <data root>/nyuv2/
    {train,test}_rgb/NNNN.png        640x480, NNNN = 1-based frame number of nyu_depth_v2_labeled.mat
    {train,test}_normals/NNNN.png    8-bit RGB, (n + 1) / 2 of x, y and z; grey or black = none
    {train,test}_depth/NNNN.png      16-bit millimetres; 0 = none, where normals are not used either
  images and depth are made by: neco-bench data prepare nyuv2 --source nyu_depth_v2_labeled.mat"""

    def read_target(self, item: str, size: tuple[int, int]) -> np.ndarray:
        """Read the target of an item whose image has the size (H, W)."""
        _, normals, depth = self.files(item)
        return read_normals(normals, size) * (read_depth(depth, MM, size) > 0)[..., None]


class NYUNormals(DenseDataset):
    """Normals as in probe3d: GeoNet's 30,814 usable training frames, and the 654 labelled test frames."""

    name = "nyu_normals"
    kind = "normals"
    folder_name = "nyu_geonet"
    images_from = "nyuv2"
    sampling_unit = "scene"
    splits = ("train", "test")
    expected: ClassVar[dict[str, int]] = {"train": _FILES - len(_LEFT_OUT), "test": 654}
    image_sizes = (NYU_SIZE,)
    citation = f"Qi et al., GeoNet, CVPR 2018; {NYUNormalsLabelled.citation}"
    layout = """\
  <data root>/nyu_geonet/NAME.mat                   img, depth, norm; the training frames of GeoNet's release
  <data root>/nyuv2/test_{rgb,normals,depth}/       the test frames, as for nyu_normals_labelled"""

    def __init__(self, folder: Path, split: str) -> None:
        """Raises AbsentSplitError and MissingError (no files), BadInputError (swapped splits)."""
        self.folder, self.split = folder, split
        self._test = NYUNormalsLabelled(folder.parent / "nyuv2", split) if split == "test" else None
        if self._test is not None:
            self.ids = self._test.ids
            return
        names = sorted(path.stem for path in folder.glob("*.mat"))
        if not names:
            raise missing(type(self), f"there is no .mat file in {folder}. {contents(folder)}", AbsentSplitError)
        left_out = {names[i] for i in _LEFT_OUT} if len(names) == _FILES else set()
        self.ids = tuple(name for name in names if name not in left_out)

    @classmethod
    def group_of(cls, item: str) -> str:
        """Return the run of frames of a test frame, or the file of a training frame."""
        return NYUNormalsLabelled.group_of(item) if item.isdigit() and len(item) == 4 else item

    def files(self, item: str) -> tuple[Path, ...]:
        """Return the paths of the image and of the files of its target."""
        return (self.folder / f"{item}.mat",) if self._test is None else self._test.files(item)

    def read_target(self, item: str, size: tuple[int, int]) -> np.ndarray:
        """Read the target of an item whose image has the size (H, W)."""
        return self._read(item)[1] if self._test is None else self._test.read_target(item, size)

    def __getitem__(self, index: int) -> DenseSample:
        if self._test is not None:
            return self._test[index]
        image, target = self._read(self.ids[index])
        self._check_size(self.ids[index], image.shape[:2])
        return DenseSample(image, target, self.ids[index])

    def _part(self, indices: Any) -> NYUNormals:
        part = super()._part(indices)
        part._test = None if self._test is None else self._test._part(indices)
        return part

    @property
    def _bases(self) -> tuple[Path, ...]:
        return (self.folder, self.folder.parent)

    def _read(self, item: str) -> tuple[np.ndarray, np.ndarray]:
        """Return image and normals of a training frame: its first 480 rows and 640 columns."""
        (path,) = self.files(item)
        if not path.is_file():
            raise no_file("file", path)
        height, width = NYU_SIZE

        def parse(variables: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
            image, depth, normals = (np.asarray(variables[name], np.float32) for name in ("img", "depth", "norm"))
            if image.shape != normals.shape or image.shape[:2] != depth.shape or image.shape[2:] != (3,):
                raise ValueError(f"img {image.shape}, depth {depth.shape} and norm {normals.shape} do not match")
            # GeoNet subtracted twice the mean of ImageNet in Caffe's numbers (red, green, blue).
            subtracted = 2 * np.array([122.175, 116.169, 103.508], np.float32)
            image = np.clip(image[:height, :width] + subtracted, 0, 255)
            known = depth[:height, :width, None] > 0
            return image.astype(np.uint8), unit_normals(normals[:height, :width]) * known

        return read_mat(path, parse, "file of GeoNet's release")
