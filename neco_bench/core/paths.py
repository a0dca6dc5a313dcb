"""The folder of data sets, and the cache folder for downloads, features and generated data."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Return `$NECO_BENCH_CACHE`, else the platform's cache folder for neco-bench, which may not exist yet."""
    return Path(os.environ.get("NECO_BENCH_CACHE") or platformdirs.user_cache_dir("neco-bench")).expanduser()


def data_root(root: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the folder of data sets: the argument, else `$NECO_BENCH_DATA`, else None."""
    given = root or os.environ.get("NECO_BENCH_DATA")
    return Path(given).expanduser() if given else None
