"""Object discovery on images with known boxes: each step by hand or by loops, and against dense solvers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from neco_bench.tasks.object_discovery.discovery import Discovery, box_iou, lost, tokencut
from neco_bench.tasks.object_discovery.settings import Settings
from neco_bench.tasks.object_discovery.task import prepare, to_pixels
from scipy.linalg import eigh
from scipy.ndimage import label

import neco_bench
from neco_bench.core.errors import UsageError
from neco_bench.core.protocol import find_tasks
from neco_bench.core.task import Context
from neco_bench.data.base import BoxDataset
from neco_bench.encoders import DenseFeatures, Encoder, load_encoder
from neco_bench.results.store import ResultStore


class Colours(Encoder):
    """The colour of each cell of 16 pixels, less grey; the keys are the same."""

    name, weights_id = "colours", "0"
    embed_dim, stride, has_keys = 3, 16, True

    def _encode(self, images: torch.Tensor, *, final_norm: bool, attention: bool, keys: bool = False) -> DenseFeatures:
        cells = torch.nn.functional.avg_pool2d(images, 16)
        return DenseFeatures(cells, 16, keys=cells if keys else None)


class Rectangles(BoxDataset):
    """Grey images of 100 x 130 pixels with one orange rectangle each, whose sides are those of cells."""

    name, split, version = "rectangles", "test", "1"
    splits = ("test",)
    boxes_of = ((16, 32, 64, 80), (0, 0, 48, 48), (96, 64, 130, 100), (32, 16, 128, 48))

    def __init__(self) -> None:
        self.ids = tuple(map(str, range(len(self.boxes_of))))

    def boxes(self, image_id: str) -> np.ndarray:
        return np.array([self.boxes_of[int(image_id)]], np.float64)

    def read_image(self, image_id: str) -> np.ndarray:
        image = np.full((100, 130, 3), (110, 110, 140), np.uint8)
        x1, y1, x2, y2 = self.boxes_of[int(image_id)]
        image[y1:y2, x1:x2] = (200, 120, 40)
        return image

    def fingerprint(self) -> str:
        return "0"


@pytest.mark.parametrize("protocol", ["clean-1", "tokencut-1"])
def test_rectangles_are_discovered(protocol: str) -> None:
    """Sides are multiples of the cell; at the right and lower border the padding is cut off."""
    (task,) = find_tasks([f"shapes_discovery@{protocol}"], {"input_size": 130} if protocol == "clean-1" else None)
    context = Context(recorded_ids=frozenset("0123"))
    outcome = task.module.run(Colours(), {"test": Rectangles()}, task.settings(), context)
    assert outcome.metrics["CorLoc"] == 1
    if protocol == "tokencut-1":
        np.testing.assert_array_equal(outcome.statistics["box"], Rectangles.boxes_of)
        assert outcome.metrics["best_IoU"] == 1
    assert outcome.statistics["image_id"].tolist() == list("0123")
    np.testing.assert_array_equal(context.run.predictions["2"]["boxes"], [Rectangles.boxes_of[2]])


def test_lost_discovers_rectangles() -> None:
    """The patches of an object are less than half, so they have fewer similar ones than the ground has."""
    (task,) = find_tasks(["shapes_discovery@lost-1"])
    outcome = task.module.run(Colours(), {"test": Rectangles()}, task.settings(), Context())
    np.testing.assert_array_equal(outcome.statistics["box"], Rectangles.boxes_of)


def blobs(seed: int = 0) -> np.ndarray:
    """Features (6, 9, 11): ground, and two regions apart that are alike, the smaller one at the upper left."""
    rng = np.random.default_rng(seed)
    features = np.zeros((6, 9, 11))
    features[0] = 1
    for rows, columns in ((slice(1, 3), slice(1, 3)), (slice(4, 8), slice(5, 9))):
        features[:, rows, columns] = np.array([-0.5, 1, 0, 0, 0, 0])[:, None, None]
    return (features + rng.normal(size=features.shape) * 0.05).astype(np.float32)


def test_tokencut_is_the_dense_solution() -> None:
    features = blobs()
    rows = features.reshape(6, -1).T.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    weights = np.where(rows @ rows.T > 0.2, 1, 1e-5)
    degree = np.diag(weights.sum(1))
    vector = eigh(degree - weights, degree, subset_by_index=[1, 1])[1][:, 0]
    inside = vector > vector.mean()
    seed = np.abs(vector).argmax()
    inside = (inside if inside[seed] else ~inside).reshape(9, 11)
    found = tokencut(features, 0.2)
    assert inside[found.seed]
    assert np.abs(vector).reshape(9, 11)[found.seed] == pytest.approx(np.abs(vector).max(), rel=1e-6)
    components, count = label(inside)
    assert count == 2
    np.testing.assert_array_equal(found.region, components == components[found.seed])
    assert found.cells in ((1, 1, 3, 3), (4, 5, 8, 9))


def test_lost_by_loops() -> None:
    features = blobs(1)
    size, rows = (9, 11), features.reshape(6, -1).T
    count = len(rows)
    degree = [sum(float(rows[p] @ rows[q]) > 0 for q in range(count) if q != p) for p in range(count)]
    seed = min(range(count), key=lambda p: (degree[p], p))
    lowest = sorted(range(count), key=lambda p: (degree[p], p))[:10]
    voters = [q for q in lowest if float(rows[seed] @ rows[q]) > 0]
    votes = np.array([sum(float(rows[p] @ rows[q]) for q in voters) for p in range(count)])
    found = lost(features, 10)
    assert found.seed == divmod(seed, 11)
    components, _ = label(votes.reshape(size) > 0)
    np.testing.assert_array_equal(found.region, components == components[found.seed])
    np.testing.assert_array_equal(found.score, -np.array(degree).reshape(size))


def test_a_seed_outside_its_own_region_is_its_own_box() -> None:
    """The reference raises there. The seed's product with itself is not positive only where its features are 0."""
    features = np.ones((2, 3, 4), np.float32)
    features[:, 1, 2] = 0
    assert lost(features, 5).cells == (1, 2, 2, 3)


