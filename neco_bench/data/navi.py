"""NAVI: photographs of 36 objects with depth and pose; pairs of its in-the-wild collections, as in probe3d.

`neco-bench data prepare navi` writes copies whose shorter side is 1024 (like probe3d's first pass), and the list of
pairs. The reference's list depends on the order of folders in the file system; this one depends only on names
(`draw_pairs`), and results record its sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from neco_bench.core.errors import BadInputError
from neco_bench.core.files import write_whole
from neco_bench.data.folder import contents, file_digest, locate, missing
from neco_bench.data.io import decoding, open_image, read_image, read_json, read_text, valid_name
from neco_bench.data.views import Camera, DepthView, ViewDataset, ViewPair, draw_pairs, rotation_matrix

SHORT_SIDE = 1024  # shorter side of the prepared copies (probe3d)

COPY = "downsampled_"  # prefix of the names of the prepared copies

LIST = "pairs.csv"


@dataclass(frozen=True)
class _View:
    """camera: with the focal length in pixels of the original image, of `size` (H, W). file: its name."""

    camera: Camera
    size: tuple[int, int]
    file: str


class NAVI(ViewDataset):
    """NAVI v1.0 or v1.5, pairs of the 35 in-the-wild collections (2,298 views, every fourth of them a source)."""

    name = "navi"
    splits = ("test",)
    expected = {"test": 575}
    citation = (
        "Jampani et al., NAVI: Category-Agnostic Image Collections, NeurIPS 2023; pairs: El Banani et al., CVPR 2024"
    )
    layout = """\
  <data root>/navi/navi_v1/                   or directly navi/
    OBJECT/wild_set/annotations.json          and at least one more collection of the object
    OBJECT/wild_set/images/NNN.jpg  depth/NNN.png
  and, made of them by: neco-bench data prepare navi [--source navi_v1.0.tar.gz]
    OBJECT/wild_set/images/downsampled_NNN.jpg  depth/downsampled_NNN.png   shorter side 1024
    pairs.csv                                 the pairs: source, target, degrees"""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = locate(folder, "*/wild_set/annotations.json"), split
        self._views = read_annotations(self.folder)
        self.pairs = tuple(self._read_list())
        self.ids = tuple(pair.id for pair in self.pairs)

    @classmethod
    def has_images(cls, folder: Path, split: str) -> bool:
        """Return whether the folder has prepared images, without reading them."""
        place = locate(folder, "*/wild_set/annotations.json")
        return next(place.glob(f"*/wild_set/images/{COPY}*.jpg"), None) is not None

    def _read_list(self) -> list[ViewPair]:
        """Return the pairs of the list, and check that they follow the rule."""
        path = self.folder / LIST
        pairs = pairs_of(self._views)
        try:
            stored = read_text(path, "Pair list")
        except FileNotFoundError:
            text = f"there is no pair list {path}. Create it with: neco-bench data prepare navi"
            raise missing(type(self), text) from None
        if stored != list_text(pairs):
            raise BadInputError(
                f"The pair list {path} does not follow the rule for these annotations: it was changed, or "
                f"objects were added or removed since. Delete it and run: neco-bench data prepare navi."
            )
        return pairs

    @property
    def pair_list(self) -> str:
        """Return the sha256 of the list of pairs."""
        return hashlib.sha256(list_text(pairs_of(self._views)).encode()).hexdigest()

    def files(self, view_id: str) -> tuple[Path, Path]:
        """Return the paths of the image and the depth of a view."""
        name, _, view = view_id.partition("/")
        folder = self.folder / name / "wild_set"
        return folder / "images" / f"{COPY}{self._views[name][view].file}", folder / "depth" / f"{COPY}{view}.png"

    def read_view(self, view_id: str) -> DepthView:
        """Read a view. Raises MissingError and BadInputError."""
        name, _, view = view_id.partition("/")
        facts, (image_file, depth_file) = self._views[name][view], self.files(view_id)
        image = read_image(image_file)
        expected = copy_size(*facts.size)
        if image.shape[:2] != expected:
            raise BadInputError(
                f"Image {image_file} is {image.shape[1]}x{image.shape[0]} pixels (width x height), but its annotation "
                f"gives {expected[1]}x{expected[0]} for a shorter side of {SHORT_SIDE}: it was resized or rotated. "
                f"Delete it and run: neco-bench data prepare navi."
            )
        depth = read_disparity(depth_file, expected)
        focal = facts.camera.focal * min(expected) / min(facts.size)
        return DepthView(image, depth, Camera(facts.camera.rotation, facts.camera.translation, focal))

    def fingerprint(self) -> str:
        """Return the sha256 over name, reader version, split, pairs, cameras, and names and sizes of the files."""
        used = [tuple(view.split("/", 1)) for view in self.image_ids]
        cameras = [self._views[name][view].camera for name, view in used]
        facts = [repr((c.rotation.tolist(), c.translation.tolist(), c.focal)) for c in cameras]
        files = [path for view in self.image_ids for path in self.files(view)]
        return file_digest((self.name, self.version, self.split, *self.ids, *facts), self.folder, files)


def read_annotations(folder: Path) -> dict[str, dict[str, _View]]:
    """Return the in-the-wild views of each object that also has another collection, by object and view."""
    objects: dict[str, dict[str, _View]] = {}
    for path in sorted(folder.glob("*/wild_set/annotations.json")):
        place = path.parent.parent
        collections = [p for p in place.iterdir() if (p / "annotations.json").is_file()]
        if len(collections) > 1:  # as the reference
            views = read_json(path, _parse, "list of annotations of NAVI")
            if views:
                objects[place.name] = views
    if not objects:
        text = f"{folder} has no object with a wild_set and another collection. {contents(folder)}"
        raise missing(NAVI, text)
    return objects


def _parse(raw: Any) -> dict[str, _View]:
    views = {}
    for item in raw:
        file, camera = valid_name(item["filename"]), item["camera"]
        stem = Path(file).stem
        height, width = (int(side) for side in item["image_size"])
        focal = float(camera["focal_length"])
        translation = np.array(camera["t"], np.float64).reshape(3) / 1000  # millimetres
        if not (np.isfinite(translation).all() and 0 < focal < np.inf and min(height, width) > 0):
            raise ValueError(f"view {file} has no finite camera")
        if stem in views:
            raise ValueError(f"view {file} is listed twice")
        views[stem] = _View(Camera(rotation_matrix(camera["q"]), translation, focal), (height, width), file)
    return views


def pairs_of(views: dict[str, dict[str, _View]]) -> list[ViewPair]:
    """Return the pairs of the views by the rule of `draw_pairs`, with the seed of the reference."""
    cameras = {name: {view: own[view].camera for view in own} for name, own in views.items()}
    return draw_pairs(cameras, step=4, seed=8)


def list_text(pairs: Iterable[ViewPair]) -> str:
    """Return the list of pairs as stored and hashed."""
    return "source,target,degrees\n" + "".join(f"{p.source_id},{p.target_id},{p.angle:.4f}\n" for p in pairs)


def read_disparity(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read a 16-bit depth file (65535 x 10 divided by millimetres) as (H, W) float32 metres; 0 stays 0.

    Raises MissingError, and BadInputError for 8 bits, another size, or numbers that are not disparities.
    """
    image = open_image(path, "depth", None)
    with decoding(f"Cannot decode depth {path}"):
        values = np.array(image)
    if not image.mode.startswith("I") or values.shape != size:
        shown = f"{image.width}x{image.height} pixels of format {image.mode}"
        raise BadInputError(
            f"Depth {path} has {shown}; expected are {size[1]}x{size[0]} pixels of 16 bits: it was converted to 8 "
            f"bits, resized or belongs to another view. Delete it and run: neco-bench data prepare navi."
        )
    disparity = values.astype(np.float64)
    depth = np.where(disparity > 0, 65535 * 10.0 / np.maximum(disparity, 1) / 1000, 0).astype(np.float32)
    positive = depth[depth > 0]
    if len(positive) and np.median(positive) > 20:  # the objects are in a hand or on a table
        raise BadInputError(
            f"Depth {path} has a median of {np.median(positive):.0f} m, but NAVI's objects are at arm's length: it has "
            f"depth in millimetres, or of another data set, instead of 16-bit disparity. Restore the original."
        )
    return depth


