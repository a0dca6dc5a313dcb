"""Geometric correspondence: brute force on small maps, known answers on generated views, the references' geometry."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from neco_bench.tasks.geometric_correspondence.geometry import (
    Prepared,
    features_at,
    prepare_exact,
    prepare_probe3d,
    probe3d_box,
    surface_points,
)
from neco_bench.tasks.geometric_correspondence.matching import match_points, moved, projected
from torch import Tensor

import neco_bench
from neco_bench.core.errors import BadInputError
from neco_bench.core.protocol import find_tasks
from neco_bench.data.load import DATASETS, load_dataset
from neco_bench.data.shapes_views import ShapesViews
from neco_bench.data.views import Camera, DepthView, ViewDataset, draw_pairs, rotation_matrix
from neco_bench.encoders import DenseFeatures, Encoder
from neco_bench.results.store import ResultStore
from neco_bench.runner.execute import run_job
from neco_bench.runner.job import plan_all
from neco_bench.runner.options import RunOptions

PROTOCOLS = ("clean-1", "probe3d-1")


def views() -> ViewDataset:
    dataset = load_dataset("shapes_views", "test")
    assert isinstance(dataset, ViewDataset)
    return dataset


def brute_force(source: np.ndarray, target: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The best matches by loops: exact distances of normalised features, the ratio test, one direction."""
    unit = [features / np.linalg.norm(features, axis=1, keepdims=True) for features in (source, target)]
    found = []
    for i, feature in enumerate(unit[0]):
        distances = [max(1e-9, 1 - float(feature @ other)) for other in unit[1]]
        order = sorted(range(len(distances)), key=lambda k: distances[k])
        found.append((1 - distances[order[0]] / distances[order[1]], i, order[0]))
    found.sort(key=lambda row: (-row[0], row[1]))
    return [(i, k) for _, i, k in found[:count]]


@pytest.mark.parametrize(("cells", "targets", "count"), [(30, 40, 12), (25, 3, 25), (7, 60, 50)])
def test_matches_are_those_of_brute_force(cells: int, targets: int, count: int) -> None:
    rng = np.random.default_rng(cells)
    source, target = rng.standard_normal((cells, 8)), rng.standard_normal((targets, 8))
    found = match_points(torch.from_numpy(source), torch.from_numpy(target), count)
    assert list(zip(found.source.tolist(), found.target.tolist(), strict=True)) == brute_force(source, target, count)


def test_a_single_target_is_no_error() -> None:
    found = match_points(torch.eye(3), torch.ones(1, 3), 2)
    assert (found.source.tolist(), found.target.tolist()) == ([0, 1], [0, 0])


def test_geometry_by_hand() -> None:
    """A quarter turn about the camera's axis and a step of 10 cm; 3 x 3 pixels at depth 2 with focal length 1."""
    points = surface_points(np.full((3, 3), 2.0), 1.0)
    assert points[0, 0].tolist() == [-2, -2, 2]
    assert points[1, 1].tolist() == [0, 0, 2]
    assert points[2, 1].tolist() == [0, 2, 2]
    first = Camera(np.eye(3), np.zeros(3), 1.0)
    turn = rotation_matrix((np.sqrt(0.5), 0, 0, np.sqrt(0.5)))
    assert turn == pytest.approx(np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]))
    second = Camera(turn, np.array([0.1, 0, 0]), 1.0)
    assert first.angle(second) == pytest.approx(90)
    assert moved(points[2, 1][None], first, second) == pytest.approx(np.array([[-1.9, 0, 2]]))
    assert moved(moved(points[0], first, second), second, first) == pytest.approx(points[0])
    assert projected(np.array([[1.0, 2.0, 4.0]]), 100).tolist() == [[25, 50]]


