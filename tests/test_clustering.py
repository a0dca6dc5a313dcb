"""Clustering engines against scikit-learn and plain faiss."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from neco_bench.clustering import kmeans, reduce_dimensions, standardise
from neco_bench.errors import UsageError


def features(rows: int = 3000, columns: int = 24) -> np.ndarray:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(columns, columns)) * np.linspace(3, 0.1, columns)
    return (rng.normal(size=(rows, columns)) @ mix.T + 5).astype(np.float32)


def test_standardise_equals_scikit_learn() -> None:
    x = features()
    x[:, 3] = 7  # a constant dimension
    np.testing.assert_allclose(standardise(x.copy()), StandardScaler().fit_transform(x), atol=1e-5)


def test_pca_spans_the_space_of_scikit_learn() -> None:
    x = standardise(features())
    ours = reduce_dimensions(x, 6)
    theirs = PCA(6).fit_transform(x.astype(np.float64))
    assert ours.shape == (3000, 6)
    np.testing.assert_allclose(
        np.abs((ours * theirs).sum(0)) / np.linalg.norm(ours, axis=0) / np.linalg.norm(theirs, axis=0), 1, atol=1e-4
    )
    np.testing.assert_allclose(np.linalg.norm(ours, axis=0), np.linalg.norm(theirs, axis=0), rtol=1e-4)


def test_pca_keeps_features_that_have_no_more_dimensions() -> None:
    x = features(columns=4)
    assert reduce_dimensions(x, 50) is x


def test_kmeans_is_faiss_with_its_own_sub_sampling() -> None:
    x = features(8000, 8)
    reference = faiss.Kmeans(8, 5, niter=20, nredo=2, seed=3)  # 8000 > 256 * 5 points: sub-sampled
    reference.train(x)
    nearest = np.linalg.norm(x[:, None] - reference.centroids[None], axis=2).argmin(1)
    np.testing.assert_array_equal(kmeans(x, 5, seed=3, iterations=20, redos=2), nearest)


def test_more_clusters_than_points() -> None:
    with pytest.raises(UsageError, match="there are 10"):
        kmeans(features(10, 4), 11, seed=0, iterations=1, redos=1)
