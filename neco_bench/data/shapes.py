"""The embedded data sets: procedural scenes of textured shapes, and image pairs with keypoints. No data root is needed.

They are generated at first use in the cache folder, `shapes-<version>/`, within seconds, and read like other data sets.
An image depends only on (version, part, index). Only `Generator.random` of PCG64 and numpy in float64 are used, and
files are uncompressed (PPM, PGM), so that pixels and bytes do not depend on fonts, drawing or compression libraries.

A class is a shape with a texture that rotates with it (stripes, checks, dots or rings). Colours are random per object
and only weakly related to the class: the mean colour is a weak cue, edge orientation a strong one. Every object has an
eye off its centre, so that symmetry does not make keypoints ambiguous.
"""

from __future__ import annotations

import colorsys
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from neco_bench.data.base import IGNORE
from neco_bench.data.folder import PairFolder, SegmentationFolder, parse_pair, read_list
from neco_bench.data.generated import generated_folder, write_manifest

VERSION = "1"

SIZE = 224

TRAIN, VAL, PAIR_IMAGES, PAIRS = 160, 80, 64, 200

Array = np.ndarray


def _stripes(angle: float) -> Callable[[Array, Array], Array]:
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return lambda u, v: np.sin(u * c + v * s)


def _checks(angle: float) -> Callable[[Array, Array], Array]:
    first, second = _stripes(angle), _stripes(angle + 90)
    return lambda u, v: first(u, v) * second(u, v)


def _inside_star(u: Array, v: Array) -> Array:
    """Return whether points are in a star: five tips at radius 1, notches at 0.5, one tip up, straight edges."""
    turn = 2 * np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + turn / 2) % turn - turn / 2)
    x, y = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    notch_x, notch_y = 0.5 * np.cos(turn / 2), 0.5 * np.sin(turn / 2)
    return (1 - x) * notch_y - (1 - notch_x) * y > 0


@dataclass(frozen=True)
class _Shape:
    """A class in its own coordinates: u right, v down, radius about 1. texture: values -1..1 at (u, v) in radians."""

    name: str
    inside: Callable[[Array, Array], Array]
    texture: Callable[[Array, Array], Array]
    points: dict[str, tuple[float, float]]  # "eye" is drawn


_SHAPES = (
    _Shape(
        "disc",
        lambda u, v: np.hypot(u, v) < 0.95,
        _stripes(90),
        {"eye": (-0.3, -0.4), "top": (0, -0.85), "right": (0.85, 0), "bottom": (0, 0.85), "left": (-0.85, 0)},
    ),
    _Shape(
        "ring",
        lambda u, v: np.abs(np.hypot(u, v) - 0.73) < 0.27,
        _stripes(0),
        {"eye": (-0.53, -0.53), "top": (0, -0.73), "right": (0.73, 0), "bottom": (0, 0.73), "left": (-0.73, 0)},
    ),
    _Shape(
        "square",
        lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.85,
        _stripes(45),
        {
            "eye": (-0.3, -0.4),
            "top_left": (-0.75, -0.75),
            "top_right": (0.75, -0.75),
            "bottom_right": (0.75, 0.75),
            "bottom_left": (-0.75, 0.75),
        },
    ),
    _Shape(
        "triangle",
        lambda u, v: (v < 0.7) & (2 * np.abs(u) - v < 1.1),
        _stripes(135),
        {"eye": (-0.12, -0.25), "top": (0, -0.92), "right": (0.75, 0.58), "left": (-0.75, 0.58), "base": (0, 0.6)},
    ),
    _Shape(
        "star",
        _inside_star,
        _checks(0),
        {
            "eye": (-0.1, -0.25),
            "top": (0, -0.85),
            "right": (0.81, -0.26),
            "bottom_right": (0.5, 0.69),
            "bottom_left": (-0.5, 0.69),
            "left": (-0.81, -0.26),
        },
    ),
    _Shape(
        "cross",
        lambda u, v: (np.minimum(np.abs(u), np.abs(v)) < 0.32) & (np.maximum(np.abs(u), np.abs(v)) < 0.95),
        _checks(45),
        {"eye": (-0.1, -0.45), "top": (0, -0.85), "right": (0.85, 0), "bottom": (0, 0.85), "left": (-0.85, 0)},
    ),
    _Shape(
        "crescent",
        lambda u, v: (np.hypot(u, v) < 1) & (np.hypot(u - 0.65, v) > 0.7),
        lambda u, v: np.cos(u) + np.cos(v) - 0.7,
        {
            "eye": (-0.55, -0.45),
            "back": (-0.9, 0),
            "belly": (-0.15, 0),
            "horn_up": (0.25, -0.8),
            "horn_down": (0.25, 0.8),
        },
    ),
    _Shape(
        "arrow",
        lambda u, v: (np.abs(v) < 0.3) & (np.abs(u + 0.4) < 0.55) | (u > 0) & (np.abs(v) < 0.85 * (1 - u)),
        lambda u, v: np.sin(np.hypot(u, v)),
        {
            "eye": (-0.6, -0.08),
            "tip": (0.88, 0),
            "barb_up": (0.07, -0.72),
            "barb_down": (0.07, 0.72),
            "tail": (-0.85, 0.1),
        },
    ),
)


