"""In-context segmentation: an image is labelled by the nearest patches of a memory of training images."""
