"""`leaderboards/published.csv`: that it parses, and that what it says of our models, tasks and protocols is so."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from neco_bench.core.errors import BadInputError
from neco_bench.core.metric import metric_named
from neco_bench.core.protocol import all_cards
from neco_bench.encoders.zoo import zoo
from neco_bench.reports.published import Published, read_published

FILE = Path(__file__).parents[2] / "leaderboards" / "published.csv"


@pytest.fixture(scope="module")
def rows() -> list[Published]:
    return read_published(FILE)


def test_units_and_directions_are_those_of_the_metrics(rows: list[Published]) -> None:
    assert len(rows) > 800
    for row in rows:
        limit = 100 if row.unit == "percent" else 5
        assert 0 < row.value <= limit, row
        assert row.direction == ("lower" if "rmse" in row.metric.lower() or "decay" in row.metric else "higher"), row
        assert (row.unit, row.direction) == (metric_named(row.metric).unit, metric_named(row.metric).direction)
    counts = Counter((row.unit, row.direction) for row in rows)
    assert counts["metres", "lower"] > 100
    assert counts["percent", "lower"] == 2  # J decay and F decay


@pytest.mark.parametrize(("column", "wrong"), [("unit", "percent"), ("direction", "higher")])
def test_another_unit_or_direction_is_an_error(column: str, wrong: str, tmp_path: Path) -> None:
    head, *lines = FILE.read_text().splitlines()
    line = next(line for line in lines if ",RMSE m,metres,lower," in line)
    file = tmp_path / "published.csv"
    file.write_text(f"{head}\n{line.replace('metres' if column == 'unit' else 'lower', wrong, 1)}\n")
    with pytest.raises(BadInputError, match=rf"line 2: .*{column} is '{wrong}'"):
        read_published(file)


def test_no_number_stands_twice(rows: list[Published]) -> None:
    keys = Counter((r.model, r.arch, r.task, r.protocol, r.metric, r.setting, r.source) for r in rows)
    assert [key for key, count in keys.items() if count > 1] == []


def test_models_written_like_ours_are_in_the_zoo(rows: list[Published]) -> None:
    ours = {row.model for row in rows if re.fullmatch(r"[a-z0-9_]+", row.model)}
    assert ours - set(zoo()) == set()
    assert len(ours) > 25


def test_architecture_and_zoo_entry_agree(rows: list[Published]) -> None:
    patches = {row.model: row.arch.rpartition("/")[2] for row in rows if row.model in zoo() and "/" in row.arch}
    assert {model: str(zoo()[model].stride) for model in patches} == patches


def test_protocols_are_ours_or_marked_as_a_paper_s(rows: list[Published]) -> None:
    ours = {name for card in all_cards()[0].values() for name in card.protocols}
    for row in rows:
        assert row.protocol in ours or re.fullmatch(r"paper:[a-z0-9_-]+", row.protocol), row


def test_our_tasks_have_the_protocol_and_metric_claimed(rows: list[Published]) -> None:
    cards, _ = all_cards()
    known = [row for row in rows if row.task in cards and not row.protocol.startswith("paper:")]
    assert len(known) > 30
    for row in known:
        assert row.protocol in cards[row.task].protocols, row
        assert row.metric == cards[row.task].metric, row


def test_plots_are_marked(rows: list[Published]) -> None:
    assert {row.quality for row in rows if "Figure 2" in row.source} == {"digitised"}
    assert sum(row.quality == "digitised" for row in rows) == 40