def copy_size(height: int, width: int) -> tuple[int, int]:
    """Return the size (H, W) of the prepared copy: the shorter side is SHORT_SIDE, the other one is rounded down."""
    factor = SHORT_SIDE / min(height, width)
    return int(height * factor), int(width * factor)


def prepare_navi(folder: Path, wrap: Callable[..., Iterable[Any]]) -> tuple[Path, int, str]:
    """Write the missing copies of all in-the-wild views, and the list of pairs.

    Returns:
        The folder, the number of files written, and a note with the number of pairs and the sha256 of their list.
    """
    place = locate(folder, "*/wild_set/annotations.json")
    views = read_annotations(place)
    written = 0
    todo = [(name, view) for name in sorted(views) for view in sorted(views[name])]
    for name, view in wrap(todo, desc="navi"):
        base, facts = place / name / "wild_set", views[name][view]
        written += _copy(base / "images" / facts.file, Image.Resampling.BICUBIC, facts.size)
        written += _copy(base / "depth" / f"{view}.png", Image.Resampling.NEAREST, facts.size)
    pairs = pairs_of(views)
    text = list_text(pairs).encode()
    if not (place / LIST).is_file() or (place / LIST).read_bytes() != text:
        write_whole(place / LIST, text)
        written += 1
    return place, written, f"{len(pairs)} pairs of {len(views)} objects, list {hashlib.sha256(text).hexdigest()}"


def _copy(path: Path, rule: Image.Resampling, size: tuple[int, int]) -> int:
    """Write the copy of an image or depth file unless it exists; return the number of files written."""
    goal = path.with_name(f"{COPY}{path.name}")
    if goal.exists():
        return 0
    image = open_image(path, "file", path.parent.parent / "annotations.json")
    with decoding(f"Cannot decode {path}"):
        upright = ImageOps.exif_transpose(image)
        if (upright.height, upright.width) != size:
            raise BadInputError(
                f"{path} is {upright.width}x{upright.height} pixels (width x height), but its annotation states "
                f"{size[1]}x{size[0]}. Restore the official file."
            )
        height, width = copy_size(*size)
        small = upright.resize((width, height), rule)
    temporary = goal.with_name(f".{goal.name}")
    small.save(temporary, "JPEG" if goal.suffix.lower() in (".jpg", ".jpeg") else "PNG")
    temporary.replace(goal)
    return 1
