"""Clustering of patch features: standardise, PCA, k-means. Pure functions on arrays, with FAISS's own sub-sampling.

FAISS trains PCA on at most 1000 * D points and k-means on at most 256 * K, drawn with its fixed seeds; the reference
(NeCo's overclustering) inherits that, and so do we.
"""

from __future__ import annotations

import numpy as np

from neco_bench.errors import UsageError


def standardise(features: np.ndarray) -> np.ndarray:
    """(N, D) float32 with population mean 0 and deviation 1 in each dimension, in place; constant ones become 0."""
    mean = features.mean(0, dtype=np.float64)
    # In chunks, so that no float64 copy of the whole array is made.
    total = sum(np.square(part - mean).sum(0) for part in np.array_split(features, max(1, len(features) // 65536)))
    deviation = np.sqrt(total / len(features))
    deviation[deviation == 0] = 1
    features -= mean.astype(np.float32)
    features /= deviation.astype(np.float32)
    return features


def reduce_dimensions(features: np.ndarray, dimensions: int) -> np.ndarray:
    """(N, d) float32 principal components, centred, not whitened; as given where D <= `dimensions`."""
    if features.shape[1] <= dimensions:
        return features
    import faiss

    pca = faiss.PCAMatrix(features.shape[1], dimensions)
    pca.train(features)
    return pca.apply(features)


def kmeans(features: np.ndarray, clusters: int, *, seed: int, iterations: int, redos: int) -> np.ndarray:
    """(N,) int64 nearest centroid of each row, after FAISS k-means (L2) with `redos` restarts.

    Raises UsageError where there are fewer points than clusters.
    """
    if len(features) < clusters:
        raise UsageError(
            f"{clusters} clusters need at least as many patches, there are {len(features)}. "
            f"Lower --set clusters, or use more images."
        )
    import faiss

    model = faiss.Kmeans(
        features.shape[1], clusters, niter=iterations, nredo=redos, seed=seed, min_points_per_centroid=1
    )
    model.train(features)
    return model.index.search(features, 1)[1][:, 0]
