"""What stored statistics say of a result: its metric again, its intervals and units, and the order of its items."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neco_bench.core.errors import BadInputError
from neco_bench.core.metric import Metric, metric_named
from neco_bench.metrics.segmentation import mean_iou
from neco_bench.results.schema import Drawn, Result
from neco_bench.results.statistics import in_order, sampling_of, with_intervals
from neco_bench.results.store import ResultStore

Make = Callable[..., Result]

TINY = Path(__file__).parents[2] / "leaderboards" / "tiny" / "results"


def counts(images: int = 12) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 40, (images, 3, 3)) + 60 * np.eye(3, dtype=int)


def segmented(make_result: Make, confusion: np.ndarray, **changes: Any) -> Result:
    provenance = {"settings": {"absent": "exclude"}, "dataset": {"val": {"name": "camvid"}}}
    fields: dict[str, Any] = {
        "primary_metric": "mIoU",
        "metrics": {"mIoU": mean_iou(confusion.sum(0), absent="exclude")},
        "ci95": {},
    }
    fields |= {"n_images": len(confusion), "provenance": provenance}
    return make_result(**(fields | changes))


def test_an_edited_metric_is_an_error_of_its_file_alone(make_result: Make, tmp_path: Path) -> None:
    store, confusion = ResultStore(tmp_path), counts()
    ids = {"image_id": np.array([f"0016E5_{i}" for i in range(12)])}
    paths = [
        store.save(segmented(make_result, confusion, key=key * 16, model=key), {"confusion": confusion, **ids})
        for key in "ab"
    ]
    assert len(store.load_all()) == 2
    document = json.loads(paths[0].read_text())
    document["metrics"]["mIoU"] = 0.9
    paths[0].write_text(json.dumps(document))
    assert [result.model for result in store.load_all()] == ["b"]
    (problem,) = store.problems
    assert problem.startswith(str(paths[0]))
    assert "mIoU of a" in problem
    assert "is 0.9, but its stored counts give" in problem
    assert store.find("a" * 16) is None  # it is run again, not returned


def test_edited_points_are_found_too(make_result: Make, tmp_path: Path) -> None:
    arrays = {
        "hits": np.array([[1, 2], [0, 3], [2, 2]]),
        "totals": np.array([2, 4, 3]),
        "category": np.array([0, 0, 1]),
        "pair_id": np.array(["x", "y", "z"]),
        "images": np.array([[0, 1], [1, 2], [3, 4]]),
    }
    settings = {"alphas": [0.05, 0.1], "average": "points"}
    common = {"primary_metric": "PCK@0.10", "ci95": {}, "n_images": 3, "provenance": {"settings": settings}}
    store = ResultStore(tmp_path)
    store.save(make_result(key="a", metrics={"PCK@0.10": 7 / 9}, **common), arrays)
    store.save(make_result(key="b", metrics={"PCK@0.10": 0.8}, **common), arrays)
    assert [result.key for result in store.load_all()] == ["a"]
    assert "stored counts give 0.777778" in store.problems[0]


def test_intervals_of_schema_1_are_made_again_from_counts(make_result: Make, tmp_path: Path) -> None:
    store, confusion = ResultStore(tmp_path), counts()
    old = {"schema_version": 1, "ci95": {"mIoU": (0.1, 0.2)}}
    ids = np.array([f"0016E5_{i}" for i in range(12)])
    store.save(segmented(make_result, confusion, key="a", **old), {"confusion": confusion, "image_id": ids})
    store.save(segmented(make_result, confusion, key="b", **old))  # without counts
    again, stored = store.load_all()
    low, high = again.ci95["mIoU"]
    assert low < again.metrics["mIoU"] < high
    assert again.drawn is not None
    assert (again.drawn.unit, again.drawn.groups) == ("frame", 1)
    assert "frames of one drive" in again.drawn_text
    assert (stored.ci95["mIoU"], stored.drawn, stored.has_old_interval) == ((0.1, 0.2), None, True)
    assert not again.has_old_interval


def test_the_interval_of_camvid_is_that_of_blocks_of_one_drive() -> None:
    """22.5 [22.3, 22.7] as if frames were independent; they are 101 in a row."""
    result = next(r for r in ResultStore(TINY).load_all() if (r.model, r.task) == ("tiny_neco", "camvid_ic"))
    low, high = result.ci95["mIoU"]
    assert result.metrics["mIoU"] == pytest.approx(0.2251, abs=1e-4)
    assert (low, high) == pytest.approx((0.219, 0.231), abs=0.0015)
    assert result.drawn is not None
    assert result.drawn.unit == "frame"
    assert result.drawn.units < 20
    assert result.drawn.method.startswith("moving blocks of")


def test_rare_and_absent_classes_are_noted(make_result: Make) -> None:
    confusion = counts()
    confusion[3:, 1] = 0  # in three images
    confusion[:, 2] = 0  # in none
    result = segmented(make_result, confusion)
    result.provenance["settings"]["absent"] = "zero"
    found = with_intervals(result, {"confusion": confusion})
    assert found.drawn is not None
    assert found.drawn.notes[:2] == [
        "1 of 3 classes are in fewer than 5 images",
        "1 of 3 classes are in no image and count as 0",
    ]


def test_scores_of_objects_are_drawn_by_sequence(make_result: Make) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "item_id": np.array([f"{s}/{o}" for s in "abcdefgh" for o in range(3)]),
        "group": np.repeat(list("abcdefgh"), 3),
        "score/J&F": rng.random(24),
        "score/J_decay": rng.random(24) - 0.5,
        "square/rmse": rng.random(24),
    }
    values = {"J&F": arrays["score/J&F"].mean(), "J_decay": arrays["score/J_decay"].mean()}
    values["rmse"] = arrays["square/rmse"].mean() ** 0.5
    provenance = {"dataset": {"val": {"name": "davis2017", "sampling_unit": "sequence"}}}
    result = make_result(metrics=values, primary_metric="J&F", ci95={}, n_images=24, provenance=provenance)
    found = with_intervals(result, arrays)
    assert found.drawn is not None
    assert (found.drawn.unit, found.drawn.units) == ("sequence", 8)
    assert set(found.ci95) == {"J&F", "J_decay", "rmse"}
    for name, (low, high) in found.ci95.items():
        assert low < values[name] < high


def test_items_are_put_in_order_by_id() -> None:
    arrays = {"image_id": np.array(["b", "a", "c"]), "confusion": np.arange(12).reshape(3, 2, 2)}
    again = in_order(arrays, ["a", "b", "c"])
    assert again["image_id"].tolist() == ["a", "b", "c"]
    assert again["confusion"][:, 0, 0].tolist() == [4, 0, 8]
    repeats = {"image_id": arrays["image_id"], "confusion": arrays["confusion"][None], "score/x": np.array([1, 2, 3])}
    assert in_order(repeats, ["a", "b", "c"])["confusion"].shape == (1, 3, 2, 2)
    assert in_order(repeats, ["a", "b", "c"])["score/x"].tolist() == [2, 1, 3]
    with pytest.raises(BadInputError, match="belong to different items"):
        in_order(arrays, ["a", "b", "d"])


@pytest.mark.parametrize(
    ("name", "ids", "unit", "groups"),
    [
        ("camvid", ["0001TP_1", "0001TP_2", "Seq05VD_f1"], "frame", [0, 0, 1]),
        ("cityscapes", ["lindau/lindau_0", "munster/munster_0"], "frame", [0, 1]),
        ("nyuv2", ["0001", "0002", "0009", "0014"], "scene", [0, 0, 2, 1]),
        ("voc2012", ["2007_000033"], "image", None),
        ("of a plug-in that is gone", ["x"], "image", None),
    ],
)
def test_the_unit_is_a_fact_of_the_data_set(
    name: str, ids: list[str], unit: str, groups: list[int] | None, make_result: Make
) -> None:
    result = make_result(provenance={"dataset": {"val": {"name": name}}})
    sampling = sampling_of(result, {"image_id": np.array(ids), "confusion": np.zeros((len(ids), 1, 1), int)})
    assert sampling.unit == unit
    if groups is None:
        assert sampling.groups is None
    else:
        assert sampling.groups is not None
        assert [int(np.flatnonzero(sampling.groups == g)[0]) for g in sampling.groups] == [
            groups.index(g) for g in groups
        ]


@pytest.mark.parametrize(
    ("name", "value"), [("rmse", 0.4), ("rmse", 12.0), ("J_decay", -0.2), ("mean_angle", 20.0), ("abs_rel", 1.3)]
)
def test_values_outside_zero_and_one_are_results(name: str, value: float, make_result: Make, tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    result = make_result(metrics={name: value}, primary_metric=name, ci95={name: (value - 0.01, value + 0.01)})
    store.save(result)
    assert store.load_all() == [result]


@pytest.mark.parametrize(("name", "value"), [("rmse", -0.1), ("J_decay", -1.2), ("mean_angle", 181.0), ("mIoU", 1.1)])
def test_values_outside_their_range_are_not(name: str, value: float, make_result: Make) -> None:
    with pytest.raises(ValueError, match=rf"metrics\.{name}: Input should be"):
        make_result(metrics={name: value}, primary_metric=name, ci95={})


def test_a_plug_in_states_the_unit_of_its_metric(make_result: Make) -> None:
    units = {"distance": Metric(unit="metres", lower_is_better=True, high=None)}
    result = make_result(metrics={"distance": 7.0}, primary_metric="distance", ci95={}, units=units)
    assert result.metric().text(7.0) == "7.000"
    assert metric_named("distance").unit == "percent"


@pytest.mark.parametrize("version", [0, -1, True, "1", None])
def test_schemas_that_never_were_are_refused(version: object, make_result: Make, tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    path = store.save(make_result())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": version}))
    assert store.load_all() == []
    assert "no schema_version from 1 on" in store.problems[0]


@pytest.mark.parametrize(
    ("drawn", "text"),
    [
        (Drawn(unit="pair of images", units=2, method="jackknife"), "2 pairs of images"),
        (Drawn(unit="frame", units=1, groups=1, method="moving blocks of 4"), "1 block of frames"),
        (Drawn(unit="image", units=80, repeats=3, method="jackknife"), "80 images and 3 seeds or draws"),
    ],
)
def test_units_have_a_plural(drawn: Drawn, text: str) -> None:
    assert drawn.text == text
