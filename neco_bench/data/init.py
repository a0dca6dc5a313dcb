"""Write a draft of `dataset.toml` for a user's folder by inspecting it: `neco-bench data init FOLDER`.

Images and masks are distinguished by the names of folders and files, else by their format. Ids, splits, the values in
the masks and their palette are derived from the files; class names come from a list such as `classes.txt`, if there is
one. The draft is checked like any `dataset.toml`, and is meant to be corrected by hand.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from neco_bench.core.errors import BadInputError, MissingError, UsageError
from neco_bench.core.files import write_whole
from neco_bench.core.own_data import FILE, read_own
from neco_bench.data.base import spread_indices
from neco_bench.data.io import decoding, open_image, read_text, voc_colours
from neco_bench.data.own import SUFFIXES, own_class

_MASK = re.compile(
    r"(?:^|[^a-z])(?:masks?|labels?|annot\w*|seg\w*|gt|ground.?truth)(?:$|[^a-z])|gtfine|labelids", re.IGNORECASE
)

_SPLITS = ("train", "training", "trn", "val", "valid", "validation", "test", "testing")


@dataclass(frozen=True)
class Written:
    """Files that `init` wrote, and sentences on what it found."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Layout:
    """Patterns of images and masks, and the split folders in them. pairs: (image, mask) by split and id."""

    images: str
    masks: str
    pairs: dict[tuple[str, str], tuple[Path, Path]]
    alone: int  # number of images without a mask


def init(folder: Path, *, overwrite: bool = False) -> Written:
    """Write a `dataset.toml` into a folder, and split lists if it has none.

    Raises:
        UsageError: if the file exists and `overwrite` is not set, or if the folder name cannot be used in task names.
        MissingError: if there is no such folder, or no images or masks in it.
        BadInputError: if masks contain no ids or colours of classes, or if the written file cannot be read.
    """
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise MissingError(f"There is no folder {folder}.")
    if (folder / FILE).exists() and not overwrite:
        raise UsageError(f"{folder / FILE} already exists. Edit it, or replace it with --overwrite.")
    paths = _pictures(folder)
    if not paths:
        raise MissingError(f"{folder} contains no images ({', '.join(SUFFIXES)}).")
    lists: dict[str, list[str]] = {}
    if (keypoints := _keypoint_file(folder)) is not None:
        text, notes = _pairs_text(folder, paths, keypoints), [f"keypoint pairs in {keypoints.name}"]
    else:
        text, lists, notes = _segmentation_text(folder, paths)
    before = (folder / FILE).read_bytes() if (folder / FILE).exists() else None
    contents = {FILE: text} | {name: "\n".join(ids) + "\n" for name, ids in lists.items()}
    written = [folder / name for name in contents]
    for path, content in zip(written, contents.values(), strict=True):
        write_whole(path, content.encode())
    try:
        cls = own_class(read_own(folder))
        for split in cls.splits:
            cls(folder, split)  # type: ignore[call-arg]
    except (BadInputError, MissingError):
        for path in written:
            path.unlink()
        if before is not None:
            write_whole(folder / FILE, before)
        raise
    return Written(tuple(written), tuple(notes))


