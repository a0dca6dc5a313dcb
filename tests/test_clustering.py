"""Clustering engines against scikit-learn and plain faiss."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from neco_bench import clustering
from neco_bench.clustering import Rows, kmeans, nearest, reduce_dimensions, standardise
from neco_bench.errors import UsageError


def features(rows: int = 3000, columns: int = 24) -> np.ndarray:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(columns, columns)) * np.linspace(3, 0.1, columns)
    return (rng.normal(size=(rows, columns)) @ mix.T + 5).astype(np.float32)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "CHUNK", 700)


def stored(x: np.ndarray) -> Rows:
    rows = Rows(x.shape[1])
    for part in np.array_split(x, 7):
        rows.append(part)
    return rows


def everything(rows: Rows) -> np.ndarray:
    return np.concatenate(list(rows.chunks()))


def test_rows_come_back_in_parts_and_in_faiss_order() -> None:
    x = features()
    rows = stored(x)
    np.testing.assert_array_equal(everything(rows), x)
    np.testing.assert_array_equal(rows.read(10, 20), x[10:20])
    permutation = np.empty(3000, np.int32)
    faiss.rand_perm(faiss.swig_ptr(permutation), 3000, 5)
    np.testing.assert_array_equal(rows.drawn(1900, 5), x[permutation[:1900]])
    np.testing.assert_array_equal(rows.drawn(3000, 5), x)


def test_standardise_equals_scikit_learn() -> None:
    x = features()
    x[:, 3] = 7  # a constant dimension
    np.testing.assert_allclose(everything(standardise(stored(x))), StandardScaler().fit_transform(x), atol=1e-5)


def test_pca_spans_the_space_of_scikit_learn() -> None:
    scaled = standardise(stored(features()))
    x, ours = everything(scaled), everything(reduce_dimensions(scaled, 6))
    theirs = PCA(6).fit_transform(x.astype(np.float64))
    assert ours.shape == (3000, 6)
    np.testing.assert_allclose(
        np.abs((ours * theirs).sum(0)) / np.linalg.norm(ours, axis=0) / np.linalg.norm(theirs, axis=0), 1, atol=1e-4
    )
    np.testing.assert_allclose(np.linalg.norm(ours, axis=0), np.linalg.norm(theirs, axis=0), rtol=1e-4)


def test_pca_keeps_features_that_have_no_more_dimensions() -> None:
    x = stored(features(columns=4))
    assert reduce_dimensions(x, 50) is x


def test_pca_is_faiss_with_its_own_sub_sampling() -> None:
    x = features(5000, 4)  # 5000 > 1000 * 4 points
    reference = faiss.PCAMatrix(4, 2)
    reference.train(x)
    np.testing.assert_allclose(everything(reduce_dimensions(stored(x), 2)), reference.apply(x), atol=1e-4)


def test_kmeans_is_faiss_with_its_own_sub_sampling() -> None:
    x = features(8000, 8)
    reference = faiss.Kmeans(8, 5, niter=20, nredo=2, seed=3)  # 8000 > 256 * 5 points: sub-sampled
    reference.train(x)
    expected = np.linalg.norm(x[:, None] - reference.centroids[None], axis=2).argmin(1)
    np.testing.assert_array_equal(nearest(kmeans(stored(x), 5, seed=3, iterations=20, redos=2), x), expected)


def test_more_clusters_than_points() -> None:
    with pytest.raises(UsageError, match="there are 10"):
        kmeans(stored(features(10, 4)), 11, seed=0, iterations=1, redos=1)
