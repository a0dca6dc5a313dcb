"""Data sets: the contract, one reader per data set, checks and preparation of downloads."""
