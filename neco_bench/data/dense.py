"""Data sets with a continuous target at each pixel: depth in metres, or surface normals."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from neco_bench.core.errors import BadInputError
from neco_bench.data.base import FEW, MANY, Dataset, spread_indices
from neco_bench.data.folder import file_digest
from neco_bench.data.io import RESTORE, check_shape, decoding, open_image, read_image
from neco_bench.data.png import RGB, read_plain_png

Quantity = Literal["depth", "normals"]


@dataclass(frozen=True)
class DenseSample:
    """An image and its target.

    image: (H, W, 3) uint8 RGB. target: float32, depth (H, W) in metres (0: unknown), or normals (H, W, 3) of length 1
    (x right, y down, z away from the camera; all 0: unknown). id: unique in its split.
    """

    image: np.ndarray
    target: np.ndarray
    id: str


class DepthSummary:
    """Statistics of depth maps: the share of pixels with a value; smallest, median and largest value of each map."""

    def __init__(self, targets: Iterable[np.ndarray] = ()) -> None:
        self.shares: list[float] = []
        self.ranges: list[tuple[float, float, float]] = []
        self.sizes: set[tuple[int, ...]] = set()
        for target in targets:
            self.add(target)

    def add(self, target: np.ndarray) -> None:
        """Add a depth map (H, W), or normals (H, W, 3), for which only shares and sizes are recorded."""
        values = target[target > 0] if target.ndim == 2 else target[np.any(target != 0, axis=2)]
        self.shares.append(len(values) / (target.shape[0] * target.shape[1]))
        self.sizes.add(target.shape[:2])
        if len(values) and target.ndim == 2:
            self.ranges.append((float(values.min()), float(np.median(values)), float(values.max())))

    def __len__(self) -> int:
        return len(self.shares)

    @property
    def median(self) -> float:
        """Median of the medians of the maps, in metres; NaN if no map has a value."""
        return float(np.median([middle for _, middle, _ in self.ranges])) if self.ranges else float("nan")


class DenseDataset(Dataset):
    """A split of images with targets in files.

    kind: "depth" or "normals". image_sizes: allowed sizes (H, W) of frames; empty: any. likely_median: range in metres
    for the median depth of the maps of a split. file_unit: unit of values in depth files, as text.
    """

    image_sizes: ClassVar[tuple[tuple[int, int], ...]] = ()
    likely_median: ClassVar[tuple[float, float]] = (0.0, float("inf"))
    file_unit: ClassVar[str] = ""
    folder: Path
    list_file: Path | None = None

    @abc.abstractmethod
    def files(self, item: str) -> tuple[Path, ...]:
        """Return the paths of the image and of the files of its target."""

    @abc.abstractmethod
    def read_target(self, item: str, size: tuple[int, int]) -> np.ndarray:
        """Read the target of an item whose image has the size (H, W). Raises MissingError and BadInputError."""

    def __getitem__(self, index: int) -> DenseSample:
        """Read sample `index`. Raises MissingError (no such file) and BadInputError (damaged, wrong size or values)."""
        item = self.ids[index]
        image = self.read_item_image(item)
        self._check_size(item, image.shape[:2])
        return DenseSample(image, self.read_target(item, image.shape[:2]), item)

    def read_item_image(self, item: str) -> np.ndarray:
        """Read the image of an item, (H, W, 3) uint8."""
        return read_image(self.files(item)[0], listed_in=self.list_file)

    @classmethod
    def has_images(cls, folder: Path, split: str) -> bool:
        """Return whether the first image of a split and its target exist, without reading them."""
        data = cls(folder, split)  # type: ignore[call-arg]
        return all(path.is_file() for path in data.files(data.ids[0]))

    def _check_size(self, item: str, size: tuple[int, ...]) -> None:
        if self.image_sizes and size not in self.image_sizes:
            known = ", ".join(f"{width}x{height}" for height, width in self.image_sizes)
            raise BadInputError(
                f"Image {self.files(item)[0]} is {size[1]}x{size[0]} pixels (width x height), but {self.name} has "
                f"{known}: it was resized or belongs to another data set. Scores of resized copies cannot be compared: "
                f"restore the original files."
            )

    def sanity_check(self, targets: DepthSummary) -> list[str]:
        """Return messages if the targets of a split (or 16 of them) are implausible."""
        if self.kind == "normals":
            return []
        if not targets.ranges:
            return [f"No pixel of {len(targets)} depth maps has a depth: {RESTORE.lower()}"] if len(targets) else []
        low, high = self.likely_median
        if low <= targets.median <= high or len(targets) < FEW:
            return []
        return [
            f"The median depth of {len(targets)} maps is {targets.median:.3g} m, but that of {self.name} is between "
            f"{low:g} and {high:g} m: the files have another unit (such as metres instead of {self.file_unit}), "
            f"or were reduced to 8 bits. Restore the original depth files."
        ]

    def sample_sanity_check(self) -> list[str]:
        """Return the messages of `sanity_check` for 16 targets across the split."""
        return self.sanity_check(DepthSummary(self[index].target for index in spread_indices(len(self), MANY)))

    def fingerprint(self) -> str:
        """Return the sha256 over name, reader version, split, ids, and names and sizes of all files."""
        facts = (self.name, self.version, self.split, *self.ids)
        return file_digest(facts, self._bases, dict.fromkeys(path for item in self.ids for path in self.files(item)))

    @property
    def _bases(self) -> tuple[Path, ...]:
        """Return the folders to which file names in the fingerprint are relative."""
        return (self.folder,)


def read_depth(path: Path, per_metre: float, size: tuple[int, int], *, listed_in: Path | None = None) -> np.ndarray:
    """Read a 16-bit depth file as (H, W) float32 metres; 0 stays 0.

    per_metre: file values per metre (1000 for millimetres). size: required size (H, W). Raises MissingError and
    BadInputError.
    """
    image = open_image(path, "depth map", listed_in)
    if image.mode not in ("I;16", "I;16B", "I"):
        raise BadInputError(
            f"Depth map {path} has pixel format {image.mode}, but 16 bits are needed: with 8 bits, depth has only a "
            f"few levels. Use the original file."
        )
    with decoding(f"Cannot decode depth map {path}"):
        values = np.array(image)
    if values.min() < 0 or values.max() > 65535:
        raise BadInputError(f"Depth map {path} has values {values.min()}..{values.max()}, not 16-bit ones. {RESTORE}")
    check_shape(path, values.shape, size, "Depth map")
    return values.astype(np.float32) / np.float32(per_metre)


def read_normals(path: Path, size: tuple[int, int], *, listed_in: Path | None = None) -> np.ndarray:
    """Read an 8-bit RGB file as (H, W, 3) float32 normals, 2 v / 255 - 1 scaled to length 1.

    Vectors shorter than 0.5 (grey or black, which mean no normal) become 0. Raises MissingError and BadInputError.
    """
    values = read_plain_png(path, RGB)
    if values is None:
        image = open_image(path, "map of normals", listed_in)
        if image.mode != "RGB":
            raise BadInputError(
                f"Map of normals {path} has pixel format {image.mode}; RGB of 8 bits with (n + 1) / 2 is needed."
            )
        with decoding(f"Cannot decode map of normals {path}"):
            values = np.array(image)
    check_shape(path, values.shape[:2], size, "Map of normals")
    vectors = values.astype(np.float32) * np.float32(2 / 255) - 1
    vectors[~values.any(axis=2)] = 0  # black
    return unit_normals(vectors)


def unit_normals(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors (H, W, 3) to length 1, float32; those shorter than 0.5, or not finite, become 0."""
    length = np.linalg.norm(vectors, axis=2, keepdims=True)
    known = np.isfinite(length) & (length >= 0.5)
    return np.where(known, vectors / np.where(known, length, 1), 0).astype(np.float32)
