"""Tables of a small hand-written set of results, compared with hand-checked files in `golden/`."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError
from neco_bench.reports.leaderboard import write_leaderboard
from neco_bench.reports.published import Published, read_published
from neco_bench.reports.tables import Table, build_tables
from neco_bench.results.schema import Result

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = Path(__file__).parent / "fixtures" / "published.csv"


@pytest.fixture
def results(make_result: Callable[..., Result]) -> list[Result]:
    made: list[Result] = []

    def add(model: str, value: float = 0.5, **changes: Any) -> None:
        provenance = {"weights_id": model[0] * 64, "protocol_hash": changes.get("protocol", "hbird-2")[0] * 64}
        made.append(
            make_result(value, **({"key": f"{len(made):016x}", "model": model, "provenance": provenance} | changes))
        )

    add("alpha", 0.412)
    add("alpha", 0.5, task="voc_ic")
    add("beta", 0.523)
    add("beta", 0.611, task="voc_ic", seed=0)
    add("beta", 0.615, task="voc_ic", seed=1)
    add("beta", 0.62, task="voc_ic", seed=2)
    add("beta", status="failed", task="voc_ic", seed=3)
    add("gamma|odd, name", 0.9)
    add("gamma|odd, name", status="failed", task="voc_ic")
    add("alpha", 0.45, protocol="clean-1", task="voc_ic")
    for model, value in (("alpha", 0.3), ("beta", 0.4)):
        add(model, value, subset={"train": {"found": 184, "expected": 367}})
    add("beta", 0.35, subset={"train": {"found": 100, "expected": 367}, "test": {"found": 9, "expected": 233}})
    add("alpha", 0.7, limit=10)
    add("alpha", 0.6, protocol="hbird-2*", changed={"k": 50})
    add(
        "alpha",
        0.45678912345,
        family="correspondence",
        task="spair",
        protocol="spair-1",
        primary_metric="pck",
        metrics={"pck": 0.45678912345, "pck_macro": 0.44},
        ci95={},
    )
    return made


def test_golden(results: list[Result], tmp_path: Path) -> None:
    paths = write_leaderboard(results, tmp_path, PUBLISHED)
    assert sorted(path.name for path in paths) == sorted(["report.html", *(path.name for path in GOLDEN.iterdir())])
    for path in paths:
        if path.name == "report.html":  # test_report.py looks at it
            continue
        assert path.read_text(encoding="utf-8") == (GOLDEN / path.name).read_text(encoding="utf-8"), path.name


def test_same_bytes_in_any_order(results: list[Result], tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in write_leaderboard(results, tmp_path / "a", PUBLISHED)}
    for seed in range(20):
        random.Random(seed).shuffle(results)
        again = write_leaderboard(results, tmp_path / "b", PUBLISHED)
        assert {path.name: path.read_bytes() for path in again} == first


def results_of(results: list[Result], family: str) -> list[Result]:
    return [result for result in results if result.family == family]


def ranked(results: list[Result]) -> Table:
    return build_tables(results)[0]


def rows(table: Table, detailed: bool = False) -> list[tuple]:
    frame = table.detailed if detailed else table.frame
    assert frame is not None
    return list(frame.itertuples(index=False, name=None))


def test_unrankable_results_never_stand_in_the_ranked_table(results: list[Result]) -> None:
    text = ranked(results_of(results, "in_context")).to_csv()
    unrankable = [result for result in results if result.status == "ok" and not result.rankable]
    assert len(unrankable) == 5
    for result in unrankable:
        assert f"{100 * result.metrics['miou']:.1f}" not in text


def test_models_rank_over_columns_that_all_have(make_result: Callable[..., Result]) -> None:
    scores = {"worst": (0.1, 0.2), "best": (0.8, 0.9), "tie_b": (0.5, 0.6), "tie_a": (0.6, 0.5)}
    results = [
        make_result(value, key=model + task, model=model, task=task)
        for model, values in scores.items()
        for task, value in zip(("camvid_ic", "voc_ic"), values, strict=True)
    ]
    results.append(make_result(0.99, model="partial"))
    assert list(ranked(results).frame.model) == ["best", "tie_a", "tie_b", "worst", "partial"]


def test_other_weights_under_one_name_are_rows_of_their_own(make_result: Callable[..., Result]) -> None:
    results = [make_result(value, provenance={"weights_id": digit * 64}) for value, digit in ((0.4, "1"), (0.6, "2"))]
    assert rows(ranked(results)) == [
        ("dino_vits16 (weights 22222222)", "60.0"),
        ("dino_vits16 (weights 11111111)", "40.0"),
    ]


def test_a_failure_without_weights_does_not_split_the_row(make_result: Callable[..., Result]) -> None:
    results = [make_result(0.4), make_result(status="failed", task="voc_ic", provenance={})]
    assert rows(ranked(results)) == [("dino_vits16", "40.0", "failed")]


def test_one_protocol_id_with_two_hashes_is_two_columns(make_result: Callable[..., Result]) -> None:
    results = [make_result(0.4, key=digit, provenance={"protocol_hash": digit * 64}) for digit in "12"]
    assert list(ranked(results).frame) == [
        "model",
        "camvid_ic@hbird-2 (hash 11111111)",
        "camvid_ic@hbird-2 (hash 22222222)",
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"key": "fedcba"},
        {"seed": 1, "provenance": {"features": {"layer": 9}}},
        {"seed": 1, "provenance": {"precision": "bf16"}},
    ],
)
def test_results_that_are_not_seeds_of_one_thing_are_ambiguous(
    make_result: Callable[..., Result], other: dict[str, Any]
) -> None:
    results = [make_result(0.4, provenance={"features": {"layer": 11}}), make_result(0.6, **other)]
    (row,) = rows(ranked(results))
    assert row[1] == "ambiguous"


def test_copies_count_once(make_result: Callable[..., Result]) -> None:
    results = [make_result(0.4), make_result(0.4), make_result(0.4, timing={"total": 9.0})]
    for order in (results, results[::-1]):
        table, full = build_tables(order)
        assert rows(table) == [("dino_vits16", "40.0")]
        assert list(full.frame.seconds) == [9.0]


def test_full_table_keeps_full_precision(results: list[Result], tmp_path: Path) -> None:
    write_leaderboard(results, tmp_path)
    with open(tmp_path / "correspondence.full.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["metric"], float(row["value"]), row["primary"]) for row in rows] == [
        ("pck", 0.45678912345, "True"),
        ("pck_macro", 0.44, "False"),
    ]


def test_only_our_stale_tables_are_removed(results: list[Result], tmp_path: Path) -> None:
    write_leaderboard(results, tmp_path, PUBLISHED)
    for name in ("notes.csv", "published.csv", "other.full.csv", "other.csv"):
        (tmp_path / name).write_text("mine,not,yours\n")
    write_leaderboard([result for result in results if result.family == "correspondence"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "correspondence.csv",
        "correspondence.full.csv",
        "correspondence.tex",
        "leaderboard.md",
        "notes.csv",
        "other.csv",
        "other.full.csv",
        "published.csv",
        "report.html",
    ]


def test_no_results(tmp_path: Path) -> None:
    paths = write_leaderboard([], tmp_path / "new", PUBLISHED)
    assert [path.name for path in paths] == ["report.html", "leaderboard.md"]


def beside(results: list[Result], **changes: Any) -> list[tuple[Any, ...]]:
    """(protocol, measured, published, difference) of the rows for one published number."""
    fields = {"arch": "ViT-S/16", "setting": "", "source": "", "quality": "printed", "model": "dino_vits16"}
    fields |= {"task": "camvid_ic", "protocol": "hbird-2", "metric": "miou", "value": "41.3"}
    tables = build_tables(results, [Published(**(fields | changes))])
    return [(row[2], *row[4:7]) for table in tables if table.name.endswith(".published") for row in rows(table)]


def test_difference_is_published_minus_measured(make_result: Callable[..., Result]) -> None:
    result = make_result(0.4, ci95={})
    assert beside([result]) == [("hbird-2", "40.0", "41.3", "+1.3")]
    assert beside([result], value="38.75") == [("hbird-2", "40.0", "38.75", "-1.2")]
    assert beside([result], value="39.99") == [("hbird-2", "40.0", "39.99", "+0.0")]
    seeds = [result, make_result(0.42, seed=1, key="1", ci95={})]
    assert beside(seeds) == [("hbird-2", "41.0 ± 1.4 (2 seeds)", "41.3", "+0.3")]


@pytest.mark.parametrize(
    "changes", [{"protocol": "paper:hbird-1-scann"}, {"protocol": "clean-1"}, {"metric": "accuracy"}]
)
def test_no_difference_between_protocols_or_metrics(
    make_result: Callable[..., Result], changes: dict[str, Any]
) -> None:
    assert beside([make_result(0.4, ci95={})], **changes) == sorted(
        [("hbird-2", "40.0", "", ""), (changes.get("protocol", "hbird-2"), "", "41.3", "")]
    )


def test_no_difference_unless_rankable(make_result: Callable[..., Result]) -> None:
    part = make_result(0.4, ci95={}, subset={"test": {"found": 9, "expected": 233}})
    assert beside([part]) == [("hbird-2 [test 9/233]", "40.0", "41.3", "")]
    assert beside([make_result(0.4, ci95={}, limit=9)]) == [("hbird-2 [limit 9]", "40.0", "41.3", "")]
    changed = make_result(0.4, ci95={}, protocol="hbird-2*", changed={"k": 5})
    assert beside([changed]) == [("hbird-2", "", "41.3", ""), ("hbird-2* [k=5]", "40.0", "", "")]
    assert beside([make_result(0.4), make_result(0.5, key="1")]) == [("hbird-2", "ambiguous", "41.3", "")]


@pytest.mark.parametrize(
    ("result", "published"),
    [({"status": "failed"}, {}), ({}, {"model": "other"}), ({}, {"task": ""}), ({"task": "voc_ic"}, {})],
)
def test_no_table_without_both_numbers(
    make_result: Callable[..., Result], result: dict[str, Any], published: dict[str, str]
) -> None:
    assert beside([make_result(**result)], **published) == []


def test_unusable_published_files(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"nowhere\.csv"):
        read_published(tmp_path / "nowhere.csv")
    text = PUBLISHED.read_text()
    for bad in (text.replace("61.50", "about 61"), text.replace(",arch", ""), text.replace("digitised", "guessed")):
        (tmp_path / "bad.csv").write_text(bad)
        with pytest.raises(BadInputError, match=r"bad\.csv, line \d+: \w+"):
            read_published(tmp_path / "bad.csv")
    head, row = text.splitlines()[:2]
    (tmp_path / "bad.csv").write_text(f"{head}\n{row},one,two\n")
    with pytest.raises(BadInputError, match="line 2: cells beyond the columns"):
        read_published(tmp_path / "bad.csv")
    (tmp_path / "bad.csv").write_bytes(b"model,\xe9")
    for unreadable in (tmp_path, tmp_path / "bad.csv"):
        with pytest.raises(BadInputError, match="is not a readable CSV file in UTF-8"):
            read_published(unreadable)


def test_a_folder_that_cannot_be_written(results: list[Result], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NecoBenchError, match="--out"):
        write_leaderboard(results, tmp_path / "file" / "deeper")


def test_conditions_say_what_each_model_was_given(make_result: Callable[..., Result]) -> None:
    facts: dict[str, dict[str, Any]] = {"features": {"input_size": 512, "used_size": 518, "tokens": 1369}}
    facts["training"] = {"contamination": "near", "data": "LVD-142M"}
    provenance = {"weights_id": "a" * 64, "protocol_hash": "b" * 64, **facts}
    results = [make_result(provenance=provenance), make_result(model="x", key="f" * 16)]
    tables = {table.name: table for table in build_tables(results)}
    table = tables["in_context.conditions"]
    names = ["model", "task", "input_size", "used_size", "tokens", "contamination", "training_data"]
    assert list(table.frame) == names
    assert rows(table) == [("dino_vits16", "camvid_ic@hbird-2", "512", "518", "1369", "near", "LVD-142M")]
    assert table.title == "in context: conditions"


def test_draws_of_a_fraction_show_their_deviation(make_result: Callable[..., Result]) -> None:
    roles = {f"train/{draw}": {"name": "voc2012"} for draw in range(5)}
    provenance = {"weights_id": "a" * 64, "protocol_hash": "b" * 64, "dataset": roles}
    (table, _) = build_tables([make_result(metrics={"miou": 0.666, "miou_std": 0.0123}, provenance=provenance)])
    assert rows(table) == [("dino_vits16", "66.6 ± 1.2")]
    assert rows(table, detailed=True) == [("dino_vits16", "66.6 ± 1.2 (5 draws)")]


def ranking(results: list[Result]) -> dict[Any, Any]:
    (table,) = (table for table in build_tables(results) if table.name.endswith(".ranking"))
    return {row[0]: row[1:] for row in rows(table)}


def test_ranking_counts_only_models_with_every_column(make_result: Callable[..., Result]) -> None:
    scores = {"a": (0.8, 0.6), "b": (0.79, 0.7), "c": (0.5, 0.5), "d": (0.5, None)}
    results = [
        make_result(value, key=model + task, model=model, task=task, ci95={"miou": (value - 0.02, value + 0.02)})
        for model, values in scores.items()
        for task, value in zip(("camvid_ic", "voc_ic"), values, strict=True)
        if value is not None
    ]
    found = ranking(results)
    assert list(found) == ["a", "b", "c", "d"]
    # a and b win once each, their intervals overlap on camvid_ic; b is clearly ahead on voc_ic, yet a leads by name
    assert found["a"] == ("1", "1.50", "3", "", "1..2", "2")
    assert found["b"] == ("1", "1.50", "3", "", "1..2", "1")
    assert found["c"] == ("2", "3.00", "0", "", "3", "3")
    assert found["d"] == ("", "", "", "1", "", "")


def test_equal_values_share_the_borda_point(make_result: Callable[..., Result]) -> None:
    results = [make_result(0.5, key=name, model=name, ci95={}) for name in "ab"]
    assert ranking(results) == {"a": ("1", "1.50", "0.5", "", "1..2"), "b": ("1", "1.50", "0.5", "", "1..2")}


def test_seeds_do_not_make_a_point_of_the_interval(make_result: Callable[..., Result]) -> None:
    """Two models of three seeds each that lie within their intervals share a group."""
    results = [
        make_result(value + 0.001 * seed, key=f"{name}{seed}", model=name, seed=seed, ci95={"miou": (0.2, 0.7)})
        for name, value in (("a", 0.5), ("b", 0.4))
        for seed in range(3)
    ]
    assert {model: (row[0], row[-1]) for model, row in ranking(results).items()} == {
        "a": ("1", "1..2"),
        "b": ("1", "1..2"),
    }


def test_one_model_has_one_name_in_all_tables(make_result: Callable[..., Result]) -> None:
    results = [
        make_result(0.4, provenance={"weights_id": "1" * 64}),
        make_result(0.6, provenance={"weights_id": "2" * 64}),
        make_result(0.6, provenance={"weights_id": "2" * 64}, family="correspondence", task="spair"),
    ]
    for result in results:
        result.provenance["features"] = {"tokens": 784}
    tables = [table for table in build_tables(results) if not table.name.endswith(".full")]
    assert any(table.name.endswith(".conditions") for table in tables)
    names = {name for table in tables for name in table.frame.model}
    assert {"dino_vits16 (weights 11111111)", "dino_vits16 (weights 22222222)"} == names


def test_only_official_weights_join_published_numbers(make_result: Callable[..., Result]) -> None:
    """Others, and those that cannot be verified, are labelled and stand beside no paper's number."""

    def measured(official: dict[str, Any], value: float = 0.4, **changes: Any) -> Result:
        provenance = {"weights_id": "992b337f" * 8, "protocol_hash": "b" * 64, **official}
        return make_result(value, ci95={}, provenance=provenance, **changes)

    assert beside([measured({"official": True})]) == [("hbird-2", "40.0", "41.3", "+1.3")]
    for other in ({"official": False}, {"arguments": {"weights": "other.pth"}}):  # the second of an earlier version
        assert beside([measured(other)]) == []
        names = {name for table in build_tables([measured(other)]) if table.title for name in table.frame.model}
        assert names == {"dino_vits16 (weights 992b337f)"}
    both = [measured({"official": False}, key="1", task="voc_ic"), measured({"official": True})]  # verified since then
    assert {name for table in build_tables(both) if table.title for name in table.frame.model} == {"dino_vits16"}
