"""Pictures of results and features, as arrays and PNG files."""