def test_the_crop_of_the_reference_by_hand() -> None:
    """The last row and column count as beyond the object; at the border the square is moved, and cut."""
    depth = np.zeros((20, 20))
    depth[5:12, 8:11] = 1  # first (5, 8), last (11, 10): 6 x 2
    assert probe3d_box("a", depth) == (slice(5, 11), slice(6, 12))
    depth = np.zeros((20, 20))
    depth[5:12, 0:3] = 1  # centred it would begin at column -2: it begins at max(0, 0 - 4)
    assert probe3d_box("a", depth) == (slice(5, 11), slice(0, 6))
    depth = np.zeros((20, 20))
    depth[5:12, 17:20] = 1  # would end at 21: begins at 17 - 4
    assert probe3d_box("a", depth) == (slice(5, 11), slice(13, 19))
    depth = np.zeros((20, 20))
    depth[14:20, 5:7] = 1
    depth[14, 0] = 1  # 5 x 6: centred it leaves the image; rows 13..19, columns 0..6
    assert probe3d_box("a", depth) == (slice(14, 20), slice(0, 6))
    with pytest.raises(BadInputError, match="no depth"):
        probe3d_box("a", np.zeros((20, 20)))


@pytest.mark.slow
@pytest.mark.parametrize("size", [96, 224])
def test_points_lie_where_the_pixels_are(size: int) -> None:
    """Each point projects back to its place in the crop: exactly for "exact", to the pixel for "probe3d"."""
    dataset = views()
    view = dataset.read_view(dataset.image_ids[7])
    for prepare, tolerance in ((prepare_exact, 1e-6), (prepare_probe3d, 2.5 / 100)):
        found = prepare("a", view, size, 16, (0.5, 0.5, 0.5), 48)
        assert found.image.shape[1] % 16 == 0
        offsets = projected(found.points, found.focal) / size
        shifts = found.places - offsets
        assert np.ptp(shifts, axis=0).max() < tolerance
        assert len(found.points) > 300
        assert ((found.places > 0) & (found.places < 1)).all()


def test_padding_is_half_on_each_side_and_not_in_positions() -> None:
    image = np.full((64, 64, 3), 255, np.uint8)
    depth = np.zeros((64, 64), np.float32)
    depth[10:31, 10:31] = 1
    view = DepthView(image, depth, Camera(np.eye(3), np.zeros(3), 50.0))
    found = prepare_probe3d("a", view, 64, 14, (0.25, 0.5, 0.75), 16)
    assert found.image.shape == (3, 70, 70)
    assert found.image[:, 0, 0].tolist() == pytest.approx([0.25, 0.5, 0.75])
    assert (found.image[:, 3:67, 3:67] == 1).all()
    assert found.focal == pytest.approx(50.0 * 64 / 20)
    assert found.places.min() == pytest.approx(0.5 / 16)


@pytest.mark.slow
def test_features_at_points() -> None:
    """Exact points sample bilinearly; the reference upsamples bicubically and reads the cell."""
    features = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    places = np.array([[0.125, 0.125], [0.25, 0.125]])
    prepared = Prepared(torch.zeros(3, 8, 8), np.zeros((2, 3)), places, np.array([0, 9]), 1.0, 8, views()._cameras)  # type: ignore[attr-defined]
    exact = features_at(features, prepared, 8, "exact")
    assert exact[0].tolist() == pytest.approx(features[:, 0, 0].tolist(), abs=1e-6)
    assert exact[1].tolist() == pytest.approx(((features[:, 0, 0] + features[:, 0, 1]) / 2).tolist(), abs=1e-6)
    large = F.interpolate(features[None], (8, 8), mode="bicubic")[0]
    assert torch.equal(features_at(features, prepared, 8, "probe3d"), torch.stack([large[:, 0, 0], large[:, 1, 1]]))


class Painted(ShapesViews):
    """Views with their answer as the image: the colour of a pixel is the place of its point on the object."""

    def read_view(self, view_id: str) -> DepthView:
        view = super().read_view(view_id)
        points = surface_points(view.depth.astype(np.float64), view.camera.focal).reshape(-1, 3)
        own = (points - view.camera.translation) @ view.camera.rotation
        colours = np.clip(np.rint(128 + own / 0.12 * 127), 0, 255).astype(np.uint8).reshape(*view.depth.shape, 3)
        return DepthView(np.where((view.depth > 0)[..., None], colours, np.uint8(0)), view.depth, view.camera)


