"""Clustering and overclustering: k-means on patch features, with clusters named by the ground truth."""
