"""Attention maps: how well the class token's attention covers the objects of an image, by its Jaccard index."""
