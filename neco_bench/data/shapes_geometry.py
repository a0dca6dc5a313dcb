"""Embedded scenes of known geometry: depth and surface normals of rendered rooms with balls, boxes and columns.

They are generated at first use in the cache folder, `shapes_geometry-<version>/`, by the rules of `shapes.py`: an image
depends only on (version, part, index), only `Generator.random` of PCG64 and numpy in float64 are used, and files are
uncompressed. A pinhole camera (224 x 224, 53 degrees) sees a floor, a wall and three to five objects on the floor.
Cues for depth are the position on the floor and the scale of the texture; cues for normals are the shading by a light
from the upper left and the slant of the texture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from neco_bench.data.dense import DenseDataset, read_depth, read_normals
from neco_bench.data.folder import read_list
from neco_bench.data.generated import generated_folder, write_manifest
from neco_bench.data.shapes import SIZE, TRAIN, VAL, Shapes, between, to_bytes, two_colours

VERSION = "1"

FOCAL = 224.0  # pixels

Array = np.ndarray

# A direction (x, y, z), and a surface: its depth (S, S), infinite where rays miss it, and a function from points (N, 3)
# on it to normals (N, 3) and surface coordinates (N, 2) in metres.
Vector = tuple[float, float, float]
Surface = tuple[Array, Callable[[Array], tuple[Array, Array]]]

_UP: Vector = (0.0, -1.0, 0.0)

# x (1, S) and y (S, 1) of the rays through the centres of pixels; their z is 1.
_X = (np.arange(SIZE) - (SIZE - 1) / 2)[None] / FOCAL
_Y = _X.T


@dataclass(frozen=True)
class GeometryScene:
    """image: (S, S, 3) uint8. depth: (S, S) metres along the axis of the camera. normals: (S, S, 3), x right, y down,
    z away from the camera, of length 1."""

    image: Array
    depth: Array
    normals: Array


def _along(direction: Vector) -> Array:
    """Return products of all rays with a direction; (1, S) for horizontal directions, because all rows are equal."""
    x, y, z = direction
    return x * _X + z if y == 0 else x * _X + y * _Y + z


def _plane(normal: Vector, point: Array, across: Vector, along: Vector, reach: float, height: float) -> Surface:
    """Return a rectangle around `point`; across, along: directions of its sides; reach, height: half their lengths."""
    slope = _along(normal)
    depth = np.where(slope < -1e-9, (point @ normal) / np.minimum(slope, -1e-9), np.inf)
    depth = np.broadcast_to(depth, (SIZE, SIZE))
    if np.isfinite(reach):
        with np.errstate(invalid="ignore"):  # of infinite depths
            inside = np.abs(depth * _along(across) - point @ across) <= reach
            inside &= np.abs(depth * _along(along) - point @ along) <= height
        depth = np.where(inside, depth, np.inf)

    def at(points: Array) -> tuple[Array, Array]:
        return np.broadcast_to(normal, points.shape), np.stack([points @ across, points @ along], 1)

    return depth, at


def _ball(centre: Array, radius: float) -> Surface:
    a, b, c = _X**2 + _Y**2 + 1, _along(tuple(centre)), centre @ centre - radius**2
    inside = b**2 - a * c
    depth = np.where(inside > 0, (b - np.sqrt(np.maximum(inside, 0))) / a, np.inf)

    def at(points: Array) -> tuple[Array, Array]:
        normals = (points - centre) / radius
        turn = np.arctan2(normals[:, 0], -normals[:, 2])
        return normals, radius * np.stack([turn, np.arcsin(np.clip(normals[:, 1], -1, 1))], 1)

    return depth, at


def _column(foot: Array, radius: float, height: float) -> list[Surface]:
    """Return a cylinder standing on `foot`, with a flat top."""
    a, b, c = _X**2 + 1, foot[0] * _X + foot[2], foot[0] ** 2 + foot[2] ** 2 - radius**2
    inside = b**2 - a * c
    side = np.where(inside > 0, (b - np.sqrt(np.maximum(inside, 0))) / a, 0) * np.ones((SIZE, 1))
    level = side * _Y
    side = np.where((side > 0) & (level <= foot[1]) & (level >= foot[1] - height), side, np.inf)
    top, _ = _plane(_UP, foot + height * np.array(_UP), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), radius, radius)
    top = np.where(np.isfinite(top), top, 0)
    on_top = (top > 0) & (np.hypot(top * _X - foot[0], top - foot[2]) <= radius)

    def at(points: Array) -> tuple[Array, Array]:
        normals = (points - foot) / radius * np.array([1, 0, 1])
        return normals, np.stack([radius * np.arctan2(normals[:, 0], -normals[:, 2]), points[:, 1]], 1)

    def at_top(points: Array) -> tuple[Array, Array]:
        return np.broadcast_to(_UP, points.shape), points[:, ::2]

    return [(side, at), (np.where(on_top, top, np.inf), at_top)]


def _box(foot: Array, half: tuple[float, float], height: float, turn: float) -> list[Surface]:
    """Return a box standing on `foot`, rotated about the vertical; half: half its width and half its length."""
    first, second = (np.cos(turn), 0.0, np.sin(turn)), (-np.sin(turn), 0.0, np.cos(turn))
    up = np.array(_UP)
    surfaces = [_plane(_UP, foot + height * up, first, second, *half)]
    for axis, other, reach, width in ((first, second, *half), (second, first, *half[::-1])):
        for sign in (-1.0, 1.0):
            normal = (sign * axis[0], 0.0, sign * axis[2])
            middle = foot + reach * np.array(normal) + height / 2 * up
            surfaces.append(_plane(normal, middle, other, _UP, width, height / 2))
    return surfaces


def _paint(rng: np.random.Generator) -> Callable[[Array], Array]:
    """Draw checks or stripes of 0.25 to 0.5 m in two colours: a function from (N, 2) metres to (N, 3) in 0..1."""
    light, dark = two_colours(rng, rng.random())
    turn, waves = between(rng, 0, np.pi), 2 * np.pi / between(rng, 0.25, 0.5)
    checks = rng.random() < 0.5

    def colours(place: Array) -> Array:
        u = (place[:, 0] * np.cos(turn) + place[:, 1] * np.sin(turn)) * waves
        v = (place[:, 1] * np.cos(turn) - place[:, 0] * np.sin(turn)) * waves
        tone = np.sin(u) * np.sin(v) if checks else np.sin(u)
        painted: Array = dark + (light - dark) * np.clip(0.5 + 1.2 * tone, 0, 1)[:, None]
        return painted

    return colours


def _things(rng: np.random.Generator, far: float, ground: float) -> list[list[Surface]]:
    """Draw three to five balls, columns and boxes on the floor; return the surfaces of each."""
    things = []
    for _ in range(3 + int(rng.random() * 3)):
        z = between(rng, 1.6, 0.75 * far)
        foot = np.array([between(rng, -0.42, 0.42) * z, ground, z])
        size, kind = between(rng, 0.2, 0.5), int(rng.random() * 3)
        height, turn, slim = between(rng, 0.4, 1.3), between(rng, 0, np.pi), between(rng, 0.5, 1)
        if kind == 0:
            things.append([_ball(foot + size * np.array(_UP), size)])
        elif kind == 1:
            things.append(_column(foot, 0.7 * size, height))
        else:
            things.append(_box(foot, (0.8 * size, 0.8 * size * slim), height, turn))
    return things


def geometry_scene(part: str, index: int) -> GeometryScene:
    """Return scene `index` of "train" or "val"."""
    rng = np.random.Generator(np.random.PCG64([int(VERSION), ("train", "val").index(part), index, SIZE]))
    ground, far, yaw = between(rng, 1.1, 1.3), between(rng, 4, 8), np.radians(between(rng, -30, 30))
    floor = _plane(_UP, np.array([0, ground, 0]), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), np.inf, np.inf)
    facing, across = (-np.sin(yaw), 0.0, -np.cos(yaw)), (np.cos(yaw), 0.0, -np.sin(yaw))
    wall = _plane(facing, np.array([0, 0, far]), across, _UP, np.inf, np.inf)
    things = [[floor], [wall], *_things(rng, far, ground)]
    paints = [_paint(rng) for _ in things]
    surfaces = [(surface, paint) for thing, paint in zip(things, paints, strict=True) for surface in thing]
    depth: Array = np.full(SIZE**2, np.inf)
    owner = np.zeros(SIZE**2, np.uint8)
    for number, ((hit, _), _) in enumerate(surfaces):
        nearer = np.flatnonzero(hit.ravel() < depth)
        depth[nearer], owner[nearer] = hit.ravel()[nearer], number
    image: Array = np.empty((SIZE**2, 3))
    normals: Array = np.empty((SIZE**2, 3))
    points = np.stack([*np.broadcast_arrays(_X, _Y), np.ones((SIZE, SIZE))], 2).reshape(-1, 3) * depth[:, None]
    for number, ((_, at), paint) in enumerate(surfaces):
        own = np.flatnonzero(owner == number)
        normals[own], place = at(points[own])
        image[own] = paint(place)
    depth, normals, image = (array.reshape(SIZE, SIZE, *array.shape[1:]) for array in (depth, normals, image))
    light = np.array([-0.5, -0.7, -0.5]) / np.sqrt(0.99)  # direction towards it: left, up and to the camera
    image = image * (0.35 + 0.65 * np.maximum(normals @ light, 0))[..., None]
    image = image * between(rng, 0.85, 1.15) + 0.04 * (rng.random((SIZE, SIZE, 1)) - 0.5)
    return GeometryScene(to_bytes(image), depth, normals)


def generate(folder: Path) -> None:
    """Write all scenes and `manifest.json` into an empty folder."""
    for part, count in (("train", TRAIN), ("val", VAL)):
        for kind in ("images", "depth", "normals"):
            (folder / part / kind).mkdir(parents=True)
        for index in range(count):
            scene = geometry_scene(part, index)
            millimetres = np.floor(scene.depth * 1000 + 0.5).astype(np.int32)  # Pillow writes it with 16 bits
            normals = np.floor((scene.normals + 1) * 127.5 + 0.5).astype(np.uint8)
            for kind, array, ending in (
                ("images", scene.image, "ppm"),
                ("depth", millimetres, "pgm"),
                ("normals", normals, "ppm"),
            ):
                Image.fromarray(array).save(folder / part / kind / f"{index:03d}.{ending}")
        (folder / f"{part}.txt").write_text("".join(f"{index:03d}\n" for index in range(count)))
    write_manifest(folder)


class ShapesDepth(DenseDataset):
    """Rendered rooms, 224x224, 160 train and 80 val, with depth in metres at each pixel."""

    name = "shapes_depth"
    kind = "depth"
    version = VERSION
    needs_root = False
    splits = ("train", "val")
    expected: ClassVar[dict[str, int]] = {"train": TRAIN, "val": VAL}
    images_from = "shapes_geometry"
    citation = "generated by neco-bench"
    layout = Shapes.layout
    image_sizes = ((SIZE, SIZE),)
    likely_median = (1.0, 8.0)
    file_unit = "millimetres"

    def __init__(self, folder: None, split: str) -> None:
        self.folder = generated_folder(f"shapes_geometry-{VERSION}", generate)
        self.split = split
        self.list_file = self.folder / f"{split}.txt"
        self.ids = read_list(type(self), self.list_file)

    def files(self, item: str) -> tuple[Path, ...]:
        """Return the paths of the image and of the files of its target."""
        part = self.folder / self.split
        return part / "images" / f"{item}.ppm", part / "depth" / f"{item}.pgm"

    def read_target(self, item: str, size: tuple[int, int]) -> np.ndarray:
        """Read the target of an item whose image has the size (H, W)."""
        return read_depth(self.files(item)[1], 1000, size)


class ShapesNormals(ShapesDepth):
    """The same rooms, with the surface normal at each pixel: x right, y down, z away from the camera."""

    name = "shapes_normals"
    kind = "normals"

    def files(self, item: str) -> tuple[Path, ...]:
        """Return the paths of the image and of the files of its target."""
        part = self.folder / self.split
        return part / "images" / f"{item}.ppm", part / "normals" / f"{item}.ppm"

    def read_target(self, item: str, size: tuple[int, int]) -> np.ndarray:
        """Read the target of an item whose image has the size (H, W)."""
        return read_normals(self.files(item)[1], size)
