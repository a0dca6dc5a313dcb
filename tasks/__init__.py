"""The task families, one folder each, and `segmentation.py`, what those of segmentation share.

A family's folder has `cards.toml` (tasks and constants), `settings.py` (the schema of the constants, which imports no
torch), `task.py` (the protocol, top to bottom) and what only this family uses.
"""
