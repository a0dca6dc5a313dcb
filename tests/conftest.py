"""Shared fixtures: optional sample data and golden arrays beside the repository, a cache, a maker of results."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neco_bench.results.schema import Result

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist has a process per core already
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process more than there are cores: tests of signals, kills and jobs wait for other processes.

    The quick suite has few of them, and each process imports and collects everything, which takes 20 s of it.
    """
    return len(os.sched_getaffinity(0)) + (config.option.markexpr != "not slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that fetch run only where `-m` names them."""
    if "network" not in config.option.markexpr:
        skip = pytest.mark.skip(reason="fetches; run with -m network")
        for item in items:
            if item.get_closest_marker("network"):
                item.add_marker(skip)


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
    """Every test session has a cache folder of its own, shared by all its processes, and never asks the network."""
    patch, base = pytest.MonkeyPatch(), tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # that of the session; the embedded data set takes seconds to make
    (base / "cache").mkdir(exist_ok=True)
    patch.setenv("NECO_BENCH_CACHE", str(base / "cache"))
    patch.setenv("NECO_BENCH_OFFLINE", "1")
    patch.delenv("NECO_BENCH_DATA", raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def embedded(_own_cache: object) -> list[Path]:
    """The folders of the generated images, which take seconds to make."""
    from neco_bench.data.shapes import shapes_folder

    return [shapes_folder()]


@pytest.fixture
def new_cache(embedded: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, empty but for the generated images."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for folder in embedded:
        (cache / folder.name).symlink_to(folder)
    monkeypatch.setenv("NECO_BENCH_CACHE", str(cache))
    return cache


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the features of this test apart: its feature store is empty."""
    monkeypatch.setattr("neco_bench.features.store.cache_dir", lambda: tmp_path / "cache")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that go through any encoder."""
    from neco_bench.encoders.base import Encoder

    sizes: list[int] = []
    encode = Encoder.encode

    def counted(self: Encoder, images: Any, **options: Any) -> object:
        sizes.append(len(images))
        return encode(self, images, **options)

    monkeypatch.setattr(Encoder, "encode", counted)
    return sizes


@pytest.fixture
def make_result() -> Callable[..., Result]:
    def make(value: float = 0.5, **changes: Any) -> Result:
        fields: dict[str, Any] = {
            "key": "0123456789abcdef",
            "model": "dino_vits16",
            "task": "camvid_ic",
            "family": "in_context",
            "protocol": "hbird-2",
            "primary_metric": "miou",
            "metrics": {"miou": value},
            "per_class": {},
            "ci95": {"miou": (max(value - 0.01, 0.0), min(value + 0.02, 1.0))},
            "n_images": 233,
            "seed": 0,
            "status": "ok",
            "provenance": {"weights_id": "a" * 64, "protocol_hash": "b" * 64},
            "timing": {"total": 2.5},
            "peak_memory_mb": 100.0,
        }
        if changes.get("status") == "failed":
            fields |= {"metrics": {}, "ci95": {}, "error": "NaN features in layer 11"}
        return Result(**(fields | changes))

    return make
