"""Check whether data sets exist and are complete and readable, for `neco-bench data list` and `neco-bench data check`.

`data check` reads every image once, one at a time; `data list` reads none.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from neco_bench.core.errors import BadInputError, NecoBenchError
from neco_bench.core.own_data import FILE, own_datasets
from neco_bench.core.paths import data_root
from neco_bench.data.base import IGNORE, BoxDataset, Dataset, MaskSummary, PairDataset, SegmentationDataset
from neco_bench.data.dense import DenseDataset, DepthSummary
from neco_bench.data.folder import AbsentSplitError, shared_items
from neco_bench.data.load import DATASETS, dataset_class, dataset_folder, fraction_names, open_split
from neco_bench.data.video import VideoDataset, object_count
from neco_bench.data.views import ViewDataset

Progress = Callable[..., Iterable[Any]]


@dataclass(frozen=True)
class Finding:
    """level: "ok", "warning" (usable, but noteworthy) or "error". values: numbers by name, such as class fractions."""

    level: Literal["ok", "warning", "error"]
    split: str
    text: str
    fix: str = ""
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetRow:
    """A line of the listing. fractions: patterns of the drawn splits. expected: items per split.

    present: the splits with images on disk. problem: why there are none.
    """

    name: str
    kind: str
    splits: tuple[str, ...]
    fractions: tuple[str, ...]
    expected: dict[str, int]
    present: tuple[str, ...]
    origin: str
    citation: str
    problem: str = ""


def describe_datasets(root: str | os.PathLike[str] | None = None) -> list[DatasetRow]:
    """Return all data sets, including user-defined ones and broken plug-ins. Looks for images, but reads none."""
    base = data_root(root)
    rows = []
    origins = {name: entry.origin for name, entry in DATASETS.entries().items()}
    own = {name: str(data.folder / FILE) for name, data in own_datasets(root).items()}
    for name, origin in {**origins, **{name: own[name] for name in sorted(own.keys() - origins)}}.items():
        try:
            cls = dataset_class(name, root)
        except BadInputError as error:
            rows.append(DatasetRow(name, "", (), (), {}, (), origin, "", str(error)))
            continue
        present, problem = _present(cls, base)
        drawn = fraction_names(cls)
        rows.append(
            DatasetRow(name, cls.kind, cls.splits, drawn, dict(cls.expected), present, origin, cls.citation, problem)
        )
    return rows


def _present(cls: type[Dataset], base: Path | None) -> tuple[tuple[str, ...], str]:
    """Return the splits that have images, and why there are none."""
    if not cls.needs_root:
        return cls.splits, ""
    if base is None:
        return (), "no data root given (--data-root, NECO_BENCH_DATA)"
    folder = base / (cls.folder_name or cls.name)
    if not folder.is_dir():
        return (), f"not in {base}"
    present: list[str] = []
    reasons: list[str] = []
    for split in cls.splits:
        try:
            if cls.has_images(folder, split):
                present.append(split)
            else:
                reasons.insert(0, f"no images of split {split!r} in {folder}")
        except Exception as error:  # also of a plug-in: the listing shows the error
            reasons.append(str(error).partition("\n")[0])
    return tuple(present), "" if present else reasons[0]


def check_dataset(
    name: str, root: str | os.PathLike[str] | None = None, *, progress: Progress | None = None
) -> list[Finding]:
    """Read all splits of a data set and return findings on them, in the order of its splits.

    progress: called as `progress(iterable, desc=text)` around each loop; `tqdm.tqdm` fits. Raises UsageError (unknown
    name) and MissingError (no root, no folder); everything else is a finding.
    """
    cls = dataset_class(name, root)
    folder = dataset_folder(cls, root)
    wrap: Progress = progress or (lambda items, desc: items)
    findings: list[Finding] = []
    absent: list[AbsentSplitError] = []
    opened: list[Dataset] = []
    for split in cls.splits:
        try:
            dataset = open_split(cls, folder, split)
        except AbsentSplitError as error:
            absent.append(error)
            text = str(error).partition("\n")[0]
            findings.append(Finding("warning", split, text, "Ignore this if the split is not needed."))
        except NecoBenchError as error:
            findings.append(Finding("error", split, str(error)))
        else:
            findings += _check_split(dataset, wrap)
            opened.append(dataset)
    training = [split for split in opened if split.split.startswith("train") and split.split != "trainval"]
    for train, scored in itertools.product(training, opened):
        if not scored.split.startswith("train") and (text := shared_items(train, scored)):
            findings.append(Finding("error", scored.split, text, "Correct the lists of the splits."))
    if len(absent) == len(cls.splits):
        return [Finding("error", "", str(absent[0]), "Restore the split lists, or correct the data root.")]
    return findings


def _check_split(dataset: Dataset, wrap: Progress) -> list[Finding]:
    findings = [_check_count(dataset)]
    if folder := getattr(dataset, "folder", None):
        findings.append(Finding("ok", dataset.split, f"read from {folder}"))
    return findings + _check_items(dataset, wrap)


def _check_count(dataset: Dataset) -> Finding:
    coverage = dataset.coverage
    if coverage is None:
        return Finding("ok", dataset.split, f"{len(dataset)} items")
    present, full = coverage["found"], coverage["expected"]
    if present > full:
        text = f"{present} items are listed, but the full split has {full}."
        return Finding("error", dataset.split, text, "Restore the official split list.")
    text = f"{present} of the {full} items of the full split: results are marked as on a subset."
    return Finding("warning", dataset.split, text, "Download the whole data set for comparable numbers.")


@functools.singledispatch
def _check_items(dataset: Dataset, wrap: Progress) -> list[Finding]:
    """Read all items of a split, by the kind of data set; other kinds of plug-ins are not read."""
    return []


@_check_items.register
def _check_segmentation(dataset: SegmentationDataset, wrap: Progress) -> list[Finding]:
    masks = MaskSummary()
    damage: list[str] = []
    for index in wrap(range(len(dataset)), desc=f"{dataset.name} {dataset.split}"):
        try:
            mask = dataset[index].mask
            ids = np.unique(mask)
            if wrong := [int(i) for i in ids if not (0 <= i < len(dataset.classes) or i == IGNORE)]:
                last = len(dataset.classes) - 1
                raise BadInputError(
                    f"The mask of {dataset.ids[index]!r} contains {wrong[0]}: ids are 0..{last}, and {IGNORE} for void."
                )
            masks.add(mask)
        except NecoBenchError as error:
            damage.append(str(error))
    findings = _damaged(dataset, damage, len(dataset), "image and mask pairs")
    if not damage:
        findings += [Finding("error", dataset.split, text) for text in dataset.sanity_check(masks)]
    counts = masks.total
    if counts.sum():
        names = {name: i for i, name in enumerate(dataset.classes)} | {"void": IGNORE}
        fractions = {name: float(counts[i] / counts.sum()) for name, i in names.items()}
        shown = ", ".join(f"{name} {100 * value:.2f}" for name, value in fractions.items())
        findings.append(Finding("ok", dataset.split, f"percent of pixels: {shown}", values=fractions))
        never = [name for name, value in fractions.items() if value == 0 and name != "void"]
        if never:
            text = f"{len(never)} of {len(dataset.classes)} classes have no pixel: {', '.join(never)}."
            findings.append(Finding("warning", dataset.split, text, "Scores average the classes that are present."))
    return findings


@_check_items.register
def _check_dense(dataset: DenseDataset, wrap: Progress) -> list[Finding]:
    """Report frame sizes, the share of pixels with a target, and the range of depth or the mean normal."""
    targets, damage, means = DepthSummary(), [], []
    for index in wrap(range(len(dataset)), desc=f"{dataset.name} {dataset.split}"):
        try:
            target = dataset[index].target
            targets.add(target)
            if target.ndim == 3 and target.any():
                means.append(target[target.any(2)].mean(0))
        except NecoBenchError as error:
            damage.append(str(error))
    findings = _damaged(dataset, damage, len(dataset), f"images and maps of {dataset.kind}")
    if not damage:
        findings += [Finding("error", dataset.split, text) for text in dataset.sanity_check(targets)]
    if not len(targets):
        return findings
    sizes = ", ".join(f"{width}x{height}" for height, width in sorted(targets.sizes))
    share = float(np.mean(targets.shares))
    text = f"frames of {sizes} pixels; {100 * share:.1f} % of the pixels have {dataset.kind}"
    findings.append(Finding("ok", dataset.split, text, values={"share": share}))
    if empty := sum(own == 0 for own in targets.shares):
        text = f"{empty} of {len(targets)} maps of {dataset.kind} are empty."
        findings.append(Finding("warning", dataset.split, text, "They are not scored."))
    if targets.ranges:
        if dataset.needs_root and min(targets.shares) == 1:
            text = "every pixel has depth: holes of the sensor were filled in"
            findings.append(Finding("ok", dataset.split, text))
        low, high = min(row[0] for row in targets.ranges), max(row[2] for row in targets.ranges)
        values = {"smallest": low, "median": targets.median, "largest": high}
        text = f"depth of {low:.3g} to {high:.3g} m, median {targets.median:.3g} m"
        findings.append(Finding("ok", dataset.split, text, values=values))
    if means:
        x, y, z = np.mean(means, axis=0).tolist()
        text = f"mean normal ({x:+.2f}, {y:+.2f}, {z:+.2f}): all splits must have the same axis directions"
        findings.append(Finding("ok", dataset.split, text, values={"x": x, "y": y, "z": z}))
    return findings


@_check_items.register
def _check_pairs(dataset: PairDataset, wrap: Progress) -> list[Finding]:
    sizes: dict[str, tuple[int, int]] = {}
    damage: list[str] = []
    for image_id in wrap(dataset.image_ids, desc=f"{dataset.name} {dataset.split}"):
        try:
            height, width = dataset.read_image(image_id).shape[:2]
            sizes[image_id] = (width, height)
        except NecoBenchError as error:
            damage.append(str(error))
    findings = _damaged(dataset, damage, len(dataset.image_ids), "images")
    outside = [
        pair.id
        for pair in dataset.pairs
        for image_id, points in ((pair.source_id, pair.source_points), (pair.target_id, pair.target_points))
        if image_id in sizes and not ((points >= 0) & (points <= sizes[image_id])).all()
    ]
    if outside:
        text = f"{len(outside)} pairs have keypoints outside their images, the first is {outside[0]}."
        findings.append(Finding("error", dataset.split, text, "Restore the annotations and images of one version."))
    wide = [
        pair.id
        for pair in dataset.pairs
        for image_id, box in ((pair.source_id, pair.source_box), (pair.target_id, pair.target_box))
        if image_id in sizes and not (min(box[:2]) >= -1 and (np.array(box[2:]) <= np.array(sizes[image_id]) + 1).all())
    ]
    if wide:
        text = f"Boxes outside their images: {len(wide)}, the first in pair {wide[0]}."
        findings.append(Finding("error", dataset.split, text, "Restore or correct the annotations."))
    flat = [pair.id for pair in dataset.pairs for x1, y1, x2, y2 in [pair.target_box] if not (x1 < x2 and y1 < y2)]
    if flat:
        text = f"{len(flat)} pairs have a target box without an area, the first is {flat[0]}."
        findings.append(Finding("error", dataset.split, text, "Restore the official annotations."))
    empty = [pair.id for pair in dataset.pairs if not len(pair.point_ids)]
    if empty:
        text = f"{len(empty)} pairs have no common keypoint, the first is {empty[0]}."
        findings.append(Finding("warning", dataset.split, text, "They are not scored."))
    if dataset.coverage is None:
        for key, expected in dataset.expected_attributes.get(dataset.split, {}).items():
            counts = tuple(
                sum(pair.attributes[key] == level for pair in dataset.pairs) for level in range(len(expected))
            )
            if counts != expected:
                text = f"Pairs by {key} are {counts}, in the official release {expected}."
                findings.append(Finding("error", dataset.split, text, "Restore the official annotations."))
    return findings


@_check_items.register
def _check_boxes(dataset: BoxDataset, wrap: Progress) -> list[Finding]:
    damage: list[str] = []
    outside, empty = [], []
    for image_id in wrap(dataset.ids, desc=f"{dataset.name} {dataset.split}"):
        try:
            height, width = dataset.read_image(image_id).shape[:2]
            boxes = dataset.boxes(image_id)
        except NecoBenchError as error:
            damage.append(str(error))
            continue
        if not len(boxes):
            empty.append(image_id)
        elif (boxes[:, :2] < -1).any() or (boxes[:, 2:] > (width + 1, height + 1)).any():
            outside.append(image_id)
    findings = _damaged(dataset, damage, len(dataset), "images and annotations")
    if outside:
        text = f"{len(outside)} images have boxes outside them, the first is {outside[0]}."
        findings.append(Finding("error", dataset.split, text, "Restore the annotations and images of one version."))
    if empty:
        text = f"{len(empty)} images have no object, the first is {empty[0]}."
        findings.append(Finding("warning", dataset.split, text, "They are not scored."))
    return findings


@_check_items.register
def _check_video(dataset: VideoDataset, wrap: Progress) -> list[Finding]:
    """Check every frame with its mask: sizes, objects of the first masks, later ids, void."""
    damage: list[str] = []
    sizes: Counter[str] = Counter()
    objects, frames, void = 0, 0, 0
    late: list[str] = []
    for index in wrap(range(len(dataset)), desc=f"{dataset.name} {dataset.split}"):
        clip = dataset.clip(index)
        known: set[int] | None = None
        try:
            for number in range(len(clip)):
                sample = clip[number]
                ids = set(np.unique(sample.mask[sample.mask != IGNORE]).tolist()) - {0}
                if known is None:
                    known, first = ids, sample.mask.shape
                    objects += object_count(sample.mask)
                    sizes[f"{first[1]}x{first[0]}"] += 1
                    if not ids:
                        raise BadInputError(f"The first mask of {clip.id!r} has no object. Restore the original masks.")
                elif sample.mask.shape != first:
                    size = f"{sample.mask.shape[1]}x{sample.mask.shape[0]}"
                    raise BadInputError(f"Frame {sample.id!r} is {size} pixels, the first one {first[1]}x{first[0]}.")
                if ids - known:
                    late.append(sample.id)
                void += int(np.count_nonzero(sample.mask == IGNORE))
                frames += 1
        except NecoBenchError as error:
            damage.append(str(error))
    findings = _damaged(dataset, damage, len(dataset), "sequences")
    if damage:
        return findings
    shown = ", ".join(f"{size} in {count} sequences" for size, count in sizes.most_common())
    values = {"frames": float(frames), "objects": float(objects), "void pixels": float(void)}
    text = f"{frames} frames, {objects} objects in the first masks, {void} void pixels; {shown}"
    findings.append(Finding("ok", dataset.split, text, values=values))
    if late:
        text = f"{len(late)} frames have objects that are not in the first mask; the first is {late[0]!r}."
        findings.append(Finding("warning", dataset.split, text, "Such objects are not scored."))
    for what, found, expected in (
        ("frames", frames, dataset.frame_counts.get(dataset.split)),
        ("objects", objects, dataset.object_counts.get(dataset.split)),
    ):
        if dataset.coverage is None and expected not in (None, found):
            text = f"{found} {what}, but the official split has {expected}."
            findings.append(Finding("error", dataset.split, text, "Restore the official files."))
    return findings


@_check_items.register
def _check_views(dataset: ViewDataset, wrap: Progress) -> list[Finding]:
    """Check every view with its depth: range, share of the object, rotations of the pairs."""
    damage: list[str] = []
    near, far, shares = np.inf, 0.0, []
    for view_id in wrap(dataset.image_ids, desc=f"{dataset.name} {dataset.split}"):
        try:
            view = dataset.read_view(view_id)
            depth = view.depth[view.depth > 0]
            if not len(depth):
                raise BadInputError(f"View {view_id!r} has no depth. Restore the original files.")
            near, far = min(near, float(depth.min())), max(far, float(depth.max()))
            shares.append(len(depth) / view.depth.size)
        except NecoBenchError as error:
            damage.append(str(error))
    findings = _damaged(dataset, damage, len(dataset.image_ids), "views")
    if shares:
        share = float(np.mean(shares))
        text = f"depth of objects from {near:.3f} to {far:.3f} m, on {100 * share:.1f} % of the pixels"
        values = {"nearest": near, "farthest": far, "share": share}
        findings.append(Finding("ok", dataset.split, text, values=values))
    angles = np.array([pair.angle for pair in dataset.pairs])
    counts, _ = np.histogram(angles, [0, 30, 60, 90, 120.001])
    objects = len({pair.object for pair in dataset.pairs})
    text = f"{len(angles)} pairs of {objects} objects; by rotation 0-30-60-90-120 degrees: {counts.tolist()}"
    findings.append(Finding("ok", dataset.split, text))
    if list_id := getattr(dataset, "pair_list", None):
        findings.append(Finding("ok", dataset.split, f"list of pairs, sha256 {list_id}"))
    return findings


def _damaged(dataset: Dataset, damage: list[str], count: int, what: str) -> list[Finding]:
    if not damage:
        return [Finding("ok", dataset.split, f"all {count} {what} can be read and agree")]
    findings = [Finding("error", dataset.split, text) for text in damage[:20]]  # the others are only counted
    fix = f"Download the data set again: {dataset.citation}." if dataset.citation else "Download the data set again."
    text = f"{len(damage)} of {count} {what} are damaged or missing."
    return [*findings, Finding("error", dataset.split, text, fix)]