class Oracle(Encoder):
    """The colour of each cell of 2 pixels, on a sphere so that the cosine is a distance."""

    name, weights_id = "oracle", "0"
    embed_dim, stride = 4, 2
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        small = F.avg_pool2d(images, 2)
        return DenseFeatures(torch.cat([small, 1.5 * torch.ones_like(small[:, :1])], 1), 2)


class Blind(Encoder):
    name, weights_id = "blind", "0"
    embed_dim, stride = 4, 16

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        return DenseFeatures(images.new_ones(len(images), 4, images.shape[2] // 16, images.shape[3] // 16), 16)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_known_answers(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle finds what both views show; what one of them hides it cannot. A blind encoder finds next to nothing."""
    blind = neco_bench.run(Blind(), f"shapes_views@{protocol}", limit=6, workers=0)
    assert blind.metrics["recall"] < 0.25
    monkeypatch.setattr(DATASETS, "load", lambda name: Painted)
    changes: dict[str, Any] = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]} if protocol == "probe3d-1" else {}
    found = neco_bench.run(Oracle(), f"shapes_views@{protocol}", limit=6, workers=0, changes=changes)
    assert found.metrics["recall"] > 0.9
    assert found.metrics["recall@1cm"] <= found.metrics["recall@2cm"] <= found.metrics["recall@5cm"]
    mean = np.mean([found.metrics[f"recall@{n}cm"] for n in (1, 2, 5)])
    assert found.metrics["recall"] == pytest.approx(mean)


def test_the_outcome_by_hand(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    (job,) = plan_all(["baseline_rgb"], find_tasks(["shapes_views"]), RunOptions(limit=7, workers=0), store)
    result = run_job(job, store)
    assert result.status == "ok", result.error
    arrays = store.statistics(result)
    assert result.n_images == 7
    assert set(arrays["weight"]) == {1}  # clean-1: pairs weigh equally
    assert result.metrics["recall"] == pytest.approx(arrays["score/recall"].mean())
    assert arrays["group"].tolist() == ["00"] * 5 + ["01"] * 2
    by_object = result.per_class["recall"]
    assert by_object == {
        "00": pytest.approx(arrays["score/recall"][:5].mean()),
        "01": pytest.approx(arrays["score/recall"][5:].mean()),
    }
    turned = result.per_class["recall@2cm by rotation"]
    for name, (low, high) in zip(turned, itertools.pairwise((0, 30, 60, 90, 120)), strict=True):
        own = (arrays["angle"] >= low) & (arrays["angle"] < high)
        assert turned[name] == (pytest.approx(arrays["score/recall@2cm"][own].mean()) if own.any() else None)


def test_pairs_hang_on_names_alone() -> None:
    """Another order of folders gives the same list; each source is every fourth name; angles are those of cameras."""
    rng = np.random.default_rng(0)
    cameras = {
        f"object{i}": {
            f"{k:03d}": Camera(rotation_matrix(rng.standard_normal(4).tolist()), np.zeros(3), 1.0) for k in range(9)
        }
        for i in range(3)
    }
    pairs = draw_pairs(cameras, 4, 8)
    mixed = {name: dict(reversed(list(cameras[name].items()))) for name in reversed(list(cameras))}
    assert draw_pairs(mixed, 4, 8) == pairs
    names = [f"{name}/{view}" for name in sorted(cameras) for view in sorted(cameras[name])]
    assert {pair.source_id for pair in pairs} <= set(names[::4])
    for pair in pairs:
        first, second = (cameras[pair.object][view.split("/")[1]] for view in (pair.source_id, pair.target_id))
        assert 0 < pair.angle <= 120
        assert pair.angle == pytest.approx(first.angle(second))
    assert draw_pairs(cameras, 4, 9) != pairs
    assert draw_pairs({"a": {"0": cameras["object0"]["000"]}}, 1, 0) == []
