"""Linear segmentation: a 1x1 convolution on frozen patch features."""
