"""Semantic correspondence: keypoints of one image matched to another by their nearest patch features."""
