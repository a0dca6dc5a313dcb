"""Results: their schema, the folder in which they are stored, and their provenance.

This is the only package that writes result files.
"""
