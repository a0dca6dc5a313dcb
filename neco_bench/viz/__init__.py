"""Pictures, as arrays and PNG files."""
