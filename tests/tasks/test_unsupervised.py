"""Unsupervised segmentation: each step against a computation of its own, by loops, scipy or scikit-learn."""

from __future__ import annotations

import builtins
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from neco_bench.tasks import normalised_cut
from neco_bench.tasks.clustering import PickedRows, kmeans, nearest
from neco_bench.tasks.normalised_cut import affinity, cut, second_eigenvector
from neco_bench.tasks.unsupervised_segmentation import communities as cd
from neco_bench.tasks.unsupervised_segmentation import foreground as fg
from scipy.linalg import eigh
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import jaccard_score

import neco_bench
from neco_bench.core.errors import UsageError
from neco_bench.core.protocol import find_tasks
from neco_bench.core.task import Context
from neco_bench.data.base import Sample
from neco_bench.data.shapes import Shapes
from neco_bench.encoders import DenseFeatures, Encoder
from neco_bench.features.attention import foreground, top_mass
from neco_bench.features.transforms import resize_nearest_torch
from neco_bench.results.store import ResultStore
from neco_bench.search.row_file import RowFile


def test_top_mass_by_hand() -> None:
    """Of 0.1, 0.2, 0.3, 0.4 the top 65 % are those after which, from below, more than 35 % is reached: from 0.3 on."""
    attention = torch.tensor([[0.4, 0.1], [0.2, 0.3]])
    assert top_mass(attention, 0.65).tolist() == [[True, False], [False, True]]
    assert top_mass(10 * attention, 0.65).tolist() == [[True, False], [False, True]]  # need not sum to one
    assert top_mass(attention, 0.75).tolist() == [[True, False], [True, True]]
    assert top_mass(attention.expand(2, 3, 2, 2), 0.39).sum().item() == 6  # each map alone


