"""Load data sets by name: `load_dataset("voc2012", "val", root="~/data")`. Imports neither torch nor any reader.

Another package can add a data set through the entry-point group `neco_bench.datasets`: name = "module:Class", where the
class is a SegmentationDataset, DenseDataset or PairDataset and is constructed as `Class(folder, split)`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from neco_bench.core.errors import BadInputError, UsageError, did_you_mean
from neco_bench.core.own_data import own_datasets
from neco_bench.core.paths import data_root
from neco_bench.core.registry import Registry
from neco_bench.data.base import (
    IGNORE,
    BoxDataset,
    BoxSample,
    Dataset,
    Pair,
    PairDataset,
    PairSample,
    Sample,
    SegmentationDataset,
)
from neco_bench.data.folder import contents, missing, read_lines
from neco_bench.data.io import decoding

DATASETS: Registry[type[Dataset]] = Registry(
    "data set",
    "neco_bench.datasets",
    {
        "shapes": "neco_bench.data.shapes:Shapes",
        "shapes_pairs": "neco_bench.data.shapes:ShapesPairs",
        "shapes_clips": "neco_bench.data.shapes_clips:ShapesClips",
        "shapes_views": "neco_bench.data.shapes_views:ShapesViews",
        "camvid": "neco_bench.data.camvid:CamVid",
        "voc2012": "neco_bench.data.voc2012:VOC2012",
        "ade20k": "neco_bench.data.ade20k:ADE20K",
        "ade20k_151": "neco_bench.data.ade20k:ADE20K151",
        "ade20k_151_scored": "neco_bench.data.ade20k:ADE20K151Scored",
        "coco_things": "neco_bench.data.coco:CocoThings",
        "coco_things_shifted": "neco_bench.data.coco:CocoThingsShifted",
        "coco_stuff": "neco_bench.data.coco:CocoStuff",
        "coco_stuff27": "neco_bench.data.coco:CocoStuff27",
        "coco_stuff27_curated": "neco_bench.data.coco:CocoStuff27Curated",
        "coco_stuff171": "neco_bench.data.coco:CocoStuff171",
        "cityscapes": "neco_bench.data.cityscapes:Cityscapes",
        "pascal_context": "neco_bench.data.pascal_context:PascalContext",
        "pascal_context60": "neco_bench.data.pascal_context:PascalContext60",
        "nyuv2": "neco_bench.data.nyuv2:NYUv2",
        "nyuv2_13": "neco_bench.data.nyuv2:NYUv213",
        "nyu_depth": "neco_bench.data.depth:NYUDepth",
        "nyu_depth_labelled": "neco_bench.data.depth:NYUDepthLabelled",
        "nyu_normals": "neco_bench.data.normals:NYUNormals",
        "nyu_normals_labelled": "neco_bench.data.normals:NYUNormalsLabelled",
        "kitti_depth": "neco_bench.data.depth:KITTIDepth",
        "shapes_depth": "neco_bench.data.shapes_geometry:ShapesDepth",
        "shapes_normals": "neco_bench.data.shapes_geometry:ShapesNormals",
        "pf_willow": "neco_bench.data.proposal_flow:PFWillow",
        "pf_pascal": "neco_bench.data.proposal_flow:PFPascal",
        "voc2007_boxes": "neco_bench.data.boxes:VOC2007Boxes",
        "voc2012_boxes": "neco_bench.data.boxes:VOC2012Boxes",
        "coco20k": "neco_bench.data.boxes:COCO20k",
        "shapes_boxes": "neco_bench.data.boxes:ShapesBoxes",
        "spair71k": "neco_bench.data.spair71k:SPair71k",
        "navi": "neco_bench.data.navi:NAVI",
        "davis2017": "neco_bench.data.davis:DAVIS2017",
        "davis2016": "neco_bench.data.davis:DAVIS2016",
    },
    listing="neco-bench data list",
)

__all__ = [
    "DATASETS",
    "IGNORE",
    "BoxDataset",
    "BoxSample",
    "Dataset",
    "Pair",
    "PairDataset",
    "PairSample",
    "Sample",
    "SegmentationDataset",
    "base_split",
    "check_split",
    "data_root",
    "dataset_folder",
    "fraction_names",
    "list_datasets",
    "load_dataset",
    "open_split",
]

DRAWS = 5  # number of draws of each fraction, as in open-hummingbird-eval


def list_datasets(root: str | os.PathLike[str] | None = None) -> list[str]:
    """Return the names of all data sets, including plug-ins and user-defined ones; their files need not exist."""
    return list(dict.fromkeys([*DATASETS, *own_datasets(root)]))


def load_dataset(
    name: str,
    split: str,
    *,
    root: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    split_file: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Load a split of a data set.

    Args:
        name: a registered name, or a folder below the data root that has a `dataset.toml`.
        split: one of its splits, or a drawn fraction such as "trainaug_1of128_0" (see `Dataset.fraction`).
        root: the folder of data sets, else NECO_BENCH_DATA; the files are in `<root>/<folder_name or name>/`.
        limit: only the first `limit` items.
        split_file: a text file with one item id per line, to which the split is restricted (such as a published list).

    Raises:
        UsageError: for an unknown name or split, or limit < 1.
        MissingError: if there is no root, or files are missing.
        BadInputError: if lists or annotations are wrong.
    """
    cls = dataset_class(name, root)
    drawn = check_split(cls, split)
    dataset = open_split(cls, dataset_folder(cls, root), drawn[1] if drawn else split)
    if drawn:
        dataset = dataset.fraction(int(drawn[2]), int(drawn[3]))
    if split_file is not None:
        dataset = dataset.subset(read_lines(cls, Path(split_file)))
    return dataset if limit is None else dataset.head(limit)


