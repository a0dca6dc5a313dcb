"""Features of data sets: transforms, loading, extraction, and the feature store."""
