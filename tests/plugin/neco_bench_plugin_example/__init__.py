"""What this package adds to neco-bench."""
