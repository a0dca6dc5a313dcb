"""Files of results that are damaged, foreign or made up: each is named, and none hides the others."""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from neco_bench.cli.output import print_rows, summary
from neco_bench.core.errors import BadInputError, NecoBenchError
from neco_bench.reports import compare as comparing
from neco_bench.reports.leaderboard import write_leaderboard
from neco_bench.reports.tables import Table, build_tables
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from tests.command import neco

Make = Callable[..., Result]
SETTINGS = {"absent": "exclude", "alphas": [0.1]}
FACTS = {
    "weights_id": "a" * 64,
    "protocol_hash": "b" * 64,
    "settings": SETTINGS,
    "encoder": {"name": "m", "parameters": 22_000_000, "mean": [0.4, 0.4, 0.4]},
    "dataset": {"train/0": {"name": "camvid", "split": "train", "items": 3}},
    "features": {"input_size": 224, "used_size": 224, "tokens": 256},
    "training": {"contamination": "unknown", "data": ""},
}
NUMBERS = (1e308, -1e308, 10**400, -1, 2, 0.5)
VALUES: tuple[Any, ...] = (*NUMBERS, None, True, "", "\ud800", "a\0b", "=1+1", [], {}, [[]], {"a": None}, "x" * 9999)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def full(make: Make, model: str, key: str, **changes: Any) -> Result:
    facts = {"per_class": {"miou": {"sky": 0.5, "road": None}}, "provenance": FACTS, "n_images": 2}
    return make(model=model, key=key * 16, **{**facts, **changes})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("metrics", {"miou": 1e308}, "metrics.miou: Input should be less than or equal to 1"),
        ("metrics", {"miou": -0.2}, "metrics.miou: Input should be greater"),
        ("metrics", {"miou": 37.5}, "metrics.miou: Input should be less"),
        ("metrics", {"miou": 10**400}, "metrics.miou"),
        ("per_class", {"miou": {"sky": 7}}, "per_class.miou.sky"),
        ("ci95", {"miou": [0.2, 1e300]}, "ci95.miou.1"),
        ("n_images", 10**4000, "n_images"),
        ("seed", -1, "seed"),
        ("timing", {"total": 1e308}, "timing.total"),
        ("provenance", {**FACTS, "encoder": {"parameters": 10**500}}, "provenance"),
        ("provenance", {**FACTS, "encoder": None}, "provenance"),
        ("provenance", {**FACTS, "extra": nested(700)}, "is not a"),
        ("provenance", {**FACTS, "extra": nested(100_000)}, "is not a"),
        ("provenance", {**FACTS, "extra": float("inf")}, "is not a"),
        ("model", "\ud800", "is not a valid result"),
        ("changed", {"a": "\udfff"}, "is not a valid result"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "",
)
def test_one_bad_result_hides_no_other(field: str, value: Any, message: str, tmp_path: Path, make_result: Make) -> None:
    store = ResultStore(tmp_path / "r")
    good = full(make_result, "good", "a")
    document = json.loads(store.save(good).read_text()) | {"key": "b" * 16, field: "PLACE"}
    # 1e999 is JSON's only way to an infinite number
    text = repr_json(value).replace("Infinity", "1e999")
    (tmp_path / "r" / "bad.json").write_text(json.dumps(document).replace('"PLACE"', text))
    answer = neco("leaderboard", "--results", tmp_path / "r", "--out", tmp_path / "out")
    assert answer.code == 0
    assert f"warning: {tmp_path / 'r' / 'bad.json'}: " in answer.err
    assert message in answer.err
    assert "good" in (tmp_path / "out" / "in_context.csv").read_text()


def test_a_damaged_result_is_named_before_it_is_computed_again(
    tmp_path: Path, make_result: Make, caplog: pytest.LogCaptureFixture
) -> None:
    store = ResultStore(tmp_path)
    result = full(make_result, "good", "a" * 16)
    path = store.save(result)
    assert store.find(result.key) is not None
    assert not caplog.text
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics": {"miou": 37.5}}))
    assert store.find(result.key) is None
    assert f"A stored result is not used: {path}" in caplog.text


def repr_json(value: Any) -> str:
    """JSON without the limits of Python's writer on depth and digits."""
    depth = 0
    while isinstance(value, list) and value and isinstance(value[0], list):
        value, depth = value[0], depth + 1
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {repr_json(v)}" for k, v in value.items()) + "}"
    return "[" * depth + json.dumps(value) + "]" * depth


@pytest.mark.slow
def test_mutated_results_are_refused_or_usable(tmp_path: Path, make_result: Make) -> None:
    """Any leaf or branch of a document replaced by anything: tables, page and rows are made, of what can be used."""
    store, rng = ResultStore(tmp_path), random.Random(0)
    good = full(make_result, "good", "a")
    other = full(make_result, "other", "b", subset={"train": {"found": 1, "expected": 2}})
    document = json.loads(other.model_dump_json())
    store.save(good)
    refused = 0
    for _ in range(120):
        mutated = copy.deepcopy(document)
        for _ in range(rng.choice([1, 1, 2])):
            place: Any = mutated
            while True:
                key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
                inner = place[key]
                if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
                    break
                place = inner
            place[key] = rng.choice(VALUES)
        (tmp_path / "bad.json").write_text(json.dumps(mutated))
        found = store.load_all()
        assert any(result.model == "good" for result in found)
        refused += bool(store.problems)
        write_leaderboard(found, tmp_path / "out")
        print_rows([summary(result) for result in found], False)
    assert 30 < refused < 114


