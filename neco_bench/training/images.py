"""Sources of training images: folders, lists, well-known data sets, the generated shapes, and mixtures of them."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, UsageError, did_you_mean
from neco_bench.core.paths import data_root
from neco_bench.data.io import read_image, read_text
from neco_bench.data.load import DATASETS
from neco_bench.data.shapes import TRAIN, VERSION, segmentation_scene
from neco_bench.data.voc2012 import VOC2012

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")

log = logging.getLogger("neco_bench")

MAX_SHAPES = 10_000_000  # their names need a gigabyte

# Data sets by name: the folder below the data root, and the folder of the training images in it.
FOLDERS = {
    "coco": ("coco", "train2017"),
    "imagenet": ("imagenet", "train"),
    "imagenet100": ("imagenet", "train"),
    "voc": ("voc2012", ""),
}

IMAGENET100 = Path(__file__).with_name("imagenet100.txt")  # names of the folders of its classes


@dataclass(frozen=True)
class Images:
    """Images by index.

    ids: their names, in a fixed order that does not depend on the place of the folder. folder: folder of the files,
    whose names are the ids; None for generated images. description: for messages. source: the collection of the images
    if known, as named by `Dataset.images_from`.
    """

    ids: tuple[str, ...]
    description: str
    folder: Path | None = None
    source: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> np.ndarray:
        """Read image (H, W, 3) uint8 RGB. Raises BadInputError for an image that is missing or cannot be decoded."""
        if self.folder is None:
            return segmentation_scene("train", index).image
        try:
            return read_image(self.folder / self.ids[index])
        except MissingError as error:
            raise BadInputError(str(error)) from error

    def fingerprint(self) -> str:
        """Return the sha256 of ids and file sizes (-1 for a missing file), or of the version of generated images."""
        digest = hashlib.sha256(VERSION.encode() if self.folder is None else b"files")
        for name in self.ids:
            size = 0
            if self.folder is not None:
                try:
                    size = os.stat(self.folder / name).st_size
                except (OSError, ValueError):  # missing, or an invalid file name
                    size = -1
            digest.update(f"{name} {size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def overlap(self, root: Path | None = None) -> dict[str, str]:
        """Return the collections of the images, as named by `Dataset.images_from`: {name: "seen"}.

        A collection is known from the request, or from folders with the names of data sets or below the data root. For
        images elsewhere, "*" is "unknown".
        """
        if self.folder is None or self.source:
            return {self.source or "shapes": "seen"}
        known = {below: name.removesuffix("100") for name, (below, _) in FOLDERS.items()}
        for name in DATASETS:
            try:
                cls = DATASETS.load(name)
                known[cls.folder_name or cls.name] = cls.images_from or cls.folder_name or cls.name
            except (NecoBenchError, AttributeError):  # a broken plug-in
                continue
        base = data_root(root)
        files = (os.path.join(self.folder, name) for name in self.ids)
        overlap: dict[str, str] = {}
        for folder in {os.path.dirname(os.path.realpath(f) if os.path.islink(f) else f) for f in files}:
            paths = Path(folder).absolute(), Path(folder).resolve()
            sources = {known[part.lower()] for path in paths for part in path.parts if part.lower() in known}
            if not sources and base and paths[1].is_relative_to(base.resolve()):
                sources = set(paths[1].relative_to(base.resolve()).parts[:1])
            overlap |= dict.fromkeys(sources, "seen") or {"*": "unknown"}
        return overlap


@dataclass(frozen=True)
class Mixture(Images):
    """The images of several sources, one after another; each image is used once per epoch.

    parts: the sources; their descriptions are prefixes of the ids.
    """

    parts: tuple[Images, ...] = ()

    def read(self, index: int) -> np.ndarray:
        """Read image (H, W, 3) uint8 RGB of one of the sources. Raises as `Images.read`."""
        for part in self.parts:
            if index < len(part):
                return part.read(index)
            index -= len(part)
        raise IndexError(index)

    def fingerprint(self) -> str:
        """Return the sha256 of the fingerprints of the sources."""
        return hashlib.sha256("\n".join(part.fingerprint() for part in self.parts).encode()).hexdigest()

    def overlap(self, root: Path | None = None) -> dict[str, str]:
        """Return the collections of all sources, see `Images.overlap`."""
        overlap: dict[str, str] = {}
        for part in self.parts:
            overlap |= part.overlap(root)
        return overlap


def open_images(spec: str, root: Path | None = None) -> Images:
    """Open the images of `spec`: one source, or several separated by commas.

    Raises UsageError for a repeated source, and the errors of `_open_source`.
    """
    names = [name.strip() for name in spec.split(",") if name.strip()]
    if len(names) < 2 or os.path.exists(spec):
        return _open_source(spec, root)
    parts = tuple(_open_source(name, root) for name in names)
    titles = [part.description for part in parts]
    if len(set(titles)) < len(titles):
        raise UsageError(
            f"--data {spec!r} names {titles[0] if len(set(titles)) == 1 else 'a source'} twice. Name it once."
        )
    ids = tuple(f"{part.description}/{name}" for part in parts for name in part.ids)
    return Mixture(ids, " + ".join(titles), parts=parts)


def _open_source(spec: str, root: Path | None = None) -> Images:
    """Open the images of one source.

    A source is a folder (with images at any depth); a list file (one path per line, absolute or relative to the folder
    of the list, with either separator; # starts a comment); `shapes` or `shapes:N` (the first N training scenes, none
    of the val split); or `coco`, `imagenet`, `imagenet100` (its 100 classes in `imagenet`) or `voc` below the data
    root, each with `:FOLDER` for another folder. Raises UsageError (unknown name), MissingError (nothing there) and
    BadInputError (an empty list).
    """
    name, _, rest = spec.partition(":")
    if name == "shapes" and not os.path.exists(spec):
        count = int(rest) if rest.isdecimal() and len(rest) < 10 else 0 if rest else TRAIN
        if not 0 < count <= MAX_SHAPES:
            raise UsageError(
                f"--data {spec!r}: write shapes:N with the number of images to generate, at most {MAX_SHAPES:,}."
            )
        return Images(tuple(f"train/{i}" for i in range(count)), f"shapes ({count} generated images)")
    if name in FOLDERS and not os.path.exists(spec):
        return _named(name, rest, root)
    path = Path(os.path.expanduser(spec))
    if os.path.isdir(path):
        return _in_folder(path, path.resolve().name)
    if os.path.isfile(path):
        return _in_list(path)
    known = [*FOLDERS, "shapes"]
    raise MissingError(
        f"--data {spec!r} is neither a folder, nor a list file, nor one of {', '.join(known)}."
        f"{did_you_mean(name, known)}"
    )


def _named(name: str, rest: str, root: Path | None) -> Images:
    below, inside = FOLDERS[name]
    base = data_root(root)
    if not rest and base is None:
        raise MissingError(f"--data {name}: no data root is given. Use --data-root DIR, or --data {name}:FOLDER.")
    folder = Path(os.path.expanduser(rest)) if rest else Path(base or "") / below
    if name != "voc":
        if not (folder / inside).is_dir():
            raise MissingError(f"--data {name}: its images should be in {folder / inside}, which is not there.")
        classes = _imagenet100(folder / inside) if name == "imagenet100" else ()
        images = _in_folder(folder / inside, f"{name} {inside}", classes)
        if classes and len(images) != 126_689:
            text = "--data %s: %s has %d images of the 100 classes, where ImageNet-100 has 126689."
            log.warning(text, name, folder / inside, len(images))
        return replace(images, source=name.removesuffix("100"))
    if not folder.is_dir():
        raise MissingError(f"--data voc: there is no folder {folder}. It should hold\n{VOC2012.layout}")
    try:
        dataset = VOC2012(folder, "trainaug")
    except MissingError:
        dataset = VOC2012(folder, "train")
    names = (os.path.relpath(dataset.files(item)[0], folder) for item in dataset.ids)
    return Images(tuple(sorted(names)), f"voc {dataset.split}", folder, source=name)


def _imagenet100(folder: Path) -> tuple[str, ...]:
    """Return the names of the class folders of ImageNet-100. Raises MissingError if one of them is missing."""
    lines = IMAGENET100.read_text(encoding="utf-8").splitlines()
    names = tuple(name for line in lines if not line.startswith("#") for name in line.split())
    absent = [name for name in names if not (folder / name).is_dir()]
    if absent:
        raise MissingError(
            f"--data imagenet100: {len(absent)} of its 100 classes are not in {folder}, such as {absent[0]}. Unpack "
            f"the training images of ImageNet there, a folder for each class."
        )
    return names


def _in_folder(folder: Path, description: str, inside: tuple[str, ...] = ()) -> Images:
    """Find the images of a folder, at any depth. inside: names of the folders to use; all if empty."""
    names: list[str] = []
    for current, folders, files in os.walk(folder, followlinks=True):
        if inside and os.path.samefile(current, folder):
            folders[:], files = [name for name in folders if name in inside], []
        here = Path(os.path.realpath(current))
        above = {here, *here.parents}  # links to these would lead in circles
        further = (name for name in folders if Path(os.path.realpath(os.path.join(current, name))) not in above)
        folders[:] = [name for name in further if not name.startswith(".")]
        near = os.path.relpath(current, folder)
        found = (name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        names += [os.path.normpath(os.path.join(near, name)) for name in found]
    if not names:
        raise MissingError(f"{folder} has no images, at any depth; looked for {', '.join(SUFFIXES)}.")
    return Images(tuple(sorted(names)), description, folder)


def _in_list(path: Path) -> Images:
    lines = [line.partition("#")[0].strip() for line in read_text(path, "List of image files").splitlines()]
    names = [line if os.path.isfile(path.parent / line) else line.replace("\\", "/") for line in lines if line]
    if not names:
        raise BadInputError(f"{path} names no images; write one path a line.")
    if not any(os.path.isfile(path.parent / name) for name in names):
        raise MissingError(f"{path}: none of its {len(names)} files is there; the first is {path.parent / names[0]}.")
    return Images(tuple(dict.fromkeys(names)), path.name, path.parent)
