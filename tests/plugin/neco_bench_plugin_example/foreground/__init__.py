"""A task family: `cards.toml` holds its protocols and tasks, `task.py` its settings and the measurement."""
