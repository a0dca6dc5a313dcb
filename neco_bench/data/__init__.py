"""Data sets: the interfaces, one reader per data set, checks and preparation of downloads."""
