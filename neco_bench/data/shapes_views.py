"""The embedded data set of views: textured objects made of ellipsoids, rendered from several sides, known geometry.

It is generated at first use in the cache folder, `shapes_views-<version>/`. An object is a union of ellipsoids, about
20 cm wide, with a texture in its volume, so that a point looks the same from all sides. Each view has a different
background and light. Ray intersections have a closed form, so depth and pose are exact except for rounding.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from neco_bench.data.folder import file_digest
from neco_bench.data.generated import generated_folder, write_manifest
from neco_bench.data.io import read_image
from neco_bench.data.shapes import SIZE, Shapes, background, between, generator, smoothed, to_bytes, two_colours
from neco_bench.data.views import Camera, DepthView, ViewDataset, draw_pairs

VERSION = "1"

OBJECTS, VIEWS = 24, 5

LUMPS = 5  # ellipsoids per object

UNIT = 1e-4  # metres per unit of the depth files


class Lumps:
    """An object in its own frame, in metres: ellipsoids and the texture of their volume."""

    def __init__(self, index: int) -> None:
        rng = generator("views", index)
        self.middles = np.stack([_on_sphere(rng) * between(rng, 0.02, 0.055) for _ in range(LUMPS)])
        self.axes = np.stack([[between(rng, 0.02, 0.055) for _ in range(3)] for _ in range(LUMPS)])
        self.turns = np.stack([_turn(_on_sphere(rng), between(rng, 0, np.pi)) for _ in range(LUMPS)])
        self.colours = np.stack([two_colours(rng, rng.random()) for _ in range(2)]).reshape(4, 3)
        self.noise = [rng.random((cells, cells, cells)) for cells in (7, 13, 26)]

    def hit(self, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return distances along rays (N, 3) from a point to the surface (infinite if missed), and normals (N, 3)."""
        nearest, normals = np.full(len(rays), np.inf), np.zeros(rays.shape)
        for middle, axes, turn in zip(self.middles, self.axes, self.turns, strict=True):
            start, ray = turn @ (origin - middle) / axes, rays @ turn.T / axes  # the ellipsoid is a unit sphere there
            a, b, c = (ray**2).sum(1), ray @ start, start @ start - 1
            under = b**2 - a * c
            distance = np.where(under > 0, (-b - np.sqrt(np.maximum(under, 0))) / a, np.inf)
            closer = (distance > 0) & (distance < nearest)
            point = start + distance[closer, None] * ray[closer]
            nearest[closer] = distance[closer]
            normals[closer] = (point / axes) @ turn
        return nearest, normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)

    def texture(self, points: np.ndarray) -> np.ndarray:
        """Return colours (N, 3) in 0..1 of points (N, 3) of the surface."""
        large, middle, small = (_sampled(grid, points / 0.24 + 0.5) for grid in self.noise)
        first = np.clip((large + 0.6 * middle - 0.8) * 5 + 0.5, 0, 1)[:, None]
        second = np.clip((middle + 0.8 * small - 0.9) * 5 + 0.5, 0, 1)[:, None]
        base = self.colours[0] + (self.colours[2] - self.colours[0]) * first
        spots = self.colours[1] + (self.colours[3] - self.colours[1]) * first
        return base + (spots - base) * second


def _on_sphere(rng: np.random.Generator) -> np.ndarray:
    """Draw a uniformly distributed direction."""
    z, angle = between(rng, -1, 1), between(rng, 0, 2 * np.pi)
    flat = np.sqrt(1 - z * z)
    return np.array([flat * np.cos(angle), flat * np.sin(angle), z])


def _turn(axis: np.ndarray, angle: float) -> np.ndarray:
    """Return the rotation (3, 3) about an axis of length 1 (Rodrigues)."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)


def _sampled(grid: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return linearly interpolated values (N,) of a grid of noise at points (N, 3) in the unit cube."""
    at = np.clip(places, 0, 1) * (len(grid) - 1.001)
    low = at.astype(int)
    part = at - low
    total = np.zeros(len(places))
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(corner, part, 1 - part).prod(1)
        total += weight * grid[tuple((low + corner).T)]
    return total


