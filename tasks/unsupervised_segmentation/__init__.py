"""Fully unsupervised segmentation: foreground from clusters, objects by community detection."""
