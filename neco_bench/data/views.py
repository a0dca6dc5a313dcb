"""The interface of data sets of posed views: images with depth and camera, in pairs that show the same object."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from neco_bench.core.rng import item_rng
from neco_bench.data.base import Dataset

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Camera:
    """Pose and focal length of a view.

    rotation (3, 3), translation (3,): from the object's frame to the camera's (x right, y down, z away), metres.
    focal: in pixels of the image; the principal point is its centre.
    """

    rotation: np.ndarray
    translation: np.ndarray
    focal: float

    def angle(self, other: Camera) -> float:
        """Return the rotation between two cameras about the object, in degrees."""
        cosine = (np.trace(self.rotation @ other.rotation.T) - 1) / 2
        return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


@dataclass(frozen=True)
class DepthView:
    """image: (H, W, 3) uint8 RGB. depth: (H, W) float32 metres along the axis of the camera, 0 outside the object."""

    image: np.ndarray
    depth: np.ndarray
    camera: Camera


@dataclass(frozen=True)
class ViewPair:
    """Two views of one object. angle: degrees of the rotation between their cameras."""

    id: str
    source_id: str
    target_id: str
    object: str
    angle: float


class ViewDataset(Dataset):
    """A split of pairs of views. `pairs` lists them; views are read one by one by id. Objects are the sampling unit."""

    kind = "views"
    sampling_unit: ClassVar[str] = "object"
    pairs: Sequence[ViewPair]

    @property
    def image_ids(self) -> tuple[str, ...]:
        """Sorted ids of all views that some pair uses."""
        return tuple(sorted({i for pair in self.pairs for i in (pair.source_id, pair.target_id)}))

    @classmethod
    def group_of(cls, item: str) -> str | None:
        """Return the object of a pair, the first component of its id."""
        return item.partition("/")[0]

    def _part(self, indices: Sequence[int]) -> Self:
        part = super()._part(indices)
        part.pairs = tuple(self.pairs[i] for i in indices)
        return part

    @abc.abstractmethod
    def read_view(self, view_id: str) -> DepthView:
        """Read a view. Raises MissingError and BadInputError."""


def draw_pairs(cameras: Mapping[str, Mapping[str, Camera]], step: int, seed: int) -> list[ViewPair]:
    """Draw the pairs of a list, by a rule that depends only on names and not on the order of files.

    Objects, and the views of each, are sorted by name. Every `step`-th view in that order, over all objects, is the
    source of a pair. Its partner is drawn uniformly, by a separate generator (seed, object, source), from the other
    views of its object whose cameras are rotated relative to its own by more than 0 and at most 120 degrees (as in
    probe3d). Sources without such a view have no pair.

    Args:
        cameras: the camera of each view of each object, by names.
        step: 1 uses every view as a source.
        seed: seed of the draw.
    """
    views = [(object_name, view) for object_name in sorted(cameras) for view in sorted(cameras[object_name])]
    pairs = []
    for object_name, source in views[::step]:
        own = cameras[object_name]
        angles = {other: own[source].angle(own[other]) for other in sorted(own) if other != source}
        partners = [other for other, angle in angles.items() if 0 < angle <= 120]
        if partners:
            target = partners[int(item_rng(seed, "pair", object_name, source).integers(len(partners)))]
            pairs.append(
                ViewPair(
                    id=f"{object_name}/{source}-{target}",
                    source_id=f"{object_name}/{source}",
                    target_id=f"{object_name}/{target}",
                    object=object_name,
                    angle=angles[target],
                )
            )
    return pairs


def rotation_matrix(quaternion: Sequence[float]) -> np.ndarray:
    """Return the rotation matrix (3, 3) of a quaternion (w, x, y, z). Raises ValueError if it is 0 or not finite."""
    w, x, y, z = (float(part) for part in quaternion)
    length = w * w + x * x + y * y + z * z
    if not 0 < length < np.inf:
        raise ValueError(f"the quaternion {list(quaternion)} is not a rotation")
    s = 2 / length
    return np.array(
        [
            [1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)],
            [s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)],
            [s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)],
        ]
    )