def check_split(cls: type[Dataset], split: str) -> re.Match[str] | None:
    """Return the parts (split, fraction, draw) of a drawn fraction's name, None for a whole split.

    Needs no files. Raises UsageError if the data set has no such split or fraction.
    """
    drawn = re.fullmatch(r"(.+)_1of(\d+)_(\d+)", split)
    if drawn and int(drawn[2]) in cls.fractions.get(drawn[1], {}) and int(drawn[3]) < DRAWS:
        return drawn
    if split not in cls.splits:
        raise UsageError(
            f"Data set {cls.name!r} has no split {split!r}; it has {', '.join((*cls.splits, *fraction_names(cls)))}."
        )
    return None


def open_split(cls: type[Dataset], folder: Path | None, split: str) -> Dataset:
    """Open a split of a data set. Errors of its reader for wrong files become BadInputError."""
    with decoding(f"Data set {cls.name!r} in {folder} cannot be read", "Restore its files."):
        return cls(folder, split)  # type: ignore[call-arg]


def base_split(split: str) -> str:
    """Return the full split of a fraction, or of all its draws ("trainaug_1of8_*"); other names are unchanged."""
    return re.sub(r"_1of\d+_(\d+|\*)$", "", split)


def dataset_class(name: str, root: str | os.PathLike[str] | None = None) -> type[Dataset]:
    """Return the class of a data set, registered or with a `dataset.toml` below the data root.

    Raises UsageError (unknown name) and BadInputError (not a data set class of a plug-in, a wrong `dataset.toml`).
    """
    if name not in DATASETS and (own := own_datasets(root).get(name)):
        from neco_bench.data.own import own_class  # imported when needed, like the readers of registered data sets

        return own_class(own)
    cls = DATASETS.load(name)
    if not (isinstance(cls, type) and issubclass(cls, Dataset) and hasattr(cls, "name") and hasattr(cls, "splits")):
        entry = DATASETS.entry(name)
        raise BadInputError(
            f"Data set {name!r} of {entry.origin} ({entry.value}) is not a Dataset class with a name and splits."
        )
    return cls


def fraction_names(cls: type[Dataset]) -> tuple[str, ...]:
    """Return patterns of the fractions that can be drawn from a data set: "trainaug_1of{128,64,8}_{0..4}"."""
    return tuple(
        f"{split}_1of{{{','.join(map(str, parts))}}}_{{0..{DRAWS - 1}}}" for split, parts in cls.fractions.items()
    )


def dataset_folder(cls: type[Dataset], root: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the folder of a data set, None if it needs none. Raises MissingError, which shows the expected tree."""
    if not cls.needs_root:
        return None
    base = data_root(root)
    if base is None:
        raise missing(cls, "no data root is given. Use --data-root DIR or set NECO_BENCH_DATA.")
    folder = base / (cls.folder_name or cls.name)
    if not folder.is_dir():
        names = [path.name for path in base.iterdir()] if base.is_dir() else []
        raise missing(cls, f"there is no folder {folder}.{did_you_mean(folder.name, names)} {contents(base)}")
    return folder
