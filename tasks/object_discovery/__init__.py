"""Object discovery: one box for an image from its patches alone, scored by CorLoc."""
