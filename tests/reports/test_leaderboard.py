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


@pytest.mark.slow
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


def test_models_are_in_order_of_their_win_rate(make_result: Callable[..., Result]) -> None:
    scores = {"worst": (0.1, 0.2), "best": (0.8, 0.9), "tie_b": (0.5, 0.6), "tie_a": (0.6, 0.5)}
    results = [
        make_result(value, key=model + task, model=model, task=task)
        for model, values in scores.items()
        for task, value in zip(("camvid_ic", "voc_ic"), values, strict=True)
    ]
    results.append(make_result(0.3, model="partial"))  # beats one of four in its only column
    assert list(ranked(results).frame.model) == ["best", "tie_a", "tie_b", "partial", "worst"]
    results.append(make_result(0.99, key="f" * 16, model="worst", task="ade20k_ic"))  # a column that no other has
    assert list(ranked(results).frame.model) == ["best", "tie_a", "tie_b", "partial", "worst"]


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
    half = 12.706 * 1.0  # t of one degree of freedom; the standard error of 40.0 and 42.0 is 1.0
    ends = f"[{41 - half:.1f}, {41 + half:.1f}]"
    assert beside(seeds) == [("hbird-2", f"41.0 ± 1.4 {ends} (2 seeds)", "41.3", "+0.3")]


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
        with pytest.raises(BadInputError, match="not a readable CSV file in UTF-8"):
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
    names = ["model", "task", "input_size", "used_size", "tokens", "interval_over", "contamination", "training_data"]
    assert list(table.frame) == [*names, "marks"]
    assert rows(table) == [("dino_vits16", "camvid_ic@hbird-2", "512", "518", "1369", "", "near", "LVD-142M", "")]
    assert table.title == "in context: conditions"


def test_draws_of_a_fraction_show_their_deviation(make_result: Callable[..., Result]) -> None:
    roles = {f"train/{draw}": {"name": "voc2012"} for draw in range(5)}
    provenance = {"weights_id": "a" * 64, "protocol_hash": "b" * 64, "dataset": roles}
    metrics, ends = {"miou": 0.666, "miou_std": 0.0123}, {"miou": (0.64, 0.69)}
    (table, _) = build_tables([make_result(metrics=metrics, ci95=ends, provenance=provenance)])
    assert rows(table) == [("dino_vits16", "66.6 ± 1.2")]
    assert rows(table, detailed=True) == [("dino_vits16", "66.6 ± 1.2 [64.0, 69.0] (5 draws)")]


def ranking(results: list[Result]) -> dict[Any, Any]:
    (table,) = (table for table in build_tables(results) if table.name.endswith(".ranking"))
    return {row[0]: row[1:] for row in rows(table)}


def test_win_rates_are_over_the_columns_that_two_models_share(make_result: Callable[..., Result]) -> None:
    scores = {"a": (0.8, 0.6), "b": (0.79, 0.7), "c": (0.5, 0.5), "d": (0.5, None)}
    results = [
        make_result(value, key=model + task, model=model, task=task, ci95={"miou": (value - 0.02, value + 0.02)})
        for model, values in scores.items()
        for task, value in zip(("camvid_ic", "voc_ic"), values, strict=True)
        if value is not None
    ]
    found = ranking(results)
    assert list(found) == ["a", "b", "c", "d"]
    assert found["a"][:3] == ("83 %", "2 of 2", "1..2")  # half of b's two columns, both of c's, the one of d's
    assert found["b"] == ("83 %", "2 of 2", "1..2", "1")
    assert found["c"] == ("17 %", "2 of 2", "3..4", "3")  # c and d tie in their one column
    assert found["d"] == ("17 %", "1 of 2", "3..4", "")


def test_a_result_without_an_interval_has_an_open_rank(make_result: Callable[..., Result]) -> None:
    results = [make_result(value, key=name, model=name, ci95={}) for name, value in (("a", 0.5), ("b", 0.9))]
    results.append(make_result(0.1, key="c", model="c"))
    results.append(make_result(0.99, key="d", model="d"))
    assert {model: row[-1] for model, row in ranking(results).items()} == {
        "d": "1..3",  # better than c alone: a and b cannot be tested
        "b": "1..4",
        "a": "1..4",
        "c": "2..4",
    }
    (table,) = (table for table in build_tables(results) if table.name.endswith(".ranking"))
    assert table.frame.columns[-1] == "camvid_ic@hbird-2 (not tested)"


def test_a_wide_interval_does_not_tie_what_lies_apart(make_result: Callable[..., Result]) -> None:
    """A 60 [30, 90] can be told from none, yet B, C and D are told apart."""
    scores = {"a": (0.6, 0.3), "b": (0.55, 0.02), "c": (0.4, 0.02), "d": (0.29, 0.02)}
    results = [
        make_result(value, key=name, model=name, ci95={"miou": (value - half, value + half)})
        for name, (value, half) in scores.items()
    ]
    assert {name: row[-1] for name, row in ranking(results).items()} == {
        "a": "1..4",
        "b": "1..2",
        "c": "2..3",
        "d": "3..4",
    }


def test_a_column_of_one_model_takes_nobodys_rank(make_result: Callable[..., Result]) -> None:
    results = [
        make_result(value, key=name + task, model=name, task=task, ci95={"miou": (value - 0.01, value + 0.01)})
        for name, value in (("a", 0.5), ("b", 0.4))
        for task in ("camvid_ic", "voc_ic")
    ]
    results.append(make_result(0.9, key="c", model="c", task="ade20k_ic"))
    found = ranking(results)
    assert list(found) == ["a", "b", "c"]
    assert found["a"] == ("100 %", "2 of 3", "1", "1")
    assert found["c"] == ("", "1 of 3", "", "")  # the third column has no test, and no place in this table