@dataclass(frozen=True)
class ShapeObject:
    """An instance. kind: class id, from 1. x, y, radius: pixels. turn: radians, clockwise in the image."""

    kind: int
    x: float
    y: float
    radius: float
    turn: float

    def frame(self) -> tuple[Array, Array]:
        """Return the object coordinates (u, v) of all pixel centres."""
        dx, dy = np.arange(SIZE) - self.x, np.arange(SIZE)[:, None] - self.y
        c, s = np.cos(self.turn) / self.radius, np.sin(self.turn) / self.radius
        return dx * c + dy * s, dy * c - dx * s

    def points(self) -> dict[str, tuple[float, float]]:
        """Return the keypoints by name, (x, y) pixels."""
        c, s = np.cos(self.turn) * self.radius, np.sin(self.turn) * self.radius
        points = _SHAPES[self.kind - 1].points
        return {name: (float(self.x + u * c - v * s), float(self.y + u * s + v * c)) for name, (u, v) in points.items()}


@dataclass(frozen=True)
class Scene:
    """image: (S, S, 3) uint8. owner: (S, S) number of the visible object, or 0. extents: unoccluded masks."""

    image: Array
    owner: Array
    extents: list[Array]
    objects: list[ShapeObject]

    def mask(self) -> Array:
        """Return class ids (S, S) uint8, IGNORE if one of the 8 neighbours belongs to another object."""
        kinds = np.array([0, *(o.kind for o in self.objects)], np.uint8)[self.owner]
        padded = np.pad(self.owner, 1, mode="edge")
        for dy, dx in itertools.product(range(3), range(3)):
            kinds[padded[dy : dy + SIZE, dx : dx + SIZE] != self.owner] = IGNORE
        return kinds


def generator(stream: str, index: int) -> np.random.Generator:
    """Return the random generator of item `index` of a part or stage."""
    streams = ("train", "val", "test", "clips", "clip looks", "clip grain", "views", "view looks", "view scenes")
    return np.random.Generator(np.random.PCG64([int(VERSION), streams.index(stream), index]))


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a uniform number from low to high."""
    return low + (high - low) * rng.random()


def _noise(rng: np.random.Generator, cells: int) -> Array:
    """Draw bilinear noise with `cells` cells per side, (S, S) in 0..1."""
    grid = rng.random((cells + 1, cells + 1))
    at = np.arange(SIZE) * cells / SIZE
    low = at.astype(int)
    part = at - low
    rows = grid[low] * (1 - part)[:, None] + grid[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def two_colours(rng: np.random.Generator, hue: float) -> tuple[Array, Array]:
    """Draw a light and a dark colour, RGB in 0..1."""
    saturation, value, contrast = between(rng, 0.25, 0.9), between(rng, 0.6, 1), between(rng, 0.4, 0.75)
    light = colorsys.hsv_to_rgb(hue, saturation, value)
    dark = colorsys.hsv_to_rgb((hue + between(rng, -0.15, 0.15)) % 1, saturation, value * (1 - contrast))
    return np.array(light), np.array(dark)


def background(rng: np.random.Generator) -> Array:
    """Draw patches with irregular edges in two colours over clouds: texture without a preferred orientation."""
    light, dark = two_colours(rng, rng.random())
    clouds = 0.5 * _noise(rng, 4) + 0.3 * _noise(rng, 9) + 0.2 * _noise(rng, 20)
    edges = np.clip((_noise(rng, 14) + 0.5 * _noise(rng, 31) - 0.75) * 6 + 0.5, 0, 1)
    return dark + (light - dark) * (0.55 * clouds + 0.45 * edges)[..., None]


def draw_objects(rng: np.random.Generator, objects: list[ShapeObject]) -> Scene:
    """Draw objects in order, later ones over earlier ones, then apply a slight blur, lighting and grain."""
    image = background(rng)
    owner = np.zeros((SIZE, SIZE), np.uint8)
    extents = []
    for number, item in enumerate(objects, 1):
        shape = _SHAPES[item.kind - 1]
        u, v = item.frame()
        inside = shape.inside(u, v)
        near_class = rng.random() < 0.5
        hue = (item.kind / len(_SHAPES) + between(rng, -0.05, 0.05)) % 1 if near_class else rng.random()
        light, dark = two_colours(rng, hue)
        waves = 2 * np.pi * item.radius / (9.5 * np.sqrt(item.radius / 50))  # a period of 9.5 pixels at radius 50
        tone = np.clip(0.5 + 1.2 * shape.texture(u * waves, v * waves), 0, 1)
        shade = 1 - 0.18 * (u * between(rng, -1, 1) + v * between(rng, -1, 1))
        colour = (dark + (light - dark) * tone[..., None]) * shade[..., None]
        eye = np.hypot(u - shape.points["eye"][0], v - shape.points["eye"][1])
        colour[eye < 0.17] = 0.95
        colour[eye < 0.09] = 0.05
        image[inside] = colour[inside]
        owner[inside] = number
        extents.append(inside)
    image = smoothed(image)
    x, y = np.arange(SIZE) / SIZE - 0.5, np.arange(SIZE)[:, None] / SIZE - 0.5
    gain = between(rng, 0.7, 1.15) + 0.4 * (x * between(rng, -1, 1) + y * between(rng, -1, 1))
    tint = np.array([between(rng, 0.88, 1.12) for _ in range(3)])
    image = image * gain[..., None] * tint + 0.06 * (rng.random((SIZE, SIZE, 1)) - 0.5)
    return Scene(to_bytes(image), owner, extents, objects)


def smoothed(image: Array) -> Array:
    """Apply a binomial blur of 3 x 3 pixels, against jagged edges."""
    for axis in (0, 1):
        image = 0.25 * (np.roll(image, 1, axis) + np.roll(image, -1, axis)) + 0.5 * image
    return image


def to_bytes(image: Array) -> Array:
    """Convert values in 0..1 to uint8."""
    return np.floor(np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _object(
    rng: np.random.Generator, kind: int, margin: float, turn: float, radius: tuple[float, float]
) -> ShapeObject:
    """Draw an object's position (centre `margin` pixels inside the image), angle (up to `turn` degrees) and size."""
    x, y = (between(rng, margin, SIZE - 1 - margin) for _ in range(2))
    low, high = radius
    return ShapeObject(kind, x, y, low * (high / low) ** rng.random(), float(np.radians(between(rng, -turn, turn))))


