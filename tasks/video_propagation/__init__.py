"""Label propagation in video."""