def test_attention_foreground_step_by_step() -> None:
    """Mean of heads, blur by hand with mirrored borders, mass by a loop, small regions by flooding."""
    attention = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(0)) ** 4
    kernel = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 0.6**2))
    kernel /= kernel.sum()
    padded = np.pad(attention.mean(1)[0].double().numpy(), 3, mode="reflect")
    blurred = np.zeros((6, 7))
    for y, x in itertools.product(range(6), range(7)):
        blurred[y, x] = (padded[y : y + 7, x : x + 7] * kernel[:, None] * kernel).sum()
    inside, total = np.zeros((6, 7), bool), 0.0
    for place in sorted(np.ndindex(6, 7), key=lambda at: blurred[at]):
        total += blurred[place] / blurred.sum()
        inside[place] = total > 1 - 0.4
    everywhere = {(y, x) for y, x in np.argwhere(inside).tolist()}
    for start in everywhere:
        region, added = {start}, {start}
        while added:
            near = {(y + dy, x + dx) for y, x in region for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
            added = (near & everywhere) - region
            region |= added
        if len(region) <= 2:
            inside[start] = False
    (mask,) = foreground(attention, 0.4)
    np.testing.assert_array_equal(mask.numpy(), inside)
    assert 3 <= inside.sum() < 20


def test_precisions_by_a_loop_over_pixels() -> None:
    rng = np.random.default_rng(0)
    clusters, noisy = rng.integers(0, 5, (7, 16)), rng.random((7, 16)) < 0.4
    clusters[clusters == 3] = 4  # 3 is in no image
    cells = resize_nearest_torch(np.arange(16).reshape(4, 4), 10, 10)  # patches of 2 to 3 pixels a side
    values = fg.precisions(clusters, noisy, np.bincount(cells.ravel(), minlength=16), 5)
    for cluster in range(5):
        shares = []
        for own, inside in zip(clusters, noisy, strict=True):
            large, attended = own[cells], inside[cells]
            if (large == cluster).any():
                shares.append((attended & (large == cluster)).sum() / (large == cluster).sum())
        assert values[cluster] == (pytest.approx(np.mean(shares)) if shares else pytest.approx(np.nan, nan_ok=True))


def test_the_best_threshold_by_trying_every_split() -> None:
    rng = np.random.default_rng(1)
    count = 40
    precision = rng.permutation(np.linspace(0, 1, count))
    images = rng.integers(0, count, (9, 12, 12))
    truths = (precision[images] + rng.normal(size=images.shape) * 0.2) > 0.62
    areas = [
        (np.bincount(own.ravel(), minlength=count), np.bincount(own[truth], minlength=count))
        for own, truth in zip(images, truths, strict=True)
    ]
    scores = {}
    for start in range(22, 30):  # 55 % to 75 % of 40
        kept = np.argsort(precision)[start:]
        predicted = np.isin(images, kept)
        ious = [jaccard_score(t.ravel(), p.ravel()) for t, p in zip(truths, predicted, strict=True)]
        scores[np.sort(precision)[start]] = np.mean(ious)
    best = max(scores, key=lambda value: scores[value])
    assert fg.best_threshold(precision, areas) == pytest.approx(round(best / 0.05) * 0.05)
    assert fg.best_threshold(np.full(count, np.nan), areas) == 0  # absent clusters rank lowest


def test_otsu_by_trying_every_split() -> None:
    values = np.array([0.1, 0.15, 0.2, np.nan, 0.22, 0.6, 0.7, 0.75])
    known = np.sort(values[~np.isnan(values)])
    within = {known[i]: known[:i].var() * i + known[i:].var() * (len(known) - i) for i in range(1, len(known))}
    assert fg.otsu(values) == min(within, key=lambda value: within[value]) == 0.6


@pytest.mark.parametrize(("angles", "reach"), [("reference", (1, 2)), ("even", (1,))])
def test_co_occurrence_by_a_naive_loop(angles: Any, reach: tuple[int, ...]) -> None:
    """Pairs of cells at each distance and angle, rounded to cells; the slip is 4/3 pi in place of 5/4 pi."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 6, (9, 7)), rng.integers(2, 5, (9, 7)), np.zeros((9, 7), int)]
    directions = [0, 1 / 4, 1 / 2, 3 / 4, 1, 4 / 3 if angles == "reference" else 5 / 4, 3 / 2, 7 / 4]
    shares, images_with = np.zeros((6, 6)), np.zeros(6)
    for image in images:
        counts = np.zeros((6, 6))
        for (y, x), here in np.ndenumerate(image):
            for distance, turn in itertools.product(reach, directions):
                row, column = (
                    y + round(math.sin(turn * math.pi) * distance),
                    x + round(math.cos(turn * math.pi) * distance),
                )
                if 0 <= row < 9 and 0 <= column < 7 and image[row, column] != here:
                    counts[here, image[row, column]] += 1
        for cluster in range(6):
            if counts[cluster].sum():
                shares[cluster] += counts[cluster] / counts[cluster].sum()
                images_with[cluster] += 1
    together = cd.CoOccurrence(6, cd.offsets(reach, angles))
    for image in images:
        together.add(image)
    np.testing.assert_allclose(together.shares(), shares / np.maximum(images_with, 1)[:, None], atol=1e-12)


def test_the_slip_is_one_neighbour_at_distance_two() -> None:
    wrong, right = cd.offsets((1, 2), "reference"), cd.offsets((1, 2), "even")
    assert wrong - right == {(-2, -1): 1}
    assert right - wrong == {(-1, -1): 1}
    assert cd.offsets((1,), "reference") == cd.offsets((1,), "even")
    assert set(cd.offsets((1,), "even")) == set(itertools.product((-1, 0, 1), repeat=2)) - {(0, 0)}


def test_edges_need_both_directions() -> None:
    shares = np.array([[0, 0.7, 0.3, 0], [0.05, 0, 0.95, 0], [0.4, 0.6, 0, 0], [0, 0, 0, 0]])
    assert cd.edges(shares, 0.07) == [(0, 2, 0.3), (1, 2, 0.6)]
    assert cd.edges(shares, None) == [(1, 2, 0.6)]  # from a third on, as there are three others
    assert cd.edges(shares, 0.0) == [(0, 1, 0.05), (0, 2, 0.3), (1, 2, 0.6)]  # weights of 0 are no edges


def test_infomap_finds_two_cliques_and_leaves_out_what_has_no_edge() -> None:
    pytest.importorskip("infomap")
    cliques = [(a, b, 1.0) for group in ((0, 1, 2, 5), (3, 4, 6, 8)) for a, b in itertools.combinations(group, 2)]
    for seed in range(3):
        ids = cd.communities([*cliques, (2, 3, 0.01)], 9, modules=2, markov_time=1, seed=seed)
        assert ids[7] == 0
        assert len(set(ids[[0, 1, 2, 5]])) == len(set(ids[[3, 4, 6, 8]])) == 1
        assert ids[0] != ids[3]
        assert min(ids[0], ids[3]) == 1
    assert cd.communities([], 4, modules=2, markov_time=1, seed=0).tolist() == [0] * 4


def test_kmeans_on_pixels_of_patches_is_faiss_on_the_repeated_rows() -> None:
    """The patch of each pixel, in the order of the pixels, so that FAISS draws the same ones."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6)).astype(np.float32)
    rows = RowFile(6)
    rows.append(x)
    ids = np.sort(rng.integers(0, 300, 4000))
    (model,) = kmeans(PickedRows(rows, ids), 3, seeds=[4], iterations=10, redos=2)
    reference = faiss.Kmeans(6, 3, niter=10, nredo=2, seed=4)
    reference.train(x[ids])
    np.testing.assert_array_equal(
        nearest(model, rows.read(0, 300)), reference.index.search(rows.read(0, 300), 1)[1][:, 0]
    )


def test_spherical_kmeans_has_unit_centroids_and_the_largest_inner_product() -> None:
    rng = np.random.default_rng(0)
    rows = RowFile(5)
    rows.append(rng.normal(size=(500, 5)).astype(np.float32) * rng.uniform(0.1, 10, (500, 1)).astype(np.float32))
    (model,) = kmeans(rows, 4, seeds=[0], iterations=20, redos=2, spherical=True)
    centroids = np.stack([model.reconstruct(i) for i in range(4)])
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    x = rows.read(0, 500)
    np.testing.assert_array_equal(nearest(model, x), (x @ centroids.T).argmax(1))


def blobs(seed: int = 0) -> np.ndarray:
    """Features (8, 10, 12): two alike regions apart from each other, of which one is larger, on a background."""
    rng = np.random.default_rng(seed)
    features = np.zeros((8, 10, 12))
    features[0] = 1
    features[:, 2:6, 2:5] = np.eye(8)[1][:, None, None]
    features[:, 7:9, 8:11] = np.eye(8)[1][:, None, None]
    return features + rng.normal(size=features.shape) * 0.02


@pytest.mark.parametrize("tau", [0.2, -0.9, 0.99])
def test_the_eigenvector_is_that_of_a_dense_solver(tau: float) -> None:
    """The generalised problem of the paper, dense, in double precision; the sign is free."""
    weights = affinity(blobs(), tau)
    degree = np.diag(weights.sum(1))
    values, vectors = eigh(degree - weights, degree, subset_by_index=[1, 2])
    vector = second_eigenvector(weights)
    assert vector @ degree @ vector == pytest.approx(1)
    np.testing.assert_allclose((degree - weights) @ vector, values[0] * (degree @ vector), atol=1e-8)
    if values[1] - values[0] > 1e-6:
        assert min(np.abs(vector - vectors[:, 0]).max(), np.abs(vector + vectors[:, 0]).max()) < 1e-7


def test_the_dense_solver_takes_over_where_iteration_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = affinity(blobs(), 0.2)
    right = second_eigenvector(weights)
    monkeypatch.setattr(normalised_cut, "RESIDUAL", -1.0)
    dense = second_eigenvector(weights)
    assert min(np.abs(dense - right).max(), np.abs(dense + right).max()) < 1e-8
    assert not np.array_equal(dense, right)
    for count in (1, 2, 3):
        assert np.isfinite(second_eigenvector(np.full((count, count), 0.5))).all()


def test_equal_solutions_come_out_the_same_each_time() -> None:
    """In a complete graph any vector is a solution: iteration would give another one at each call."""
    first, again = (second_eigenvector(np.ones((100, 100))) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_a_cut_takes_the_alike_regions() -> None:
    found = cut(blobs(), 0.2)
    expected = np.zeros((10, 12), bool)
    expected[2:6, 2:5] = expected[7:9, 8:11] = True
    np.testing.assert_array_equal(found.inside, expected)
    assert expected[found.seed]
    assert found.vector[found.seed] == pytest.approx(np.abs(found.vector).max())


class Given(Encoder):
    """Hands out features and attention of numbered images, which is their brightness."""

    name, weights_id = "given", "0"
    stride, attentions = 8, True

    def __init__(self, features: np.ndarray, attention: np.ndarray) -> None:
        super().__init__()
        self.features, self.given = torch.from_numpy(features), torch.from_numpy(attention)
        self.embed_dim = features.shape[1]

    def _encode(self, images: torch.Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        numbers = (images.amax((1, 2, 3)) * 51).round().long()
        return DenseFeatures(self.features[numbers], 8, attention=self.given[numbers] if attention else None)


class Scenes:
    """Images of 64 x 64 pixels, numbered from `first` on, with masks that differ from the patches' classes."""

    name, classes, void_class = "scenes", ("ground", "a", "b", "c"), None

    def __init__(self, truth: np.ndarray, first: int, split: str) -> None:
        self.truth, self.first, self.split, self.ids = truth, first, split, tuple(map(str, range(len(truth))))

    def __len__(self) -> int:
        return len(self.truth)

    def eval_mask(self, mask: np.ndarray) -> np.ndarray:
        return mask

    def __getitem__(self, i: int) -> Sample:
        mask = np.kron(self.truth[i], np.ones((8, 8))).astype(np.uint8)
        mask[:, ::9] = 255
        return Sample(np.full((64, 64, 3), 5 * (self.first + i), np.uint8), mask, str(i))


def test_the_reference_protocol_equals_an_independent_computation() -> None:
    """`neco-1` on given features and attention, from whole arrays of upsampled pixels, as the reference keeps them."""
    infomap = pytest.importorskip("infomap")
    rng = np.random.default_rng(0)
    count, train, side, classes, size = 40, 22, 8, 4, 20
    truth = np.zeros((count, side, side), int)
    for image in truth:  # one object on ground, of a class and its part below it
        y, x, kind = *rng.integers(0, 5, 2), rng.integers(1, 4)
        image[y : y + 3, x : x + 3] = kind
    parts = truth * 2 + (np.arange(side) % 2)[:, None]
    features = rng.normal(size=(2 * classes, 6))[parts] * 3 + rng.normal(size=(count, side, side, 6)) * 0.3
    features = features.transpose(0, 3, 1, 2).astype(np.float32)
    attention = ((truth > 0) + rng.random((count, side, side)) * 0.5)[:, None].repeat(2, 1).astype(np.float32)
    attention /= attention.sum((2, 3), keepdims=True)
    changes = {"input_size": 64, "mask_size": size, "foreground_clusters": 12, "community_clusters": 7, "seeds": 2}
    changes |= {"iterations": 20, "redos": 2, "direct_seeds": 2, "components": 6}
    (task,) = find_tasks(["shapes_unsup@neco-1"], changes)
    settings = task.settings().model_copy(update={"mean": (0, 0, 0), "std": (1, 1, 1)})
    data = {"train": Scenes(truth[:train], 0, "train"), "val": Scenes(truth[train:], train, "val")}
    context = Context(seed=3)
    outcome = task.module.run(Given(features, attention), data, settings, context)

    rows = features.transpose(0, 2, 3, 1).reshape(-1, 6).astype(np.float64)
    rows = ((rows - rows.mean(0)) / rows.std(0)).astype(np.float32)

    def fit(x: np.ndarray, k: int, seed: int, spherical: bool = False) -> Callable[[np.ndarray], np.ndarray]:
        model = faiss.Kmeans(6, k, niter=20, nredo=2, seed=seed, spherical=spherical, min_points_per_centroid=1)
        model.train(x)
        return lambda values: model.index.search(values, 1)[1][:, 0]

    def large(maps: np.ndarray) -> np.ndarray:
        return torch.nn.functional.interpolate(torch.from_numpy(maps)[:, None].double(), size)[:, 0].numpy()

    clusters = large(fit(rows, 12, 3, True)(rows).reshape(-1, side, side)).astype(int)
    noisy = large(foreground(torch.from_numpy(attention), 0.65).numpy()) > 0
    full = np.kron(truth, np.ones((1, 8, 8)))
    full[:, :, ::9] = 255
    masks = large(full).astype(int)

    def precision(part: slice, k: int) -> float:
        shares = [n[c == k].mean() for c, n in zip(clusters[part], noisy[part], strict=True) if (c == k).any()]
        return float(np.mean(shares)) if shares else 0.0

    of_train, of_val = (
        np.array([precision(part, k) for k in range(12)]) for part in (slice(train), slice(train, None))
    )
    order, best = np.argsort(of_train), (-1.0, 0.0)
    for start in range(int(0.55 * 12), int(0.75 * 12)):
        inside = np.isin(clusters[:train], order[start:])
        ious = [jaccard_score((m > 0).ravel(), own.ravel()) for m, own in zip(masks[:train], inside, strict=True)]
        best = max(best, (float(np.mean(ious)), of_train[order[start]]), key=lambda pair: pair[0])
    threshold = min(np.arange(0, 1, 0.05), key=lambda value: abs(value - best[1]))
    assert context.run.notes["threshold"] == pytest.approx(threshold)
    inside = np.concatenate([(of_train >= threshold)[clusters[:train]], (of_val >= threshold)[clusters[train:]]])

    maps = rows.reshape(count, side, side, 6).transpose(0, 3, 1, 2)
    pixels = torch.nn.functional.interpolate(torch.from_numpy(maps), size).permute(0, 2, 3, 1).numpy()
    assigned = np.full((count, size, size), 7)
    assigned[inside] = fit(pixels[inside], 7, 3)(pixels[inside])
    together = np.zeros((8, 8))
    seen = np.zeros(8)
    turns = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4, np.pi, 4 * np.pi / 3, 3 * np.pi / 2, 7 * np.pi / 4]
    for image in assigned:
        counts = np.zeros((8, 8))
        for d, turn in itertools.product((1, 2), turns):
            down, right = round(np.sin(turn) * d), round(np.cos(turn) * d)
            for y, x in np.ndindex(size, size):
                if 0 <= y + down < size and 0 <= x + right < size:
                    counts[image[y, x], image[y + down, x + right]] += 1
        np.fill_diagonal(counts, 0)
        seen += counts.sum(1) > 0
        together += counts / np.maximum(counts.sum(1), 1)[:, None]
    together /= np.maximum(seen, 1)[:, None]
    scores = []
    for seed in (4, 5):
        model = infomap.Infomap(f"--silent --two-level --seed {seed} --markov-time 1.2 --preferred-number-of-modules 3")
        for i, j in itertools.combinations(range(8), 2):
            if min(together[i, j], together[j, i]) >= 0.07:
                model.add_link(i, j, min(together[i, j], together[j, i]))
        module = np.zeros(8, int)
        for node, own in model.run().modules().items():
            module[node] = own
        predicted, actual = module[assigned[train:]][masks[train:] != 255], masks[train:][masks[train:] != 255]
        k = max(4, module.max() + 1)
        iou = np.array(
            [
                [
                    ((actual == c) & (predicted == p)).sum() / max(1, ((actual == c) | (predicted == p)).sum())
                    for p in range(k)
                ]
                for c in range(4)
            ]
        )
        which, columns = linear_sum_assignment(iou, maximize=True)
        named = np.zeros(k, int)
        named[columns] = which
        scores.append(np.mean([jaccard_score(actual == c, named[predicted] == c) for c in range(4)]))
    assert outcome.statistics["mIoU_per_seed"] == pytest.approx(np.array(scores), abs=1e-12)
    assert 0.4 < np.mean(scores) < 1
    assert "threshold" in context.run.notes["train_ground_truth"]


def test_clean_takes_no_ground_truth_of_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other masks of train move nothing, nor does a second run."""
    pytest.importorskip("infomap")
    changes = {"input_size": 56, "iterations": 5, "redos": 1, "seeds": 2, "direct_seeds": 1}
    before = neco_bench.run("baseline_hog", "shapes_unsup@clean-1", limit=8, workers=0, changes=changes)
    read = Shapes.__getitem__

    def other(self: Shapes, index: int) -> Sample:
        sample = read(self, index)
        masks = sample.mask if self.split == "val" else np.where(sample.mask, 0, 3).astype(np.uint8)
        return Sample(sample.image, masks, sample.id)

    monkeypatch.setattr(Shapes, "__getitem__", other)
    after = neco_bench.run("baseline_hog", "shapes_unsup@clean-1", limit=8, workers=0, changes=changes)
    assert before.metrics == after.metrics
    assert before.provenance["run"]["train_ground_truth"] == "none"


def test_an_encoder_without_attention_is_an_error_with_the_fix() -> None:
    pytest.importorskip("infomap")
    with pytest.raises(UsageError, match=r"which 'baseline_rgb' does not return\. Use @clean-1"):
        neco_bench.run("baseline_rgb", "shapes_unsup@neco-1", limit=4)


def test_without_infomap_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "infomap":
            raise ImportError(name)
        return load(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"neco-bench\[unsup\]"):
        cd.check_infomap()


def test_reference_with_a_vision_transformer(tmp_path: Path) -> None:
    """The attention comes with the features in one pass, and from the store the second time."""
    pytest.importorskip("infomap")
    model, changes = "timm:vit_tiny_patch16_224?pretrained=false&seed=0", {"input_size": 112, "seeds": 2}
    changes |= {"iterations": 5, "redos": 1, "direct_seeds": 1, "foreground_clusters": 20, "community_clusters": 30}
    first, again = (
        neco_bench.run(model, "shapes_unsup@neco-1", limit=8, workers=0, changes=changes, out=tmp_path, overwrite=True)
        for _ in range(2)
    )
    assert first.metrics == again.metrics
    assert (first.provenance["features_reused"], again.provenance["features_reused"]) == (0, 16)
    arrays = ResultStore(tmp_path).statistics(first)
    assert arrays["confusion"].shape == (2, 8, 9, 9)
    assert first.metrics["foreground_IoU"] == pytest.approx(arrays["foreground_iou"].mean())
