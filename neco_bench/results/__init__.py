"""Results: their schema, the folder they are stored in, and what produced them.

The only package that writes result files.
"""