def any_kind(rng: np.random.Generator) -> int:
    """Draw a class id."""
    return 1 + int(rng.random() * len(_SHAPES))


def segmentation_scene(part: str, index: int) -> Scene:
    """Return scene `index` of "train" or "val": three to five objects, the topmost of class 1 + index % 8."""
    rng = generator(part, index)
    kinds = [any_kind(rng) for _ in range(2 + int(rng.random() * 3))] + [1 + index % len(_SHAPES)]
    return draw_objects(rng, [_object(rng, kind, 35, 20, (40, 76)) for kind in kinds])


def pair_scene(index: int) -> tuple[Scene, int]:
    """Return image `index` of the pairs, and the index in `objects` of its main object, of class 1 + index % 8."""
    rng = generator("test", index)
    kind = index % len(_SHAPES)
    main = _object(rng, 1 + kind, 55, 35, (34, 76))
    other_kind = 1 + (kind + 1 + int(rng.random() * (len(_SHAPES) - 1))) % len(_SHAPES)  # another class
    other = _object(rng, other_kind, 40, 35, (24, 40))
    order = [[main], [other, main], [main, other]][int(rng.random() * 3)]
    return draw_objects(rng, order), order.index(main)


def _describe(scene: Scene, main: int) -> dict[str, Any]:
    """Return box, visible keypoints, truncation and occlusion of the main object of a scene."""
    item, extent = scene.objects[main], scene.extents[main]
    ys, xs = np.nonzero(extent)
    visible = scene.owner == main + 1
    points = {
        name: (round(x, 2), round(y, 2))
        for name, (x, y) in item.points().items()
        if 0 <= round(x) < SIZE and 0 <= round(y) < SIZE and visible[round(y), round(x)]
    }
    on_border = extent[[0, -1]].any() or extent[:, [0, -1]].any()
    return {
        "category": _SHAPES[item.kind - 1].name,
        "box": [int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())],
        "points": points,
        "turn": float(np.degrees(item.turn)),
        "truncated": int(on_border),
        "occluded": int(visible.sum() < 0.97 * extent.sum()),
    }


def _level(value: float, medium: float, hard: float) -> int:
    return int(value >= medium) + int(value >= hard)


