"""`run --layers all`: one result per block, each that of `--layers N`, from the forward passes of a single one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import neco_bench
from neco_bench.results.schema import Result
from neco_bench.runner.estimate import Rates
from tests.command import Answer, neco

pytestmark = pytest.mark.usefixtures("own_store")

MODEL, DEPTH, IMAGES = "timm:test_vit?pretrained=false", 6, 2
OPTIONS: dict[str, Any] = {"limit": IMAGES, "workers": 0, "changes": {"input_size": 64, "neighbours": 4}}


def run(*more: object, model: str = MODEL) -> Answer:
    words = ("--limit", IMAGES, "--workers", 0, "--set", "input_size=64", "--set", "neighbours=4")
    return neco("run", "--model", model, "--task", "shapes_ic", *words, "--layers", "all", *more, "--json")


def numbers(result: Result) -> tuple[object, ...]:
    return result.key, result.model, result.metrics, result.ci95, result.per_class


@pytest.mark.slow
def test_a_sweep_makes_the_passes_of_one_layer(encoded: list[int], tmp_path: Path) -> None:
    alone = [neco_bench.run(MODEL, "shapes_ic", layers=n, features="off", **OPTIONS) for n in ("0", "3")]
    assert sum(encoded) == 2 * (IMAGES + IMAGES)  # of train and val
    encoded.clear()
    swept = neco_bench.run(MODEL, ["shapes_ic"], layers="all", out=tmp_path / "results", **OPTIONS)
    assert sum(encoded) == IMAGES + IMAGES
    assert [result.model for result in swept] == [f"{MODEL}[layers={layer}]" for layer in range(DEPTH)]
    assert [numbers(result) for result in (swept[0], swept[3])] == [numbers(result) for result in alone]
    assert len({result.metrics["mIoU"] for result in swept}) > 1
    again = neco_bench.run(MODEL, "shapes_ic", layers="all", out=tmp_path / "results", **OPTIONS)
    assert list(map(numbers, again)) == list(map(numbers, swept))
    assert sum(encoded) == IMAGES + IMAGES


@pytest.mark.slow
def test_what_is_stored_is_left_and_the_cost_told_once(
    encoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rates, "loading", lambda *_: 0.0)
    monkeypatch.setattr(Rates, "search", lambda *_: float("inf"))
    monkeypatch.setattr(Rates, "encoding", lambda _, encoder, *__: 360.0 * (1 + encoder.indices[-1]))  # by depth
    single = neco_bench.run(MODEL, "shapes_ic", layers="1", out=tmp_path, **OPTIONS)

    def forecast(*own: object) -> tuple[list[float | None], str]:
        answer = run("--out", tmp_path, "--dry-run", *own)
        rows = json.loads(answer.out)
        assert [row["model"] for row in rows] == [f"{MODEL}[layers={layer}]" for layer in range(DEPTH)]
        assert [row["stored"] for row in rows] == [layer == 1 for layer in range(DEPTH)]
        return [row["hours"] for row in rows], answer.err

    images = IMAGES + IMAGES
    hours, message = forecast()
    assert hours == [pytest.approx(0.1 * images * DEPTH), None, 0, 0, 0, 0]
    assert "hours of the first" in message
    for own in (("--features", "off"), ("--job-timeout", 60)):  # a launcher is treated as the latter
        hours, message = forecast(*own)
        assert hours == [None if layer == 1 else pytest.approx(0.1 * images * (layer + 1)) for layer in range(DEPTH)]
        assert "hours of the first" not in message
    encoded.clear()
    swept = [Result.model_validate(result) for result in json.loads(run("--out", tmp_path).out)]
    assert sum(encoded) == images
    assert (swept[1].timing, numbers(swept[1])) == (single.timing, numbers(single))  # was not run again


@pytest.mark.slow
def test_stages_of_a_cnn_have_passes_of_their_own(encoded: list[int], tmp_path: Path) -> None:
    model = "timm:test_resnet?pretrained=false"
    swept = json.loads(run("--out", tmp_path, model=model).out)
    assert [result["error"] for result in swept] == [None] * 5
    assert sum(encoded) == (IMAGES + IMAGES) * 5


def test_encoders_without_layers_are_refused(tmp_path: Path) -> None:
    answer = run("--out", tmp_path, model="baseline_hog")
    assert answer.code == 2
    assert "baseline_hog" in answer.err
    assert "layers" in answer.err
