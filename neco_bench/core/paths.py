"""Where data sets are, and the one folder that downloads, features and generated data live under."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """`$NECO_BENCH_CACHE`, else the platform's cache folder for neco-bench. It need not exist yet."""
    return Path(os.environ.get("NECO_BENCH_CACHE") or platformdirs.user_cache_dir("neco-bench")).expanduser()


def data_root(root: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder of data sets: the argument, else `$NECO_BENCH_DATA`, else None."""
    given = root or os.environ.get("NECO_BENCH_DATA")
    return Path(given).expanduser() if given else None
