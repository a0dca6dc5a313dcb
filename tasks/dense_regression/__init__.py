"""Depth and surface normals by a linear head: `README.md` and `task.py` say how."""