def _pictures(folder: Path) -> list[PurePosixPath]:
    """Return sorted relative paths of all images below a folder; follows links to folders, ignores hidden files."""
    paths = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        inner = PurePosixPath(Path(place).relative_to(folder).as_posix())
        paths += [inner / n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    return sorted(paths)


def _keypoint_file(folder: Path) -> Path | None:
    """Return the JSON file with pairs of images and points, if there is one."""
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(document, list) and document and isinstance(document[0], dict) and "source_points" in document[0]:
            return path
    return None


def _pairs_text(folder: Path, paths: Sequence[PurePosixPath], keypoints: Path) -> str:
    named = {str(raw.get(key)) for raw in json.loads(keypoints.read_bytes()) for key in ("source", "target")}
    for path in paths:
        stem = path.with_suffix("").as_posix()
        if name := next((item for item in named if stem == item or stem.endswith(f"/{item}")), None):
            suffixes = {p.suffix for p in paths}
            ending = path.suffix if len(suffixes) == 1 else ".*"
            pattern = f"{stem.removesuffix(name)}{{id}}{ending}"
            split = keypoints.stem if keypoints.stem in _SPLITS else "test"
            return (
                f'# Pairs of images with keypoints; docs/pages/own_data.md has all keys.\nkind = "pairs"\n'
                f"images = {_toml(pattern)}\nsplits = {{ {split} = {_toml(keypoints.name)} }}\n"
            )
    raise MissingError(f"{folder} contains none of the images that {keypoints} names, such as {min(named)!r}.")


def _segmentation_text(folder: Path, paths: Sequence[PurePosixPath]) -> tuple[str, dict[str, list[str]], list[str]]:
    images, masks = _split_images_and_masks(folder, paths)
    layout = _pair_up(folder, images, masks)
    splits, lists, how = _splits(folder, layout)
    values = _MaskValues.read([mask for _, mask in layout.pairs.values()])
    notes = [f"{len(layout.pairs)} images with masks, {layout.images} and {layout.masks}", values.note, how]
    if layout.alone:
        notes.append(f"{layout.alone} images have no mask and are left out")
    names, source = _class_names(folder, values)
    notes.append(source)
    lines = [
        "# Written by `neco-bench data init` from the files in this folder; correct it, above all the class names.",
        "# docs/pages/own_data.md has all keys.",
        f"classes = {_toml(names)}",
        *values.lines(names),
        f"images = {_toml(layout.images)}",
        f"masks = {_toml(layout.masks)}",
        f"splits = {splits}",
        'citation = ""',
    ]
    return "\n".join(lines) + "\n", lists, notes


def _split_images_and_masks(
    folder: Path, paths: Sequence[PurePosixPath]
) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    """Return images and masks, separated by name; else, single-channel images with few values are masks."""
    masks = [path for path in paths if _MASK.search(str(path.with_suffix("")))]
    if not masks or len(masks) == len(paths):
        masks = [path for path in paths if _looks_like_mask(folder / path)]
    images = sorted(set(paths) - set(masks))
    if not masks or not images:
        what = "masks" if not masks else "images other than masks"
        raise MissingError(
            f"{folder} has {len(paths)} images such as {str(paths[0])!r}, but no {what}: put images into images/ "
            f"and masks (class ids as grey levels or palette indices, or colours) into masks/, with the same names."
        )
    return images, masks


def _looks_like_mask(path: Path) -> bool:
    try:
        has_one_channel = open_image(path, "mask", None, whole=False).mode in ("L", "P", "1", "I;16", "I")
        return has_one_channel and len(np.unique(np.asarray(open_image(path, "mask", None)))) < 64
    except (BadInputError, MissingError):
        return False


def _pair_up(folder: Path, images: Sequence[PurePosixPath], masks: Sequence[PurePosixPath]) -> _Layout:
    """Return the patterns that give most images a mask. Raises MissingError if no names agree."""
    image_pattern, image_ids = _pattern(images)
    best: tuple[str, dict[tuple[str, str], PurePosixPath]] = ("", {})
    kinds = [masks, *([m for m in masks if m.parts[0] == place] for place in sorted({m.parts[0] for m in masks}))]
    for kind in kinds:  # such as SegmentationClass beside SegmentationObject
        for affixes in (None, _affixes_beside(kind, image_ids)):
            pattern, ids = _pattern(kind, affixes)
            both = {key: path for key, path in ids.items() if key in image_ids}
            if len(both) > len(best[1]):
                best = (pattern, both)
    if not best[1]:
        raise MissingError(
            f"No image and mask in {folder} have the same name: images are like {str(images[0])!r}, masks like "
            f"{str(masks[0])!r}. Rename one of the two."
        )
    pairs = {key: (folder / image_ids[key], folder / mask) for key, mask in best[1].items()}
    return _Layout(image_pattern, best[0], pairs, len(image_ids) - len(pairs))


def _pattern(
    paths: Sequence[PurePosixPath], affixes: tuple[str, str] | None = None
) -> tuple[str, dict[tuple[str, str], PurePosixPath]]:
    """Return a pattern with {id}, and with {split} if folders are splits, and the paths by (split, id).

    affixes: the texts before and after the id in names; None: the common ending of all names after a separator.
    """
    parts = [list(path.parts[:-1]) for path in paths]
    split_at = next(
        (
            i
            for i in range(min(map(len, parts)))
            if len({p[i] for p in parts}) > 1 and all(p[i].lower() in _SPLITS for p in parts)
        ),
        None,
    )
    splits = ["" if split_at is None else p[split_at] for p in parts]
    for p in parts:
        if split_at is not None:
            p[split_at] = "{split}"
    common = _common(parts)
    stems = [path.stem for path in paths]
    before, after = affixes or ("", _common_ending(stems))
    suffixes = Counter(path.suffix for path in paths)
    ending = next(iter(suffixes)) if len(suffixes) == 1 else ".*"
    ids = {}
    for path, place, stem, split in zip(paths, parts, stems, splits, strict=True):
        if stem.startswith(before) and stem.endswith(after) and len(stem) > len(before + after):
            name = stem[len(before) : len(stem) - len(after)]
            ids[split, "/".join([*place[len(common) :], name])] = path
    return "/".join([*common, f"{before}{{id}}{after}{ending}"]), ids


def _common(sequences: Sequence[Sequence[str]]) -> list[str]:
    """Return the common beginning of all sequences, which may differ in length."""
    first = min(sequences, key=len, default=[])
    different = (i for i, part in enumerate(first) if any(sequence[i] != part for sequence in sequences))
    return list(first[: next(different, len(first))])


def _common_ending(stems: Sequence[str]) -> str:
    """Return the common ending of all names, from a separator on: "_img" of a_img, b_img."""
    if len(stems) < 2:
        return ""
    ending = "".join(_common([stem[::-1] for stem in stems]))[::-1]
    match = re.search(r"[_.-][A-Za-z].*", ending)
    return match[0] if match else ""


def _affixes_beside(masks: Sequence[PurePosixPath], image_ids: dict[tuple[str, str], PurePosixPath]) -> tuple[str, str]:
    """Return the texts before and after the image name in most mask names."""
    names = sorted({item.rpartition("/")[2] for _, item in image_ids}, key=len, reverse=True)
    counts: Counter[tuple[str, str]] = Counter()
    for path in masks[:50]:
        if name := next((name for name in names if name in path.stem), None):
            before, _, after = path.stem.partition(name)
            counts[before, after] += 1
    return counts.most_common(1)[0][0] if counts else ("", "")


def _splits(folder: Path, layout: _Layout) -> tuple[str, dict[str, list[str]], str]:
    """Return the value of `splits`, lists to write, and a sentence: split folders, existing lists, or a new draw."""
    names = sorted({split for split, _ in layout.pairs}, key=lambda name: _SPLITS.index(name.lower()) if name else -1)
    if names != [""]:
        counts = Counter(split for split, _ in layout.pairs)
        return _toml(names), {}, "splits: " + ", ".join(f"{name} ({counts[name]})" for name in names)
    ids = [item for _, item in layout.pairs]
    for place in ("", "splits", "lists", "ImageSets", "ImageSets/Segmentation"):
        lists = {name: path for name in _SPLITS if (path := folder / place / f"{name}.txt").is_file()}
        if lists:
            table = {name: path.relative_to(folder).as_posix() for name, path in lists.items()}
            return _inline(table), {}, f"splits: the lists {', '.join(table.values())}"
    # Sorted by a hash, so that the draw depends neither on the numbering of images nor on the machine.
    order = sorted(ids, key=lambda item: hashlib.sha256(item.encode()).digest())
    count = max(1, round(len(order) / 5))
    if len(order) < 2:
        raise MissingError(f"{folder} has a single image with a mask; two or more are needed for train and val.")
    drawn = {"train.txt": sorted(order[count:]), "val.txt": sorted(order[:count])}
    note = f"splits: drawn, {len(order) - count} in train.txt, {count} in val.txt; keep frames of a video in one split"
    return _inline({"train": "train.txt", "val": "val.txt"}), drawn, note


@dataclass(frozen=True)
class _MaskValues:
    """Values in masks with their palette colours (if there are any), or, for RGB masks, the colours."""

    values: tuple[int, ...]
    colours: dict[int, tuple[int, int, int]]
    are_colours: bool
    void: tuple[int, ...]

    @classmethod
    def read(cls, paths: Sequence[Path]) -> _MaskValues:
        """Read the values from at most 2000 masks. Raises BadInputError if a file is not a mask."""
        values: set[int] = set()
        colours: dict[int, tuple[int, int, int]] = {}
        grey = None
        for path in (paths[i] for i in spread_indices(len(paths), 2000)):
            is_grey, own, palette = _values_in(path)
            if grey not in (None, is_grey):
                raise BadInputError(
                    f"Mask {path} has {'grey levels' if is_grey else 'colours'}, but others do not. Use only one kind."
                )
            grey = is_grey
            values |= own
            colours |= palette
            if len(values) > 256:
                raise BadInputError(
                    f"Mask {path}: the masks up to here have {len(values)} values or colours, but 255 classes and void "
                    f"are the maximum; they are photos, or were resized with interpolation or saved as JPEG. Restore "
                    f"the original masks."
                )
        if not grey:
            return cls(tuple(sorted(values)), {v: (v >> 16, v >> 8 & 255, v & 255) for v in values}, True, ())
        void = (255,) if 255 in values and len(values) > 2 else ()
        return cls(tuple(sorted(values - set(void))), colours, False, void)

    @property
    def note(self) -> str:
        kind = "colours" if self.are_colours else "values"
        return f"{len(self.values)} {kind} in the masks" + (", and 255, taken as void" if self.void else "")

    def lines(self, names: Sequence[str]) -> list[str]:
        """Return the lines of `dataset.toml` on values and colours."""
        if self.are_colours:
            palette = [list(self.colours[value]) for value in self.values]
            return ['mask_values = "colours"', f"palette = {_toml(palette)}"]
        lines = [f"ignore = {_toml(self.void[0] if self.void else [])}"]
        if len(names) == len(self.values) and self.values != tuple(range(len(names))):
            table = {str(value): name for value, name in zip(self.values, names, strict=True)}
            lines.append(f"ids = {_inline(table)}")
        known = [self.colours.get(value) for value in self.values]
        if len(names) == len(known) == len(set(known)) and None not in known:
            palette = [list(colour) for colour in known if colour]
        else:
            palette = voc_colours(len(names)).tolist()
        return [*lines, f"palette = {_toml(palette)}"]


def _values_in(path: Path) -> tuple[bool, set[int], dict[int, tuple[int, int, int]]]:
    """Return whether a mask has grey levels or indices, its values (colours as numbers), and their palette."""
    image = open_image(path, "mask", None)
    with decoding(f"Cannot decode mask {path}"):
        is_grey = image.mode in ("L", "P", "I;16", "I")
        array = np.array(image if is_grey else image.convert("RGB")).astype(np.int64)
        stored = (image.getpalette("RGB") or []) if image.mode == "P" else []
    values = set(np.unique(array if is_grey else array @ np.array([1 << 16, 1 << 8, 1])).tolist())
    palette = {v: (stored[3 * v], stored[3 * v + 1], stored[3 * v + 2]) for v in values if 3 * v + 2 < len(stored)}
    return is_grey, values, palette


def _class_names(folder: Path, values: _MaskValues) -> tuple[list[str], str]:
    """Return class names from a list in the folder if the number agrees, else numbered names; and a sentence."""
    count = len(values.values)
    for name in ("classes.txt", "labels.txt", "class_names.txt", "names.txt"):
        if (folder / name).is_file():
            lines = [line.strip() for line in read_text(folder / name, "List of classes").splitlines() if line.strip()]
            if len(lines) == count and len(set(lines)) == count:
                return lines, f"{count} class names from {name}"
            if not values.are_colours and values.values and len(lines) > max(values.values):
                return lines, f"{len(lines)} class names from {name}, of which the masks contain {count}"
    if count < 2:
        raise BadInputError(f"The masks in {folder} have {count} class; two or more are needed. Restore them.")
    if values.values == (0, 255):
        return ["background", "object"], "two classes, named background (0) and object (255)"
    return [f"class_{value if not values.are_colours else i}" for i, value in enumerate(values.values)], (
        f"{count} classes, named by number"
    )


def _toml(value: Any) -> str:
    """Return a text, number or list as TOML, whose syntax for these is that of JSON."""
    return json.dumps(value, ensure_ascii=False)


def _inline(table: dict[str, str]) -> str:
    return "{ " + ", ".join(f"{key} = {_toml(value)}" for key, value in table.items()) + " }"
