"""Object discovery: one box for an image from its patches, scored by CorLoc."""