def test_seeds_that_differ_much_leave_ranks_open(make_result: Callable[..., Result]) -> None:
    """Three seeds 51.0 ± 10.1 and 41.0 ± 10.1: both have either rank, and the interval shows the spread of seeds."""
    spread = (-0.101, 0.0, 0.101)
    results = [
        make_result(
            value + step,
            key=f"{name}{seed}",
            model=name,
            seed=seed,
            ci95={"miou": (value + step - 0.01, value + step + 0.01)},
        )
        for name, value in (("a", 0.51), ("b", 0.41))
        for seed, step in enumerate(spread)
    ]
    assert {model: row[-1] for model, row in ranking(results).items()} == {"a": "1..2", "b": "1..2"}
    (a, _) = rows(ranked(results), detailed=True)
    low, high = (float(end) for end in a[1].partition("[")[2].partition("]")[0].split(","))
    half = 4.303 * 10.1 / 3**0.5  # t of two degrees of freedom, and the interval of items beside it
    assert 51 - half - 0.5 < low < 51 - half + 0.5
    assert high - low == pytest.approx(2 * half, rel=0.02)


def test_less_is_better_where_the_metric_says_so(make_result: Callable[..., Result]) -> None:
    results = [
        make_result(
            key=name,
            model=name,
            task="nyuv2_depth",
            primary_metric="rmse",
            metrics={"rmse": value},
            ci95={"rmse": (value - 0.01, value + 0.01)},
        )
        for name, value in (("a", 0.402), ("b", 1.31))
    ]
    table = ranked(results)
    assert list(table.frame) == ["model", "nyuv2_depth@hbird-2 (m, lower is better)"]
    assert rows(table) == [("a", "0.402"), ("b", "1.310")]
    assert rows(table, detailed=True)[0] == ("a", "0.402 [0.392, 0.412]")
    assert r"a & \textbf{0.402}" in table.to_latex()
    assert ranking(results) == {"a": ("100 %", "1 of 1", "1"), "b": ("0 %", "1 of 1", "2")}


def conditions(results: list[Result]) -> dict[tuple[str, str], str]:
    (table,) = (table for table in build_tables(results) if table.name.endswith(".conditions"))
    return {(row[0], row[1]): row[-1] for row in rows(table)}


def facts(**changes: Any) -> dict[str, Any]:
    known: dict[str, Any] = {
        "weights_id": "a" * 64,
        "protocol_hash": "b" * 64,
        "card_hash": "c" * 64,
        "precision": "fp32",
    }
    known |= {"dataset_fingerprint": {"val": "d" * 64}, "encoder": {"stride": 14}}
    known |= {"features": {"input_size": 504, "used_size": 504}, "packages": {"neco-bench": "0.2.0", "torch": "2.14.1"}}
    return known | changes


@pytest.mark.parametrize("fact", ["card_hash", "protocol_hash", "dataset_fingerprint"])
def test_what_compare_refuses_has_a_column_of_its_own(make_result: Callable[..., Result], fact: str) -> None:
    other = {"val": "e" * 64} if fact == "dataset_fingerprint" else "e" * 64
    results = [
        make_result(0.4, model="a", provenance=facts()),
        make_result(0.5, key="b", model="b", provenance=facts(**{fact: other})),
    ]
    assert len(ranked(results).frame.columns) == 3
    assert not any(table.name.endswith(".ranking") for table in build_tables(results))


@pytest.mark.parametrize(
    ("changes", "mark"),
    [
        ({"precision": "bf16"}, "precision bf16, others fp32"),
        ({"features": {"input_size": 504, "used_size": 224}}, "size 224 px, others as requested"),
        ({"packages": {"neco-bench": "0.1.9", "torch": "2.14.1"}}, "stale: neco-bench 0.1.9, newest 0.2.0"),
        ({"packages": {"neco-bench": "0.2.0", "torch": "2.7.0"}}, "torch 2.7.0, others 2.14.1"),
    ],
)
def test_other_conditions_are_marked(make_result: Callable[..., Result], changes: dict[str, Any], mark: str) -> None:
    results = [make_result(0.4, key=name, model=name, provenance=facts()) for name in "ab"]
    results.append(make_result(0.5, key="c", model="c", provenance=facts(**changes)))
    assert rows(ranked(results)) == [("c", "50.0 †"), ("a", "40.0"), ("b", "40.0")]
    assert conditions(results)["c", "camvid_ic@hbird-2"] == mark
    assert conditions(results)["a", "camvid_ic@hbird-2"] == ""


def test_sizes_that_strides_ask_for_are_not_marked(make_result: Callable[..., Result]) -> None:
    results = [make_result(0.4, model="a", provenance=facts())]
    sizes = {"features": {"input_size": 504, "used_size": 512}, "encoder": {"stride": 16}}
    results.append(make_result(0.5, key="b", model="b", provenance=facts(**sizes)))
    assert rows(ranked(results)) == [("b", "50.0"), ("a", "40.0")]


def test_a_failed_seed_and_an_interval_of_schema_1_are_marked(make_result: Callable[..., Result]) -> None:
    results = [make_result(0.4, provenance=facts()), make_result(seed=1, key="1", status="failed", provenance=facts())]
    results.append(make_result(0.3, key="2", model="old", schema_version=1, provenance=facts()))
    assert conditions(results)["dino_vits16", "camvid_ic@hbird-2"] == "1 of 2 runs failed"
    assert conditions(results)["old", "camvid_ic@hbird-2"].startswith("interval of an earlier version")
    assert rows(ranked(results)) == [("dino_vits16", "40.0 †"), ("old", "30.0 †")]
    assert {row[-1] for row in ranking(results).values()} == {"1..2"}  # nothing is tested by the old one


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
