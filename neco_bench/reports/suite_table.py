"""The table of a suite: rows and columns in its order, with published value, measured value and difference."""

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

PART = "‡"  # marks cells measured on part of the data, or with --limit

_KIND_ORDER = {"": 0, ".subset": 1, ".unranked": 2}


@dataclass(frozen=True)
class SuiteTable:
    """The table of a suite as printed.

    rows: model, then by column and kind (KINDS) the text of the cell, "" if it is empty. columns: titles, with unit and
    direction if they are not the usual ones. notes: explanations of the marks in cells.
    """

    suite: Suite
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[str, str, str]]]]
    notes: Sequence[str]

    def frame(self) -> pd.DataFrame:
        """Return a table with one header line: `model`, "TITLE published", "TITLE measured", "TITLE difference"."""
        header = ["model", *(f"{title} {kind}" for title in self.columns for kind in KINDS)]
        return pd.DataFrame(
            [[name, *(text for cell in cells for text in cell)] for name, cells in self.rows], columns=header
        )

    def contents(self) -> dict[str, str]:
        """Return the CSV, Markdown, LaTeX and HTML texts, by file name."""
        values = {"table": self, "kinds": KINDS, "words": SUITES}
        name = self.suite.id
        return {
            f"{name}.csv": without_formulas(self.frame()).to_csv(index=False, lineterminator="\n"),
            **{f"{name}.{end}": render(f"suite.{end}", **values) for end in ("md", "tex", "html")},
        }

    def write(self, out: Path) -> list[Path]:
        """Write all files into a folder, which is created if needed. Raises NecoBenchError if this fails."""
        contents = self.contents()
        for name, text in contents.items():
            write_whole(out / name, text.encode())
        return [out / name for name in contents]


def suite_table(
    suite: Suite, columns: Sequence[SuiteColumn], results: Iterable[Result], published: Iterable[Published] = ()
) -> SuiteTable:
    """Return the table of a suite.

    Rows are those of the suite, then other models that were measured on one of its columns, by name. For a run of the
    suite, the measured model is a run folder with the name of the run. A cell shows the result for the whole data set,
    else for a part, which is marked; results of protocols changed by --set are left out. The difference is published
    minus measured; it is shown only if task and protocol are the same, the whole data set was measured, and the weights
    are the official ones.

    Args:
        suite: the suite.
        columns: its columns (`Suite.columns`).
        results: results of any models and tasks.
        published: rows of published.csv; only those from the suite's sources are used.
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
    """Return the run of a suite to which a measured model belongs (the name of its folder), or ""."""
    name = PurePath(model.partition("?")[0]).name
    return name if name in folders else ""


def _measured(columns: Sequence[SuiteColumn], results: Iterable[Result]) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the cell for each model and column number with a result: text, value, metric, note, preference."""
    numbers = {(column.task.card.name, column.task.protocol.id): n for n, column in enumerate(columns)}
    wanted = [result for result in results if (result.task, result.protocol) in numbers]  # changed ones end in *
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
    """Return the published number of a cell; of several, the one from the source that the suite names first."""
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
    """Return published value, measured value and difference as texts, "" if missing."""
    same = paper is not None and (paper.task, paper.protocol) == (column.task.card.name, column.task.protocol.id)
    difference = ""
    if same and paper is not None and cell and cell["value"] is not None:
        points = round(float(paper.value) - metric.scale * cell["value"], metric.digits) + 0.0
        difference = f"{points:+.{metric.digits}f}"
    return "" if paper is None else str(paper.value), cell["text"] if cell else "", difference
