"""The task families, one folder each, and `segmentation.py`, which the segmentation families share.

A family's folder has `cards.toml` (tasks and constants), `settings.py` (the schema of the constants, which imports no
torch), `task.py` (the protocol) and modules that only this family uses.
"""
