"""Depth and surface normals predicted by a linear head; see `README.md` and `task.py`."""
