"""Features of data sets: transforms, loading, extraction, and the store that keeps what was extracted."""
