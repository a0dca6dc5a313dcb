"""Clustering engines against scikit-learn and plain faiss."""

from __future__ import annotations

import itertools
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from neco_bench.tasks import clustering
from neco_bench.tasks.clustering import PackedMasks, assign, kmeans, nearest, standardise_and_reduce
from sklearn.decomposition import PCA
from sklearn.metrics import jaccard_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.preprocessing import StandardScaler

from neco_bench.core.errors import NecoBenchError, UsageError
from neco_bench.core.protocol import find_tasks
from neco_bench.core.task import Context
from neco_bench.data.base import Sample
from neco_bench.encoders import DenseFeatures, Encoder
from neco_bench.search import row_file
from neco_bench.search.row_file import RowFile, faiss_draw
from tests.typed import present


def features(rows: int = 3000, columns: int = 24) -> np.ndarray:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(columns, columns)) * np.linspace(3, 0.1, columns)
    return (rng.normal(size=(rows, columns)) @ mix.T + 5).astype(np.float32)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "CHUNK", 700)
    monkeypatch.setattr(row_file, "CHUNK", 700)


def stored(x: np.ndarray) -> RowFile:
    rows = RowFile(x.shape[1])
    for part in np.array_split(x, 7):
        rows.append(part)
    return rows


def everything(rows: RowFile) -> np.ndarray:
    return np.concatenate(list(rows.chunks()))


def test_rows_come_back_in_parts_and_in_faiss_order() -> None:
    x = features()
    rows = stored(x)
    np.testing.assert_array_equal(everything(rows), x)
    np.testing.assert_array_equal(rows.read(10, 20), x[10:20])
    permutation = np.empty(3000, np.int32)
    faiss.rand_perm(faiss.swig_ptr(permutation), 3000, 5)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(rows.at(faiss_draw(3000, 1900, 5)), x[permutation[:1900]])
    np.testing.assert_array_equal(rows.at(faiss_draw(3000, 3000, 5)), x)


def test_rows_beyond_the_range_of_int32_bytes() -> None:
    rows = RowFile(384)
    rows._file.truncate(4 * 384 * 3_000_000)  # zeros that take no place
    rows._file.seek(4 * 384 * 2_999_999)
    rows._file.write(np.ones(384, np.float32).data)
    rows._count = 3_000_000
    assert rows.at(np.array([2_999_999, 0], np.int32))[:, 383].tolist() == [1, 0]


def test_masks_come_back_in_order() -> None:
    rng = np.random.default_rng(0)
    masks, packed = [rng.integers(0, 256, shape).astype(np.uint8) for shape in ((2, 3), (1, 1), (40, 7))], PackedMasks()
    for mask in masks:
        packed.append(mask)
    for _ in range(2):
        for mask, again in zip(masks, packed, strict=True):
            assert mask.dtype == again.dtype
            np.testing.assert_array_equal(mask, again)


def test_assignments_do_not_depend_on_how_rows_are_read() -> None:
    x = features(8000, 8)
    models = list(kmeans(stored(x), 5, seeds=range(2), iterations=3, redos=1))
    of_images = list(assign(models, stored(x), 100))  # 7 images at a time, and 3 in the end
    assert len(of_images) == 80
    np.testing.assert_array_equal(np.concatenate(of_images, 1), [nearest(model, x) for model in models])


def test_standardise_equals_scikit_learn() -> None:
    """Features that have no more dimensions than components are wanted are standardised alone."""
    x = features()
    x[:, 3] = 7  # a constant dimension
    rows = stored(x)
    np.testing.assert_allclose(
        everything(standardise_and_reduce(rows, 24)), StandardScaler().fit_transform(x), atol=1e-5
    )
    np.testing.assert_array_equal(everything(rows), x)


def test_pca_spans_the_space_of_scikit_learn() -> None:
    x, ours = features(), everything(standardise_and_reduce(stored(features()), 6))
    theirs = PCA(6).fit_transform(StandardScaler().fit_transform(x.astype(np.float64)))
    assert ours.shape == (3000, 6)
    np.testing.assert_allclose(
        np.abs((ours * theirs).sum(0)) / np.linalg.norm(ours, axis=0) / np.linalg.norm(theirs, axis=0), 1, atol=1e-4
    )
    np.testing.assert_allclose(np.linalg.norm(ours, axis=0), np.linalg.norm(theirs, axis=0), rtol=1e-4)


def test_pca_is_faiss_with_its_own_sub_sampling() -> None:
    x = features(5000, 4)  # 5000 > 1000 * 4 points
    scaled = StandardScaler().fit_transform(x).astype(np.float32)
    reference = faiss.PCAMatrix(4, 2)
    reference.train(scaled)
    ours = everything(standardise_and_reduce(stored(x), 2))
    np.testing.assert_allclose(ours, reference.apply(scaled), atol=1e-5)