def test_components_have_four_neighbours() -> None:
    features = np.zeros((2, 4, 4), np.float32)
    features[0] = 1
    features[:, [0, 1], [0, 1]] = np.array([[0], [1]], np.float32)  # two cells that touch at a corner
    assert tokencut(features, 0.2).cells in ((0, 0, 1, 1), (1, 1, 2, 2))


def test_iou_by_counting_pixels() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        corners = np.sort(rng.integers(0, 12, (2, 2, 2)), axis=1)
        corners[:, 1] += 1
        one, other = (np.array([c[0, 0], c[0, 1], c[1, 0], c[1, 1]], float) for c in corners)
        masks = []
        for x1, y1, x2, y2 in (one, other):
            mask = np.zeros((14, 14), bool)
            mask[int(y1) : int(y2), int(x1) : int(x2)] = True
            masks.append(mask)
        expected = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
        assert box_iou(one, other[None])[0] == pytest.approx(expected)


@pytest.mark.parametrize(("right", "expected"), [(64.0, 1.0), (65.0, 0.0)])
def test_a_box_is_right_from_half_on(right: float, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object of (16, 32) to (right, 128) against the box (16, 32) to (64, 80): an IoU of 1/2 is enough."""
    monkeypatch.setattr(Rectangles, "boxes", lambda self, image_id: np.array([[16.0, 32.0, right, 128.0]]))
    (task,) = find_tasks(["shapes_discovery@tokencut-1"])
    data = Rectangles().head(1)
    outcome = task.module.run(Colours(), {"test": data}, task.settings(), Context())
    assert outcome.metrics["CorLoc"] == expected
    assert outcome.metrics["best_IoU"] == pytest.approx(48 * 48 / (96 * (right - 16)))


def test_only_reference_protocols_round_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rectangles, "boxes", lambda self, image_id: np.array([[15.6, 32.4, 64.4, 79.6]]))
    for protocol, expected in (("tokencut-1", 1.0), ("clean-1", 48 * 47.2 / (48.8 * 47.2 + 48 * 48 - 48 * 47.2))):
        (task,) = find_tasks([f"shapes_discovery@{protocol}"], {"image": "native"})
        outcome = task.module.run(Colours(), {"test": Rectangles().head(1)}, task.settings(), Context())
        assert outcome.metrics["best_IoU"] == pytest.approx(expected)


def test_native_images_are_padded_with_zeros_after_normalisation() -> None:
    (task,) = find_tasks(["shapes_discovery@tokencut-1"])
    settings, encoder = Settings(**task.constants), load_encoder("timm:vit_tiny_patch16_224?pretrained=false")
    image = np.random.default_rng(0).integers(0, 256, (50, 33, 3), np.uint8)
    padded, scale = prepare(image, encoder, settings)
    assert scale == (1, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (settings.mean, settings.std))
    normalised = (padded - mean) / std
    expected = torch.nn.functional.pad((torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std, (0, 15, 0, 14))
    torch.testing.assert_close(normalised, expected)
    assert not normalised[:, 50:].any()
    assert not normalised[:, :, 33:].any()


def test_boxes_go_back_to_the_image() -> None:
    """Resized: 100 x 130 pixels at a longer side of 65 are 48 x 64, so a pixel down is 100/48 and across 130/64."""
    (task,) = find_tasks(["shapes_discovery@clean-1"], {"input_size": 65})
    image, scale = prepare(np.zeros((100, 130, 3), np.uint8), Colours(), Settings(**task.constants))
    assert image.shape == (3, 48, 64)
    assert scale == (100 / 48, 130 / 64)
    nothing = np.zeros((3, 4))
    found = Discovery((1, 2, 3, 4), nothing > 0, nothing, (1, 2))
    np.testing.assert_allclose(to_pixels(found.cells, 16, scale, (100, 130, 3)), [65, 100 / 3, 130, 100])
    np.testing.assert_allclose(to_pixels(found.cells, 16, (1, 1), (45, 60)), [32, 16, 60, 45])  # the padding is cut off


def test_what_an_encoder_must_give() -> None:
    with pytest.raises(UsageError, match=r"'baseline_rgb' does not return\. Use @clean-1"):
        neco_bench.run("baseline_rgb", "shapes_discovery@tokencut-1", limit=2)
    encoder = Colours()
    encoder.only_size = 224
    with pytest.raises(UsageError, match="224x224 only"):
        neco_bench.run(encoder, "shapes_discovery", limit=2)


def test_images_without_an_object_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = find_tasks(["shapes_discovery@tokencut-1"])
    whole = Rectangles.boxes
    monkeypatch.setattr(Rectangles, "boxes", lambda s, i: np.zeros((0, 4)) if i == "1" else whole(s, i))
    context = Context()
    outcome = task.module.run(Colours(), {"test": Rectangles()}, task.settings(), context)
    assert outcome.n_images == 3
    assert outcome.statistics["image_id"].tolist() == list("023")
    assert context.run.notes["images_without_objects"] == 1
    monkeypatch.setattr(Rectangles, "boxes", lambda s, i: np.zeros((0, 4)))
    with pytest.raises(UsageError, match="None of the 4 images"):
        task.module.run(Colours(), {"test": Rectangles()}, task.settings(), Context())


@pytest.mark.slow
def test_the_result_follows_from_the_stored_boxes(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"input_size": 112}
    result = neco_bench.run("tiny_neco", "shapes_discovery", limit=8, workers=0, changes=changes, out=tmp_path)
    arrays = ResultStore(tmp_path).statistics(result)
    data = neco_bench.load_dataset("shapes_boxes", "val", limit=8)
    assert isinstance(data, BoxDataset)
    best = []
    for name, (x1, y1, x2, y2) in zip(arrays["image_id"], arrays["box"], strict=True):
        ious = []
        for bx1, by1, bx2, by2 in data.boxes(str(name)):
            overlap = max(0, min(x2, bx2) - max(x1, bx1)) * max(0, min(y2, by2) - max(y1, by1))
            ious.append(overlap / ((x2 - x1) * (y2 - y1) + (bx2 - bx1) * (by2 - by1) - overlap))
        best.append(max(ious))
    assert result.metrics["CorLoc"] == np.mean(np.array(best) >= 0.5)
    assert result.metrics["best_IoU"] == pytest.approx(np.mean(best))
    low, high = result.ci95["CorLoc"]
    assert low <= result.metrics["CorLoc"] <= high
    again = neco_bench.run("tiny_neco", "shapes_discovery", limit=8, workers=0, changes=changes, batch_size=3)
    assert again.metrics == result.metrics
    assert len(list(itertools.chain(arrays["score/CorLoc"]))) == result.n_images == 8
