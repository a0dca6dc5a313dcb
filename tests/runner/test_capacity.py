"""What is known before a run to exceed memory, disk, images or patches is refused before anything is computed."""

from __future__ import annotations

import logging
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

import neco_bench
from neco_bench.core.errors import UsageError
from neco_bench.encoders.base import Encoder
from neco_bench.runner import capacity
from neco_bench.runner.capacity import memory_there
from neco_bench.runner.options import RunOptions
from tests.command import neco

HUGE = 10**9


@pytest.fixture
def no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "encode", lambda *_, **__: pytest.fail("images are encoded"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_encoding")
@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("shapes_ic", {"passes": HUGE}, "GiB of memory"),
        ("shapes_ic", {"input_size": 800_000}, "GiB of memory"),
        ("shapes_ic", {"tokens_per_side": 100_000}, "GiB of memory"),
        ("shapes_ic", {"neighbours": HUGE}, "Lower it with --set neighbours="),
        ("shapes_ic", {"memory_size": 10**13}, "memory_size: must be at most"),
        ("shapes_linear", {"epochs": HUGE}, "GiB of memory"),
        ("shapes_linear", {"train_mask_size": 200_000}, "GiB of memory"),
        ("shapes_linear", {"score_size": 200_000}, "GiB of memory"),
        ("shapes_linear", {"learning_rate": 1e300}, "learning_rate: must be at most"),
        ("shapes_linear", {"learning_rates": [0.1, 1e300]}, "learning_rates: must be at most"),
        ("shapes_linear", {"probe_seeds": HUGE}, "GiB of memory"),
        ("shapes_linear@dinov3-1", {"iterations": HUGE}, "GiB of memory"),
        ("shapes_linear@dinov3-1", {"batch_size": HUGE}, "GiB of memory"),
        ("shapes_linear@dinov3-1", {"scale": [1000.0, 2000.0]}, "GiB of memory"),
        ("shapes_linear@dinov3-1", {"crop_tries": HUGE}, "crop_tries: Input should be less"),
        ("shapes_cluster_gt", {"clusters": HUGE}, "Lower --set clusters"),
        ("shapes_cluster_gt", {"seeds": HUGE}, "GiB of memory"),
        ("shapes_cluster_gt", {"mask_size": 500_000}, "GiB of memory"),
        ("shapes_knn", {"ks": [HUGE]}, "Use smaller numbers in --set 'ks"),
        ("shapes_correspondence", {"input_size": 800_000}, "GiB of memory"),
    ],
    ids=lambda value: " ".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_settings_without_measure(task: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        neco_bench.run("baseline_rgb", task, limit=4, workers=0, changes=changes)


def test_a_dry_run_says_the_same(tmp_path: Path) -> None:
    command = ("run", "--model", "baseline_rgb", "--task", "shapes_ic", "--limit", 4, "--out", tmp_path)
    answer = neco(*command, "--set", f"passes={HUGE}", "--dry-run")
    assert answer.code == 2
    assert "GiB of memory" in answer.out
    assert "Lower the --set values (passes=1000000000)" in answer.out


def test_the_batch_is_no_larger_than_what_fits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(capacity, "memory_there", lambda device: 40e6)
    small: dict[str, Any] = {"limit": 4, "workers": 0, "changes": {"input_size": 56}, "features": "off"}
    with caplog.at_level(logging.WARNING):
        result = neco_bench.run("baseline_rgb", "shapes_ic", batch_size=HUGE, **small)
    assert 1 <= result.provenance["batch_size_used"] < 1000
    assert f"--batch-size {HUGE} does not fit into memory" in caplog.text
    monkeypatch.undo()
    assert neco_bench.run("baseline_rgb", "shapes_ic", batch_size=4, **small).metrics == result.metrics


def test_a_disk_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda _: usage(10, 10, 0))
    with pytest.raises(UsageError, match=r"GiB in .*; 0 GiB are free"):
        neco_bench.run("baseline_rgb", "shapes_cluster_gt", limit=4, workers=0, features="off")


def test_processes_without_measure() -> None:
    with pytest.raises(UsageError, match="--workers must be at most"):
        RunOptions(workers=100_000)


def test_the_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = memory_there()
    assert 1e8 < machine < 1e15
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(capacity, "LIMITS", (str(tmp_path / "absent"), str(limit)))
    for text, memory in (("max\n", None), ("1048576\n", 1048576)):
        limit.write_text(text)
        assert memory_there() == memory or (memory is None and memory_there() >= machine)
