"""`show --layers`: the curve of a sweep is made of the stored scores and intervals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neco_bench.core.errors import MissingError
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from neco_bench.viz.layers import BAND, draw_layers, layer_curves
from tests.command import neco

Make = Callable[..., Result]


def of_layers(make: Make, values: list[float], half: list[float] | None = None, **changes: object) -> list[Result]:
    """A result for each value, of `half` the width of the interval."""
    widths = half or [0.02] * len(values)
    return [
        make(value, **{"key": f"{layer:x}{'a' * 15}", "model": f"vit[layers={layer}]", **changes})
        .model_copy(update={"ci95": {"miou": (value - width, value + width)}})
        for layer, (value, width) in enumerate(zip(values, widths, strict=True))
    ]  # fmt: skip


def test_curves_are_the_scores_of_single_layers(make_result: Make) -> None:
    results = of_layers(make_result, [0.3, 0.5, 0.4])
    results += [
        make_result(0.9, key="b" * 16, model="vit"),
        make_result(0.9, key="c" * 16, model="vit[layers=1,2]"),
        make_result(0.9, key="d" * 16, model="other[layers=1]"),
        make_result(key="e" * 16, model="vit[layers=3]", status="failed"),
        make_result(0.2, key="f" * 16, model="vit[layers=0]", seed=1),  # a second seed
        make_result(0.7, key="9" * 16, model="vit[layers=0]", task="ade20k_ic"),
    ]
    (curve,) = layer_curves(results, "vit", ["camvid*"])
    assert [(s.layer, s.value) for s in curve.scores] == [(0, pytest.approx(0.25)), (1, 0.5), (2, 0.4)]
    assert (curve.scores[0].repeats, curve.scores[1].low, curve.scores[1].high) == (2, 0.48, 0.52)
    assert curve.scores[0].high - curve.scores[0].low > 0.04  # the spread of the seeds is in it
    assert (curve.best.layer, curve.lacking, curve.column) == (1, [3], "camvid_ic@hbird-2")
    assert [c.column for c in layer_curves(results, "vit", [])] == ["ade20k_ic@hbird-2", "camvid_ic@hbird-2"]
    for model, tasks in (("absent", []), ("vit", ["spair"])):
        with pytest.raises(MissingError, match="--layers all"):
            layer_curves(results, model, tasks)


def test_other_weights_are_another_curve(make_result: Make) -> None:
    results = of_layers(make_result, [0.3, 0.5])
    other = {"weights_id": "c" * 64, "protocol_hash": "b" * 64}
    results += of_layers(make_result, [0.6, 0.1], provenance=other)
    results[2:] = [result.model_copy(update={"key": f"{result.key[:1]}{'b' * 15}"}) for result in results[2:]]
    curves = layer_curves(results, "vit", [])
    assert [[s.value for s in curve.scores] for curve in curves] == [[0.3, 0.5], [0.6, 0.1]]
    assert len({curve.model for curve in curves}) == 2


def test_the_band_has_the_width_of_the_intervals(make_result: Make) -> None:
    results = of_layers(make_result, [0.5] * 4, [0.02, 0.02, 0.04, 0.04])
    (curve,) = layer_curves(results, "vit", [])
    picture = draw_layers(curve)
    inside = (np.abs(picture.astype(int) - BAND).sum(2) < 6).sum(0)  # pixels of each column
    first, last = np.flatnonzero(inside)[[0, -1]]
    sixth = (last - first) // 6
    assert inside[last - sixth] == pytest.approx(2 * inside[first + sixth], abs=8)  # without the line of the scores
    middle = np.flatnonzero(np.abs(picture[:, first + sixth].astype(int) - BAND).sum(1) < 6)
    around = np.flatnonzero(np.abs(picture[:, last - sixth].astype(int) - BAND).sum(1) < 6)
    assert (middle[0] + middle[-1]) / 2 == pytest.approx((around[0] + around[-1]) / 2, abs=1)


def test_pages_and_pictures_are_written(make_result: Make, tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results")
    for result in of_layers(make_result, [0.3, 0.5, 0.4]):
        store.save(result, None)
    depth = {"task": "nyu_depth", "family": "dense_regression", "primary_metric": "rmse", "protocol": "clean-1"}
    for layer, value in enumerate((0.7, 0.61234, 0.9)):
        changes = {"key": f"{layer}{'d' * 15}", "model": f"vit[layers={layer}]", "metrics": {"rmse": value}, "ci95": {}}
        store.save(make_result(**depth, **changes), None)
    places = ("--layers", "--results", store.folder, "--out", tmp_path / "pictures")
    rows = json.loads(neco("show", "vit", *places, "--json").out)
    assert [(row["layers"], row["best_layer"]) for row in rows] == [(3, 1), (3, 1)]
    assert (rows[0]["miou"], rows[1]["rmse"]) == (0.5, 0.61234)  # of which less is better
    page = Path(rows[0]["page"])
    assert "<td>1</td><td>50.0</td><td>[48.0, 52.0]</td>" in page.read_text(encoding="utf-8")
    assert "0.612" in Path(rows[1]["page"]).read_text(encoding="utf-8")
    with Image.open(page.with_name("layers.png")) as picture:
        assert picture.size == (960, 540)
    answer = neco("show", "vit", "--task", "nyu_depth", *places)
    assert "0.612" in answer.out
    assert "camvid" not in answer.out
    assert neco("show", "absent", *places).code == 3