def _pair(name: str, names: tuple[str, str], source: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """Return a pair annotation with the keys of SPair-71k."""
    common = [point for point in source["points"] if point in target["points"]]
    areas = sorted((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (source["box"], target["box"]))
    return {
        "filename": name,
        "src_imname": names[0],
        "trg_imname": names[1],
        "src_kps": [source["points"][point] for point in common],
        "trg_kps": [target["points"][point] for point in common],
        "kps_ids": common,
        "src_bndbox": source["box"],
        "trg_bndbox": target["box"],
        "category": source["category"],
        "viewpoint_variation": _level(abs(source["turn"] - target["turn"]), 15, 35),
        "scale_variation": _level(areas[1] / areas[0], 1.6, 2.6),
        "truncation": source["truncated"] + 2 * target["truncated"],
        "occlusion": source["occluded"] + 2 * target["occluded"],
    }


def _choose_pairs(facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return PAIRS ordered pairs within a class with at least three common points, equally many per class."""
    rng = generator("test", PAIR_IMAGES)
    pairs = []
    for kind in range(len(_SHAPES)):
        members = range(kind, PAIR_IMAGES, len(_SHAPES))
        able = [
            (a, b)
            for a, b in itertools.permutations(members, 2)
            if len(facts[a]["points"].keys() & facts[b]["points"].keys()) >= 3
        ]
        order = np.argsort(rng.random(len(able)), kind="stable")[: PAIRS // len(_SHAPES)]
        for a, b in (able[i] for i in sorted(order)):
            names = (f"{a:03d}", f"{b:03d}")
            pairs.append(_pair(f"{names[0]}-{names[1]}:{facts[a]['category']}", names, facts[a], facts[b]))
    return pairs


def generate(folder: Path) -> None:
    """Write both data sets and `manifest.json` (sha256 by file) into an empty folder, in about five seconds."""
    for part, count in (("train", TRAIN), ("val", VAL)):
        (folder / part / "images").mkdir(parents=True)
        (folder / part / "masks").mkdir()
        for index in range(count):
            scene = segmentation_scene(part, index)
            Image.fromarray(scene.image).save(folder / part / "images" / f"{index:03d}.ppm")
            Image.fromarray(scene.mask()).save(folder / part / "masks" / f"{index:03d}.pgm")
        (folder / f"{part}.txt").write_text("".join(f"{index:03d}\n" for index in range(count)))
    facts = []
    for index in range(PAIR_IMAGES):
        scene, main = pair_scene(index)
        facts.append(_describe(scene, main))
        path = folder / "test" / facts[-1]["category"] / f"{index:03d}.ppm"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.image).save(path)
    (folder / "test.json").write_text(json.dumps(_choose_pairs(facts)))
    write_manifest(folder)


def shapes_folder() -> Path:
    """Return the folder of the generated files, see `generated_folder`."""
    return generated_folder(f"shapes-{VERSION}", generate)


class Shapes(SegmentationFolder):
    """Scenes of 3 to 5 shapes, 224x224, 8 classes and background, 160 train and 80 val. Object borders are void."""

    name = "shapes"
    version = VERSION
    needs_root = False
    splits = ("train", "val")
    expected = {"train": TRAIN, "val": VAL}
    citation = "generated by neco-bench"
    layout = "  made in the cache folder (NECO_BENCH_CACHE) at first use"
    classes = ("background", *(shape.name for shape in _SHAPES))

    def __init__(self, folder: None, split: str) -> None:
        self.folder = shapes_folder()
        self.split = split
        self.list_file = self.folder / f"{split}.txt"
        self.ids = read_list(type(self), self.list_file)

    def files(self, item: str) -> tuple[Path, Path]:
        """Return the image file and the mask file of an item."""
        part = self.folder / self.split
        return part / "images" / f"{item}.ppm", part / "masks" / f"{item}.pgm"

    @property
    def palette(self) -> np.ndarray:
        """Return the colours of the classes, (C, 3) uint8."""
        hues = [colorsys.hsv_to_rgb(i / len(_SHAPES), 0.8, 0.95) for i in range(len(_SHAPES))]
        return np.rint(255 * np.array([(0, 0, 0), *hues])).astype(np.uint8)


class ShapesPairs(PairFolder):
    """200 ordered pairs of 64 images, 25 per class, with 3 to 6 common visible keypoints.

    Attributes: viewpoint_variation 0/1/2 from the angle between the objects (15, 35 degrees), scale_variation 0/1/2
    from the ratio of box areas (1.6, 2.6), truncation and occlusion 0 none, 1 source, 2 target, 3 both.
    """

    name = "shapes_pairs"
    version = VERSION
    needs_root = False
    splits = ("test",)
    expected = {"test": PAIRS}
    citation = "generated by neco-bench"
    layout = Shapes.layout

    def __init__(self, folder: None, split: str) -> None:
        self.folder = shapes_folder()
        self.split = split
        raw = json.loads((self.folder / f"{split}.json").read_bytes())
        self.pairs = tuple(parse_pair(item["filename"], item) for item in raw)
        self.ids = tuple(pair.id for pair in self.pairs)

    def image_file(self, image_id: str) -> Path:
        """Return the path of an image."""
        return self.folder / self.split / f"{image_id}.ppm"
