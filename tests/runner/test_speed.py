"""`neco-bench speed`: what is measured, where it is stored, and that the operations are those of the architecture."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from neco_bench.core.errors import UsageError
from neco_bench.encoders import load_encoder
from neco_bench.results.frame import load_results
from neco_bench.results.store import ResultStore
from neco_bench.runner.speed import SpeedOptions, measure_speed, task_sizes
from tests.command import neco

VIT = "timm:vit_tiny_patch16_224?pretrained=false"


def vit_operations(size: int, dim: int = 192, depth: int = 12, patch: int = 16) -> float:
    """Two for each multiplication and addition in a ViT: patches, then projections, MLP and attention of each block."""
    patches = (size // patch) ** 2
    tokens = patches + 1
    block = 12 * dim * dim * tokens + 2 * tokens * tokens * dim
    return 2.0 * (patches * 3 * patch * patch * dim + depth * block)


def test_operations_and_parameters_are_those_of_the_architecture(tmp_path: Path) -> None:
    encoder = load_encoder(VIT, device="cpu")
    options = SpeedOptions((64, 70), ("fp32",), batch_size=2, seconds=0.01)
    store = ResultStore(tmp_path)
    (result,) = measure_speed(encoder, "vit", options, store)  # 70 is taken to 64
    assert result.metrics["gflops_per_image"] == pytest.approx(vit_operations(64) / 1e9, rel=1e-3)
    parameters = sum(p.numel() for p in encoder.parameters())
    assert result.metrics["million_parameters"] == pytest.approx(parameters / 1e6)
    assert result.metrics["images_per_second"] == pytest.approx(result.n_images / result.timing["encode"])
    assert result.peak_memory_mb > parameters * 4 / 2**20
    assert result.provenance["features"]["tokens"] == 16
    (again,) = measure_speed(encoder, "vit", options, store)
    assert (again.metrics, again.timing) == (result.metrics, result.timing)  # is stored
    (anew,) = measure_speed(encoder, "vit", options, store, overwrite=True)
    assert anew.key == result.key
    other = measure_speed(encoder, "vit", SpeedOptions((64,), ("fp32",), batch_size=1, seconds=0.01), store)[0]
    assert other.provenance["protocol_hash"] != result.provenance["protocol_hash"]  # is another column
    assert encoder.precision == "fp32"


def test_results_stand_in_tables_in_their_unit(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "results", "--device", "cpu", "--batch-size", 2, "--seconds", 0.01)
    answer = neco("speed", "baseline_rgb", "baseline_hog", "--size", 32, *out, "--json")
    results = json.loads(answer.out)
    assert [(r["model"], r["task"]) for r in results] == [
        (model, f"speed_32_{precision}") for model in ("baseline_rgb", "baseline_hog") for precision in ("fp32", "bf16")
    ]
    frame = load_results(tmp_path / "results")
    assert set(frame[frame.primary].metric) == {"images_per_second"}
    answer = neco("leaderboard", "--results", tmp_path / "results", "--out", tmp_path / "board")
    assert answer.code == 0, answer.err
    with (tmp_path / "board" / "speed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"baseline_rgb", "baseline_hog"}
    assert any(name.startswith("speed_32_fp32@speed-1") for name in rows[0])
    metric = ResultStore(tmp_path / "results").load_all()[0].metric()
    assert (metric.text(2124.84), metric.direction, metric.legend) == ("2124.8", "higher", "images/s")


def test_wrong_options(tmp_path: Path) -> None:
    for option, value, said in (
        ("--size", "big", "--size takes pixels"),
        ("--precision", "int8", "Unknown precision 'int8'"),
        ("--seconds", "0", "--seconds above 0"),
    ):
        answer = neco("speed", "baseline_rgb", option, value, "--out", tmp_path)
        assert (answer.code, said in answer.err) == (2, True), answer.err
    with pytest.raises(UsageError):
        SpeedOptions(())


def test_sizes_are_those_of_most_tasks() -> None:
    assert task_sizes() == (224, 448, 512)
