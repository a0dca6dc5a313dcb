"""The task families, one folder each: `task.py` (the protocol, top to bottom), `cards.toml` (tasks and constants)."""
