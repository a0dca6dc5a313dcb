"""Shared places: the optional folders of real samples and golden arrays beside the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real sample data; skips where it is not there."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("no real sample data beside the repository (../shared/data)")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of arrays made by reference implementations; skips where it is not there."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("no golden arrays beside the repository (../shared/golden)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Every test session has a cache folder of its own, shared by its subprocesses, and never asks the network."""
    patch = pytest.MonkeyPatch()
    patch.setenv("NECO_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("NECO_BENCH_OFFLINE", "1")
    patch.delenv("NECO_BENCH_DATA", raising=False)
    yield
    patch.undo()