def object_cameras(index: int) -> list[Camera]:
    """Return the cameras of an object: rotated about it by 5 to 80 degrees in all directions from one side."""
    rng = generator("view looks", index)
    first = _turn(_on_sphere(rng), between(rng, 0, np.pi))
    cameras = []
    for _ in range(VIEWS):
        turned = _turn(_on_sphere(rng), np.radians(between(rng, 5, 80))) @ first
        # The object is about 0.45 m away, up to 2 cm off the axis of the camera.
        place = np.array([between(rng, -0.02, 0.02), between(rng, -0.02, 0.02), 0.45 * between(rng, 0.9, 1.15)])
        cameras.append(Camera(turned, place, focal=420.0))
    return cameras


def render(shape: Lumps, camera: Camera, rng: np.random.Generator) -> DepthView:
    """Render an object with a random background and light."""
    side = np.arange(SIZE) + 0.5 - SIZE / 2
    x, y = np.meshgrid(side / camera.focal, side / camera.focal)
    rays = np.stack([x, y, np.ones_like(x)], axis=-1).reshape(-1, 3)  # z is 1, so depth is the factor along a ray
    origin = -camera.rotation.T @ camera.translation
    depth, normals = shape.hit(origin, rays @ camera.rotation)
    seen = np.isfinite(depth)
    points = origin + depth[seen, None] * (rays[seen] @ camera.rotation)
    flat = background(rng).reshape(-1, 3)
    light = camera.rotation.T @ np.array([between(rng, -0.6, 0.6), between(rng, -0.9, 0.1), -1.0])
    shade = 0.45 + 0.6 * np.clip(normals[seen] @ (light / np.linalg.norm(light)), 0, 1)
    tint = np.array([between(rng, 0.9, 1.1) for _ in range(3)])
    flat[seen] = shape.texture(points) * shade[:, None]
    image = smoothed(flat.reshape(SIZE, SIZE, 3))
    image = image * between(rng, 0.8, 1.1) * tint + 0.05 * (rng.random((SIZE, SIZE, 1)) - 0.5)
    return DepthView(to_bytes(image), np.where(seen, depth, 0).reshape(SIZE, SIZE).astype(np.float32), camera)


def generate(folder: Path) -> None:
    """Write all views, `cameras.json` and `manifest.json` into an empty folder, in about five seconds."""
    facts = {}
    for index in range(OBJECTS):
        shape, name = Lumps(index), f"{index:02d}"
        (folder / name).mkdir()
        cameras = object_cameras(index)
        for number, camera in enumerate(cameras):
            view = render(shape, camera, generator("view scenes", VIEWS * index + number))
            Image.fromarray(view.image).save(folder / name / f"{number}.ppm")
            steps = np.floor(view.depth / UNIT + 0.5).astype(np.uint16)
            np.save(folder / name / f"{number}.npy", steps)
        facts[name] = [(camera.rotation.tolist(), camera.translation.tolist(), camera.focal) for camera in cameras]
    (folder / "cameras.json").write_text(json.dumps(facts))
    write_manifest(folder)


class ShapesViews(ViewDataset):
    """Pairs of 120 views of 24 objects, 224x224, cameras at most 120 degrees apart; every view is a source."""

    name = "shapes_views"
    version = VERSION
    needs_root = False
    splits = ("test",)
    expected = {"test": OBJECTS * VIEWS}
    citation = "generated by neco-bench"
    layout = Shapes.layout

    def __init__(self, folder: None, split: str) -> None:
        self.folder = generated_folder(f"shapes_views-{VERSION}", generate)
        self.split = split
        raw = json.loads((self.folder / "cameras.json").read_bytes())
        self._cameras = {
            name: {
                str(number): Camera(np.array(rotation), np.array(translation), focal)
                for number, (rotation, translation, focal) in enumerate(cameras)
            }
            for name, cameras in raw.items()
        }
        self.pairs = tuple(draw_pairs(self._cameras, 1, 0))
        self.ids = tuple(pair.id for pair in self.pairs)

    def read_view(self, view_id: str) -> DepthView:
        """Read a view. Raises MissingError and BadInputError."""
        name, _, number = view_id.partition("/")
        depth = np.load(self.folder / name / f"{number}.npy").astype(np.float32) * np.float32(UNIT)
        return DepthView(read_image(self.folder / name / f"{number}.ppm"), depth, self._cameras[name][number])

    def fingerprint(self) -> str:
        """Return the sha256 over name, reader version, split, pairs, and names and sizes of the files."""
        files = [self.folder / f"{view}{ending}" for view in self.image_ids for ending in (".ppm", ".npy")]
        return file_digest((self.name, self.version, self.split, *self.ids), self.folder, files)
