"""Data sets by name: `load_dataset("voc2012", "val", root="~/data")`. Imports neither torch nor any reader.

Another package adds a data set through the entry-point group `neco_bench.datasets`: name = "module:Class", the class a
SegmentationDataset or PairDataset constructed as `Class(folder, split)`.
"""

from __future__ import annotations

import os
from pathlib import Path

from neco_bench.data.base import IGNORE, Dataset, Pair, PairDataset, PairSample, Sample, SegmentationDataset
from neco_bench.data.folder import missing
from neco_bench.errors import UsageError
from neco_bench.registry import Registry

DATASETS: Registry[type[Dataset]] = Registry(
    "data set",
    "neco_bench.datasets",
    {
        "shapes": "neco_bench.data.shapes:Shapes",
        "shapes_pairs": "neco_bench.data.shapes:ShapesPairs",
        "camvid": "neco_bench.data.camvid:CamVid",
        "voc2012": "neco_bench.data.voc2012:VOC2012",
        "spair71k": "neco_bench.data.spair71k:SPair71k",
    },
)

__all__ = [
    "DATASETS",
    "IGNORE",
    "Dataset",
    "Pair",
    "PairDataset",
    "PairSample",
    "Sample",
    "SegmentationDataset",
    "data_root",
    "dataset_folder",
    "list_datasets",
    "load_dataset",
]


def list_datasets() -> list[str]:
    """Names of all data sets, those of plug-ins included, whether their files are here or not."""
    return list(DATASETS)


def load_dataset(
    name: str, split: str, *, root: str | os.PathLike[str] | None = None, limit: int | None = None
) -> Dataset:
    """A split of a data set, its first `limit` items if given.

    root: the folder of data sets, else NECO_BENCH_DATA; the files are in `<root>/<name>/`. Raises UsageError (unknown
    name or split, limit < 1), MissingError (no root, files not there), BadInputError (lists or annotations wrong).
    """
    cls = DATASETS.load(name)
    if split not in cls.splits:
        raise UsageError(f"Data set {name!r} has no split {split!r}; it has {', '.join(cls.splits)}.")
    dataset = cls(dataset_folder(cls, root), split)  # type: ignore[call-arg]
    return dataset if limit is None else dataset.limited(limit)


def data_root(root: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder of data sets: the argument, else NECO_BENCH_DATA, else None."""
    given = root or os.environ.get("NECO_BENCH_DATA")
    return Path(given).expanduser() if given else None


def dataset_folder(cls: type[Dataset], root: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder of a data set, None if it needs none. Raises MissingError showing the tree that is expected."""
    if not cls.needs_root:
        return None
    base = data_root(root)
    if base is None:
        raise missing(cls, "no data root is given. Use --data-root DIR or set NECO_BENCH_DATA.")
    if not (base / cls.name).is_dir():
        raise missing(cls, f"there is no folder {base / cls.name}.")
    return base / cls.name