def test_kmeans_is_faiss_with_its_own_sub_sampling() -> None:
    """Also of several seeds at once, each as if alone."""
    x = features(8000, 8)
    models = list(kmeans(stored(x), 5, seeds=range(3, 8), iterations=20, redos=2))
    assert len(models) == 5
    for seed, model in enumerate(models, 3):
        reference = faiss.Kmeans(8, 5, niter=20, nredo=2, seed=seed)  # 8000 > 256 * 5 points: sub-sampled
        reference.train(x)
        expected = np.linalg.norm(x[:, None] - present(reference.centroids)[None], axis=2).argmin(1)
        np.testing.assert_array_equal(nearest(model, x), expected)


def test_an_error_while_fitting_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = stored(features(8000, 8))
    monkeypatch.setattr(clustering, "faiss_draw", lambda total, count, seed: 1 / (seed - 4))
    with pytest.raises(ZeroDivisionError):
        list(kmeans(rows, 5, seeds=[4], iterations=1, redos=1))


def test_fewer_rows_than_components_or_none() -> None:
    rows = stored(features(20))
    rows.append(np.zeros((0, 24), np.float32))
    assert len(rows) == 20
    with pytest.raises(UsageError, match="22 principal components need at least as many patches, but there are 20"):
        standardise_and_reduce(rows, 22)


def test_more_clusters_than_points() -> None:
    with pytest.raises(UsageError, match="there are 10"):
        kmeans(stored(features(10, 4)), 11, seeds=[0], iterations=1, redos=1)


@pytest.mark.parametrize("clusters", [4, 9])
def test_clustering_of_given_features_equals_an_independent_computation(clusters: int) -> None:
    """The family on an encoder that hands out given features, against scikit-learn's scaler and contingency table and
    faiss on whole arrays, which draws its own sub-sample for k-means (256 of 768 points a cluster where K = 4)."""
    count, side, dimension, classes = 48, 8, 60, 4
    rng = np.random.default_rng(0)
    truth = rng.integers(0, classes, (count, side, side))
    given = rng.normal(size=(classes, dimension))[truth] + rng.normal(size=(count, side, side, dimension)) * 4
    given = given.astype(np.float32)

    class Given(Encoder):
        name, weights_id = "given", "0"
        embed_dim, stride = dimension, 8

        def _encode(self, images: torch.Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
            numbers = (images.amax((1, 2, 3)) * 51).round().long()  # the brightness of an image is its number
            return DenseFeatures(torch.from_numpy(given).permute(0, 3, 1, 2)[numbers].contiguous(), 8)

    class Scenes:
        name, split, ids = "scenes", "val", tuple(map(str, range(count)))
        classes = tuple("abcd")

        def __len__(self) -> int:
            return count

        def eval_mask(self, mask: np.ndarray) -> np.ndarray:
            return mask

        def __getitem__(self, i: int) -> Sample:
            image = np.full((64, 64, 3), 5 * i, np.uint8)
            return Sample(image, np.kron(truth[i], np.ones((8, 8))).astype(np.uint8), str(i))

    (task,) = find_tasks(["shapes_cluster_gt@clean-1"], {"input_size": 64, "clusters": clusters, "components": 5})
    settings = task.settings().model_copy(update={"mean": (0, 0, 0), "std": (1, 1, 1)})
    outcome = task.module.run(Given(), {"val": Scenes()}, settings, Context(seed=3))

    x = StandardScaler().fit_transform(given.reshape(-1, dimension)).astype(np.float32)
    pca = faiss.PCAMatrix(dimension, 5)
    pca.train(x)
    x = pca.apply(x)
    scores = []
    for seed in range(3, 8):
        kmeans = faiss.Kmeans(5, clusters, niter=100, nredo=5, seed=seed, min_points_per_centroid=1)
        kmeans.train(x)
        assigned = kmeans.index.search(x, 1)[1][:, 0]
        table = contingency_matrix(truth.ravel(), assigned)
        if clusters == classes:
            iou = table / (table.sum(0) + table.sum(1)[:, None] - table)
            best = max(itertools.permutations(range(classes)), key=lambda p: iou[p, range(classes)].sum())
        else:
            best = table.argmax(0)
        scores.append(jaccard_score(truth.ravel(), np.array(best)[assigned], average="macro"))
    assert outcome.statistics["mIoU_per_seed"] == pytest.approx(np.array(scores), abs=1e-12)
    assert 0.3 < np.mean(scores) < 0.99


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error_with_the_fix() -> None:
    rows = RowFile(4)
    rows._file = open("/dev/full", "w+b", 0)  # type: ignore[assignment]  # noqa: SIM115
    with pytest.raises(NecoBenchError, match=r"NECO_BENCH_CACHE"):
        rows.append(np.zeros((3, 4), np.float32))
