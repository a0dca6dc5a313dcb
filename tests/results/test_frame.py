"""`load_results`: stored results as a pandas table."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import neco_bench
from neco_bench.core.errors import MissingError
from neco_bench.results import frame
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore

EXAMPLE = Path(__file__).parents[2] / "leaderboards" / "example"
Make = Callable[..., Result]


def test_one_row_per_metric_with_types(tmp_path: Path, make_result: Make) -> None:
    store = ResultStore(tmp_path)
    store.save(make_result(0.25, metrics={"miou": 0.25, "accuracy": 0.75}, key="a" * 16))
    store.save(make_result(model="b", status="failed", key="b" * 16, limit=4))
    store.save(make_result(1 / 3, model="c", key="c" * 16, protocol="hbird-2*", changed={"k": 5}, seed=2))
    loaded = neco_bench.load_results(tmp_path)
    assert {name: str(kind) for name, kind in loaded.dtypes.items()} == frame.COLUMNS
    table = loaded.set_index(["model", "metric"])
    assert table.value.dropna().to_dict() == {
        ("dino_vits16", "miou"): 0.25,
        ("dino_vits16", "accuracy"): 0.75,
        ("c", "miou"): 1 / 3,
    }
    assert table.primary.to_dict() == {
        ("dino_vits16", "miou"): True,
        ("dino_vits16", "accuracy"): False,
        ("b", "miou"): True,
        ("c", "miou"): True,
    }
    assert (table.ci95_low["dino_vits16", "miou"], table.ci95_high["dino_vits16", "miou"]) == (0.24, 0.27)
    assert pd.isna(table.ci95_low["dino_vits16", "accuracy"])
    failed = table.loc["b", "miou"]
    assert (failed.status, failed.error, failed.limit) == ("failed", "NaN features in layer 11", 4)
    assert table.rankable.to_dict()["c", "miou"] is False
    assert (table.changed["c", "miou"], table.seed["c", "miou"]) == ('{"k": 5}', 2)
    assert table.changed["dino_vits16", "miou"] is None


def test_the_table_is_what_the_full_tables_hold() -> None:
    table = neco_bench.load_results(EXAMPLE / "results")
    text = pd.concat([pd.read_csv(path, dtype="object") for path in EXAMPLE.glob("*.full.csv")])
    order = ["key", "metric"]
    ours, theirs = (part.sort_values(order).reset_index(drop=True) for part in (table, text))
    assert len(ours) > 50
    for name in ("model", "task", "protocol", "seed", "value", "ci95_low", "ci95_high", "seconds"):
        assert ours[name].equals(theirs[name].astype(ours[name].dtype)), name


def test_no_results_and_no_folder(tmp_path: Path) -> None:
    empty = neco_bench.load_results(tmp_path)
    assert (len(empty), list(empty)) == (0, list(frame.COLUMNS))
    assert empty.value.dtype == "float64"
    with pytest.raises(MissingError, match="nowhere"):
        neco_bench.load_results(tmp_path, tmp_path / "nowhere")


def test_files_that_cannot_be_used_are_named(tmp_path: Path, make_result: Make) -> None:
    ResultStore(tmp_path).save(make_result())
    (tmp_path / "bad.json").write_text("{")
    with pytest.warns(UserWarning, match=r"bad\.json: is not a complete JSON document"):
        table = neco_bench.load_results(tmp_path, tmp_path)
    assert len(table) == 2


def test_the_example_in_the_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE.parents[1])
    assert doctest.testmod(frame) == (0, 4)
