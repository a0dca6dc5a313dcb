"""Nearest neighbours: exact and approximate search, and arrays of rows on disk."""
