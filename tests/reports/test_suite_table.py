"""Tables of suites: the published numbers against the paper's tables, and what stands beside them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import neco_bench.leaderboards
import pytest

from neco_bench.core.suites import Suite, find_suite
from neco_bench.reports.published import Published, read_published
from neco_bench.reports.suite_table import SuiteTable, suite_table
from neco_bench.results.schema import Result
from tests.command import neco

SHIPPED = Path(neco_bench.leaderboards.__file__).with_name("published.csv")


@pytest.fixture(scope="module")
def papers() -> list[Published]:
    return read_published(SHIPPED)


def made(suite: Suite, results: Sequence[Result], papers: Sequence[Published]) -> SuiteTable:
    return suite_table(suite, suite.columns(), results, papers)


# The tables as printed: protocols/neco.md, sections 7.2 to 7.6.
PRINTED = {
    "neco_table1": """
        DINO S/16: 4.3 13.9 17.3 5.4 18.8 19.2 -
        iBOT S/16: 4.4 23.8 31.1 7.6 26.6 28.0 -
        CrOC S/16: 3.4 16.4 20.0 4.9 14.7 18.1 -
        TimeT S/16: 12.2 43.6 46.2 17.5 42.7 44.6 -
        DINOv2R S/14: 12.2 46.7 49.5 12.3 38.9 41.2 35.1
        CrIBo S/16: 18.3 51.3 54.5 14.5 46.0 48.3 -
        NeCo S/14: 17.8 69.4 72.6 18.2 61.2 64.5 55.1
        MaskContrast: - - - - - - 35.1
        DeepSpectral: - - - - - - 37.2
        DINOSAUR: - - - - - - 37.2
        Leopart S/16: - - - - - - 41.7
        COMUS: - - - - - - 50.0""",
    "neco_table2": """
        DINO S/16: 43.9 45.9 50.2 17.5
        TimeT S/16: 58.2 48.7 66.3 20.7
        iBOT S/16: 58.9 51.5 66.1 21.8
        CrOC S/16: 64.3 51.2 67.4 23.1
        CrIBo S/16: 64.3 49.1 71.6 22.7
        DINOv2R S/14: 75.3 56.0 74.2 35.0
        NeCo S/14: 82.3 62.0 81.3 40.1
        DINO B/16: 55.8 51.2 62.7 23.6
        MAE B/16: 38.0 38.6 32.9 5.8
        iBOT B/16: 69.4 55.9 73.1 30.1
        CrIBo B/16: 69.6 53.0 73.9 25.7
        DINOv2R B/14: 78.3 57.6 79.8 40.3
        NeCo B/14: 85.5 63.3 83.3 44.9""",
    "neco_table3": """
        iBOT: 4.4 31.1 66.1 7.6 28.0 58.9
        iBOT + NeCo: 15.4 51.2 68.6 20.4 52.8 67.7
        DINO: 4.3 17.3 50.2 5.4 19.2 43.9
        DINO + NeCo: 14.5 47.9 61.3 16.9 50.0 62.4
        TimeT: 12.2 46.2 66.3 18.4 44.6 58.2
        TimeT + NeCo: 17.9 52.1 68.5 20.6 54.3 64.8
        Leopart: 15.4 51.2 66.5 14.8 53.2 63.0
        Leopart + NeCo: 21.0 55.3 68.3 18.8 53.9 65.4
        CrIBo: 18.3 54.5 71.6 14.5 48.3 64.3
        CrIBo + NeCo: 21.7 59.6 72.1 21.1 54.0 68.0""",
    "neco_figure2": """
        NeCo S/14: 66.6 70.4 76.4 80.3 23.8 27.3 34.0 39.8
        DINOv2R S/14: 53.0 58.0 68.3 75.1 19.7 22.9 30.2 35.9
        CrIBo S/16: 54.0 60.0 67.0 72.5 14.7 17.4 22.8 26.6
        Leopart S/16: 44.6 49.8 58.5 64.5 13.0 14.9 19.7 23.9
        TimeT S/16: 38.1 43.9 55.3 62.4 12.2 14.2 19.0 23.2""",
}


@pytest.mark.parametrize("name", PRINTED)
def test_published_numbers_are_those_of_the_paper_in_its_order(name: str, papers: list[Published]) -> None:
    table = made(find_suite(name), [], papers)
    printed = [line.strip() for line in PRINTED[name].strip().splitlines()]
    assert [f"{model}: {' '.join(cell[0] or '-' for cell in cells)}" for model, cells in table.rows] == printed
    assert not any(measured or difference for _, cells in table.rows for _, measured, difference in cells)


@pytest.fixture
def measured(make_result: Callable[..., Result]) -> Callable[..., Result]:
    numbers = iter(range(100))

    def make(model: str, task: str, value: float = 0.5, **changes: Any) -> Result:
        family = "in_context" if "_ic" in task else "overclustering"
        provenance = {"weights_id": model[0] * 64, "official": changes.pop("official", True)}
        facts = {"key": f"{next(numbers):016x}", "protocol": "neco-1", "family": family, "provenance": provenance}
        return make_result(value, model=model, task=task, **(facts | changes))

    return make


def cell(table: SuiteTable, model: str, column: str) -> tuple[str, str, str]:
    titles = list(table.columns)
    return dict(table.rows)[model][titles.index(column)]


def test_a_difference_stands_where_both_are_the_same_measurement(
    measured: Callable[..., Result], papers: list[Published]
) -> None:
    results = [
        measured("dino_vits16", "voc_cluster_gt", 0.0412),
        measured("dino_vits16", "voc_overcluster_500", 0.2, protocol="clean-1"),  # is of no column
        measured("dino_vits16", "voc_overcluster_300", 0.3, protocol="neco-1*", changed={"passes": 2}),
        measured("dinov2_vits14_reg", "voc_cluster_gt", 0.13, subset={"val": {"found": 200, "expected": 1449}}),
        measured("dinov2_vits14_reg", "voc_overcluster_500", 0.4, limit=8),
        measured("neco_dinov2r_xr", "voc_cluster_gt", 0.2, official=False),
        measured("mine.py:make", "voc_overcluster_500", 0.6),
    ]
    table = made(find_suite("neco_table1"), results, papers)
    assert cell(table, "DINO S/16", "VOC K=GT") == ("4.3", "4.1", "+0.2")
    assert cell(table, "DINO S/16", "VOC K=500") == ("17.3", "", "")
    assert cell(table, "DINO S/16", "VOC K=300") == ("13.9", "", "")
    assert cell(table, "DINOv2R S/14", "VOC K=GT") == ("12.2", "13.0 ‡", "")
    assert cell(table, "DINOv2R S/14", "VOC K=500") == ("49.5", "40.0 ‡", "")
    assert cell(table, "NeCo S/14", "VOC K=GT") == ("17.8", "", "")  # other weights are another row
    assert cell(table, "neco_dinov2r_xr (weights nnnnnnnn)", "VOC K=GT") == ("", "20.0", "")
    assert cell(table, "mine.py:make", "VOC K=500") == ("", "60.0", "")
    assert table.notes == ["‡ VOC K=GT, val 200/1449: DINOv2R S/14.", "‡ VOC K=500, limit 8: DINOv2R S/14."]
    assert [name for name, _ in table.rows[-2:]] == ["mine.py:make", "neco_dinov2r_xr (weights nnnnnnnn)"]


def test_another_protocol_or_task_has_no_difference(measured: Callable[..., Result], papers: list[Published]) -> None:
    figure = made(find_suite("neco_figure2"), [measured("neco_dinov2r_xr", "voc_ic", protocol="hbird-2")], papers)
    assert cell(figure, "NeCo S/14", "VOC 1/1") == ("80.3", "50.0", "")
    shapes = made(find_suite("shapes_core"), [measured("dinov2_vits14_reg", "shapes_cluster_gt")], papers)
    assert cell(shapes, "DINOv2R S/14 on VOC", "K=GT") == ("12.2", "", "")
    assert cell(shapes, "dinov2_vits14_reg", "K=GT") == ("12.2", "50.0", "")


def test_the_whole_data_set_wins_over_parts(measured: Callable[..., Result], papers: list[Published]) -> None:
    parts = [
        measured("dino_vits16", "voc_cluster_gt", 0.1, subset={"val": {"found": 20, "expected": 1449}}, n_images=20),
        measured("dino_vits16", "voc_cluster_gt", 0.2, subset={"val": {"found": 200, "expected": 1449}}, n_images=200),
    ]
    suite = find_suite("neco_table1")
    assert cell(made(suite, parts, papers), "DINO S/16", "VOC K=GT")[1] == "20.0 ‡"
    failed = measured("dino_vits16", "voc_cluster_gt", status="failed")
    assert cell(made(suite, [*parts, failed], papers), "DINO S/16", "VOC K=GT")[1] == "20.0 ‡"
    whole = [*parts, measured("dino_vits16", "voc_cluster_gt", 0.041)]
    assert cell(made(suite, whole, papers), "DINO S/16", "VOC K=GT") == ("4.3", "4.1", "+0.2")


def test_runs_are_known_by_their_folder(measured: Callable[..., Result]) -> None:
    results = [measured("runs/a/odd_even?branch=student", "voc_overcluster_500")]
    table = made(find_suite("neco_ablation_network"), results, [])
    assert [(name, cells[0][1]) for name, cells in table.rows] == [("bitonic", ""), ("odd_even", "50.0")]


def test_every_format_holds_the_same_cells(
    measured: Callable[..., Result], papers: list[Published], tmp_path: Path
) -> None:
    results = [measured("dino_vits16", "voc_cluster_gt", 0.0412), measured("<b>_&", "voc_cluster_gt", 0.5)]
    table = made(find_suite("neco_table3"), results, papers)
    paths = table.write(tmp_path)
    assert [path.suffix for path in paths] == [".csv", ".md", ".tex", ".html"]
    text = {path.suffix: path.read_text(encoding="utf-8") for path in paths}
    rows = list(csv.DictReader(io.StringIO(text[".csv"])))
    assert [row["model"] for row in rows] == [name for name, _ in table.rows]
    dino = rows[2]
    assert [dino[f"VOC K=GT {kind}"] for kind in ("published", "measured", "difference")] == ["4.3", "4.1", "+0.2"]
    assert "| DINO | 4.3 | 4.1 | +0.2 | 17.3 |  |  |" in text[".md"]
    assert r"DINO & 4.3 & 4.1 & +0.2 & 17.3 & -- & -- &" in text[".tex"]
    assert r"<b>\_\& &" not in text[".tex"]
    assert r"\textless{}b\textgreater{}\_\&" in text[".tex"]
    assert "&lt;b&gt;_&amp;" in text[".html"]
    for line in re.findall(r"^[^%\\\n].*\\\\$", text[".tex"], re.MULTILINE):
        assert line.count("&") - line.count(r"\&") == 18 or "multicolumn" in line
    assert {line.count("|") - line.count(r"\|") for line in text[".md"].splitlines() if line.startswith("|")} == {20}
    assert text[".html"].count("<td") == 19 * len(table.rows)


def test_the_command(tmp_path: Path) -> None:
    example = Path("leaderboards/example/results")
    code, out, err = neco("leaderboard", "--suite", "shapes_core,neco_table3", "--results", example, "--out", tmp_path)
    assert code == 0, err
    lines = out.splitlines()
    assert any(line.startswith("baseline_hog") and "64.8" in line for line in lines)
    assert any(line.startswith("Leopart + NeCo") and "68.3" in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{suite}.{end}" for suite in ("shapes_core", "neco_table3") for end in ("csv", "md", "tex", "html")
    )
    code, _, err = neco("leaderboard", "--suite", "neco_ablation_data", "--results", tmp_path, "--out", tmp_path)
    assert code == 0
    assert "suite 'neco_ablation_data' has no stored result" in err
    assert neco("leaderboard", "--suite", "neco_table9", "--out", tmp_path).code == 2
