"""What a dry run measures: each encoder once at a size, and not for long."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from neco_bench.core import progress
from neco_bench.encoders import DenseFeatures, Encoder
from neco_bench.encoders.load import load_encoder
from neco_bench.runner import estimate
from tests.command import neco


class Slow(Encoder):
    """Takes so many seconds of a clock for an image, and counts its calls by size and batch."""

    name, weights_id, embed_dim, stride = "slow", "0", 3, 8

    def __init__(self, clock: list[float], seconds: float) -> None:
        super().__init__()
        self.clock, self.taken, self.calls = clock, seconds, Counter[tuple[int, int]]()

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        self.clock[0] += self.taken * len(images)
        self.calls[images.shape[-1], len(images)] += 1
        return DenseFeatures(F.avg_pool2d(images, 8), 8)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now[0])
    return now


def test_an_encoder_is_measured_once_at_a_size(clock: list[float]) -> None:
    rates, first, second = estimate.Rates(), Slow(clock, 0.01), Slow(clock, 0.01)
    seconds = [rates.encoding(encoder, size, 16) for encoder in (first, second) for size in (32, 64, 32)]
    assert seconds == pytest.approx([0.01] * 6)
    assert first.calls == {(32, 1): 1, (32, 8): 4, (64, 1): 1, (64, 8): 4}
    assert not second.calls  # of the same architecture


def test_a_slow_encoder_is_measured_on_one_image_and_not_at_every_size(clock: list[float]) -> None:
    rates, encoder = estimate.Rates(), Slow(clock, 3.0)
    seconds = [rates.encoding(encoder, size, 16) for size in (64, 128, 256, 32)]
    assert encoder.calls == {(64, 1): 1, (128, 1): 1}
    assert seconds == [3.0, 3.0, 12.0, 0.75]  # by the area of the nearest size


@pytest.mark.slow
def test_tasks_of_a_model_share_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def seconds(encoder: Encoder, size: int, batch_size: int) -> float:
        measured.append((encoder.name, size))
        time.sleep(0.1)
        return 0.01

    monkeypatch.setattr(estimate, "_seconds_to_encode", seconds)
    monkeypatch.setattr(progress, "EVERY", 0.02)
    run: list[Any] = ["run", "--model", "baseline_hog,baseline_rgb", "--limit", 4, "--out", tmp_path, "--dry-run"]
    answer = neco(*run, "--task", "shapes_ic,shapes_ic@clean-1,shapes_cluster_gt,shapes_knn", "--json")
    assert [row["hours"] > 0 for row in json.loads(answer.out)] == [True] * 8
    assert measured == [("baseline_hog", 224), ("baseline_rgb", 224)]
    assert "dry run: estimates 4 of 8, " in answer.err


@pytest.mark.parametrize(("features", "itemsize"), [("fp32", 4), ("fp16", 2), ("off", 0)])
def test_stored_features_are_in_the_disk_space(features: str, itemsize: int, tmp_path: Path) -> None:
    run = ["run", "--model", "baseline_rgb", "--task", "shapes_ic", "--limit", "4", "--dry-run", "--json"]
    answer = neco(*run, "--features", features, "--out", tmp_path)
    (row,) = json.loads(answer.out)
    dimension = load_encoder("baseline_rgb").embed_dim
    assert row["disk_gb"] == pytest.approx(8 * dimension * 28**2 * itemsize / 2**30, rel=0.06)  # two digits