STATISTICS = {
    "confusion": np.array([[[3, 1], [0, 2]], [[1, 1], [1, 1]]], np.int32),
    "image_id": np.array(["x", "y"]),
}


@pytest.mark.parametrize(
    "changed",
    [
        {"confusion": STATISTICS["confusion"].astype(float) * np.nan},
        {"confusion": -STATISTICS["confusion"]},
        {"confusion": STATISTICS["confusion"][:1]},
        {"confusion": STATISTICS["confusion"][..., :1]},
        {"confusion": np.ones((2, 5, 5), np.int32)},
        {"confusion": np.array(["a", "b"])},
        {"confusion": np.array(3)},
        {"image_id": np.array(["x"])},
        {"confusion": STATISTICS["confusion"].astype(object)},
    ],
)
def test_statistics_of_another_kind_are_refused(
    changed: dict[str, np.ndarray], tmp_path: Path, make_result: Make
) -> None:
    store = ResultStore(tmp_path)
    results = [full(make_result, model, key) for model, key in (("a", "a"), ("b", "b"))]
    results += [full(make_result, model, key, task="other_ic") for model, key in (("a", "c"), ("b", "d"))]
    for result in results:
        store.save(result, STATISTICS)
    assert len(comparing.find_pairs([store], "a", "b", [])) == 2
    path = store._with_key(results[0].key)[0][0].with_suffix(".npz")
    np.savez_compressed(path, **{**STATISTICS, **changed})  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match=r"npz: the stored statistics cannot be read .*--overwrite"):
        store.statistics(results[0])
    (pair,) = comparing.find_pairs([store], "a", "b", [])
    assert (pair.first.task, len(store.problems)) == ("other_ic", 1)
    with pytest.raises(BadInputError):
        comparing.find_pairs([store], "a", "b", ["camvid_ic"])


def test_mutated_statistics_never_break_a_comparison(tmp_path: Path, make_result: Make) -> None:
    store, rng = ResultStore(tmp_path), random.Random(0)
    for model, key in (("a", "a"), ("b", "b")):
        path = store.save(full(make_result, model, key), STATISTICS).with_suffix(".npz")
    content, refused = path.read_bytes(), 0
    for _ in range(80):
        mutated = bytearray(content)
        for _ in range(rng.choice([1, 3, 30])):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        path.write_bytes(mutated[: rng.choice([len(mutated), rng.randrange(len(mutated))])])
        try:
            (pair,) = comparing.find_pairs([store], "a", "b", [])
            comparing.compare_tasks([pair], draws=10)
            comparing.compare_classes(pair, draws=10)
            comparing.compare_images(pair)
        except NecoBenchError:
            refused += 1
    assert refused > 40


def test_a_result_without_its_settings_is_no_traceback(tmp_path: Path, make_result: Make) -> None:
    store = ResultStore(tmp_path)
    for model, key in (("a", "a"), ("b", "b")):
        store.save(full(make_result, model, key, provenance={}, per_class={}), STATISTICS)
    (pair,) = comparing.find_pairs([store], "a", "b", [])
    with pytest.raises(BadInputError, match="does not record absent"):
        comparing.compare_tasks([pair])
    with pytest.raises(BadInputError, match="does not name its classes"):
        comparing.compare_classes(pair)


def test_a_pipe_among_results_is_not_waited_for(tmp_path: Path, make_result: Make) -> None:
    store = ResultStore(tmp_path)
    store.save(full(make_result, "good", "a"))
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    assert [result.model for result in store.load_all()] == ["good"]


def test_cells_that_look_like_formulas_are_text(make_result: Make) -> None:
    names = ["=HYPERLINK(1)", "+cmd", "-2+3", "@sum", "\tx", "plain"]
    results = [full(make_result, name, str(i), error="=1") for i, name in enumerate(names)]
    results.append(full(make_result, "f", "f", status="failed", error="@boom", per_class={}))
    for table in build_tables(results):
        for row in csv.reader(io.StringIO(table.to_csv())):
            for cell in row:
                assert not cell.startswith(("=", "@", "\t", "-2", "+c")), cell
    (wide,) = (table for table in build_tables(results) if table.name == "in_context")
    assert "'=HYPERLINK(1)" in wide.to_csv()
    assert "plain" in wide.to_csv().replace("'plain", "")
    difference = Table("x", "", pd.DataFrame({"model": ["m", "n", "o"], "difference": ["-0.5", "+77.0", "1e-05"]}))
    assert difference.to_csv() == "model,difference\nm,-0.5\nn,+77.0\no,1e-05\n"
