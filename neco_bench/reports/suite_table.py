"""The table of a suite: its rows and columns in their order, with published, measured and difference side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import pandas as pd

from neco_bench.core.files import write_whole
from neco_bench.core.metric import Metric, metric_named
from neco_bench.core.suites import Suite, SuiteColumn, SuiteModel
from neco_bench.reports.grid import cells_of, runs_frame
from neco_bench.reports.published import Published
from neco_bench.reports.render import render
from neco_bench.reports.tables import cell_texts, without_formulas
from neco_bench.reports.words import SUITES
from neco_bench.results.schema import Result

KINDS = ("published", "measured", "difference")

PART = "‡"  # of cells measured on part of the data, or with --limit

_KIND_ORDER = {"": 0, ".subset": 1, ".unranked": 2}


@dataclass(frozen=True)
class SuiteTable:
    """A suite as it is printed.

    rows: model, then by column and kind (KINDS) the text of the cell, "" where there is none. columns: titles, with
    unit and direction where these are not the usual ones. notes: what marks in cells mean here.
    """

    suite: Suite
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[str, str, str]]]]
    notes: Sequence[str]

    def frame(self) -> pd.DataFrame:
        """Arrange it with one header line: `model`, then "TITLE published", "TITLE measured", "TITLE difference"."""
        header = ["model", *(f"{title} {kind}" for title in self.columns for kind in KINDS)]
        return pd.DataFrame(
            [[name, *(text for cell in cells for text in cell)] for name, cells in self.rows], columns=header
        )

    def contents(self) -> dict[str, str]:
        """Write it as CSV, Markdown, LaTeX and HTML, by name of file."""
        values = {"table": self, "kinds": KINDS, "words": SUITES}
        name = self.suite.id
        return {
            f"{name}.csv": without_formulas(self.frame()).to_csv(index=False, lineterminator="\n"),
            **{f"{name}.{end}": render(f"suite.{end}", **values) for end in ("md", "tex", "html")},
        }

    def write(self, out: Path) -> list[Path]:
        """Write all files into a folder, which is made where there is none. Raises NecoBenchError where that fails."""
        contents = self.contents()
        for name, text in contents.items():
            write_whole(out / name, text.encode())
        return [out / name for name in contents]


def suite_table(
    suite: Suite, columns: Sequence[SuiteColumn], results: Iterable[Result], published: Iterable[Published] = ()
) -> SuiteTable:
    """Make the table of a suite.

    Rows are those of the suite, then other models that were measured on one of its columns, by name. Of a run of the
    suite, the measured model is a run folder of its name. A cell holds the result of the whole data set, else that of a
    part, which is marked; results of protocols changed by --set are left out. The difference is published minus
    measured; it stands where task and protocol are the same, the whole data set was measured, and the weights are the
    official ones.

    Args:
        suite: the suite.
        columns: its columns (`Suite.columns`).
        results: results of any models and tasks.
        published: rows of published.csv, of which those of the suite's sources count.
    """
    cells = _measured(columns, results)
    papers = (
        [paper for paper in published if paper.source.startswith(tuple(suite.published))] if suite.published else []
    )
    known = {row.model for row in suite.rows if row.model}
    folders = {run.folder for run in suite.runs}
    measured_rows = {model: _run_of(model, folders) or model for model, _ in cells}
    others = sorted({row for model, row in measured_rows.items() if row not in known | folders})
    rows = [*suite.rows, *(SuiteModel(model=name) for name in others)]
    units: dict[int, Metric] = {}
    texts: list[tuple[str, list[tuple[str, str, str]]]] = []
    notes: dict[str, list[str]] = {}
    for row in rows:
        line = []
        for number, column in enumerate(columns):
            paper = _paper(papers, row, column, suite.published)
            key = row.model or row.name
            found = [
                cells[model, number]
                for model, name in measured_rows.items()
                if name == key and (model, number) in cells
            ]
            cell = min(found, key=lambda cell: cell["order"]) if found else None
            metric = cell["metric"] if cell else metric_named(column.task.card.metric)
            units[number] = metric
            line.append(_texts(paper, cell, column, metric))
            if cell and cell["note"]:
                notes.setdefault(f"{PART} {column.title}, {cell['note']}", []).append(row.title)
        texts.append((row.title, line))
    titles = [
        column.title + (f" ({units[n].legend})" if n in units and units[n].legend else "")
        for n, column in enumerate(columns)
    ]
    return SuiteTable(suite, titles, texts, [f"{note}: {', '.join(names)}." for note, names in notes.items()])


def _run_of(model: str, folders: set[str]) -> str:
    """The run of a suite that a measured model is: the name of its folder; "" for another."""
    name = PurePath(model.partition("?")[0]).name
    return name if name in folders else ""


def _measured(columns: Sequence[SuiteColumn], results: Iterable[Result]) -> dict[tuple[str, int], dict[str, Any]]:
    """The cell of each model and column number that has a result: text, value, metric, note, order of preference."""
    numbers = {(column.task.card.name, column.task.protocol.id): n for n, column in enumerate(columns)}
    wanted = [result for result in results if (result.task, result.protocol) in numbers]  # a changed one ends in *
    frame = cells_of(runs_frame(wanted))
    if not len(frame):
        return {}
    frame = frame.assign(text=cell_texts(frame, detailed=False)).reset_index()
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for cell in frame.itertuples():
        result = cell.results[0]
        key = cell.model, numbers[result.task, result.protocol]
        limit = [f"limit {result.limit}"] if result.limit is not None else []
        note = ", ".join([*limit, *result.subset_notes]) if cell.kind else ""
        made = {
            "text": cell.text + (f" {PART}" if note else ""),
            "value": cell.value if result.rankable and cell.value == cell.value else None,
            "metric": result.metric(),
            "note": note,
            "order": (cell.usable == 0, _KIND_ORDER[cell.kind], -result.n_images, cell.column),
        }
        if key not in cells or made["order"] < cells[key]["order"]:
            cells[key] = made
    return cells


def _paper(
    papers: Sequence[Published], row: SuiteModel, column: SuiteColumn, sources: Sequence[str]
) -> Published | None:
    """The published number of a cell: of several, that of the source that the suite names first."""
    metric = column.task.card.metric
    fitting = [
        paper
        for paper in papers
        if paper.model == row.published_name
        and paper.task == column.published
        and paper.metric == metric
        and row.arch in ("", paper.arch)
    ]
    return min(fitting, key=lambda paper: _place(paper.source, sources), default=None)


def _place(source: str, sources: Sequence[str]) -> int:
    return next(number for number, start in enumerate(sources) if source.startswith(start))


def _texts(
    paper: Published | None, cell: dict[str, Any] | None, column: SuiteColumn, metric: Metric
) -> tuple[str, str, str]:
    """Published, measured and difference, each "" where there is none."""
    same = paper is not None and (paper.task, paper.protocol) == (column.task.card.name, column.task.protocol.id)
    difference = ""
    if same and paper is not None and cell and cell["value"] is not None:
        points = round(float(paper.value) - metric.scale * cell["value"], metric.digits) + 0.0
        difference = f"{points:+.{metric.digits}f}"
    return "" if paper is None else str(paper.value), cell["text"] if cell else "", difference
