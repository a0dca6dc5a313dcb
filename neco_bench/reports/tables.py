"""Leaderboard tables, made only from results. The same results give the same bytes, whatever their order.

One ranked table per task family contains results on the whole data set with unchanged protocols. Results on part of a
data set have a separate table, and so have results of `--limit` and `--set`. A column is one task under one protocol;
numbers of different protocols never share a column.

Another table per family shows published numbers (`leaderboards/published.csv`) next to measured ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from neco_bench.core.files import slug
from neco_bench.core.metric import metric_named
from neco_bench.reports.grid import KINDS, Grid, cells_of, win_rates
from neco_bench.reports.published import Published
from neco_bench.reports.ranking import PAIRED, Board, Ranks, board_of
from neco_bench.reports.render import render
from neco_bench.reports.words import WORDS
from neco_bench.results.frame import COLUMNS, results_frame
from neco_bench.results.schema import Result

# Endings of the names of tables other than the wide ones (KINDS).
BESIDE = (".ranking", ".conditions", ".published", ".full")

FULL_COLUMNS = [name for name in COLUMNS if name not in ("family", "rankable")]

CONDITIONS_COLUMNS = [
    *("model", "task", "input_size", "used_size", "tokens", "interval_over", "contamination", "training_data", "marks")
]

MARK = "†"  # marks cells with other conditions than the rest of the column; the table of conditions lists them

PUBLISHED_COLUMNS = [
    *("model", "task", "protocol", "metric", "measured", "published", "difference", "quality", "setting", "source")
]


@dataclass(frozen=True)
class Table:
    """One table as written to a file; all but the `.full` tables contain text.

    name: file name without ".csv". frame: its first column names the model. detailed: the same with intervals, for the
    page; None if the table is not on the page. ranked: whether it is the leaderboard of its family. ranks: {column:
    {model: (best, worst) rank that tests leave possible}}.
    """

    name: str
    title: str
    frame: pd.DataFrame
    detailed: pd.DataFrame | None = None
    ranked: bool = False
    ranks: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)

    def to_csv(self) -> str:
        """Return the table as CSV with "\\n" line ends; a ' is added before cells that look like formulas."""
        csv: str = without_formulas(self.frame).to_csv(index=False, lineterminator="\n")
        return csv

    def to_latex(self, intervals: bool = False) -> str:
        """Return the table for booktabs: in each column, the first model is bold and the second underlined.

        A model is marked only if tests leave it no other rank; ties are not marked. intervals: add small intervals.
        """
        frame = self.detailed if intervals and self.detailed is not None else self.frame
        rows = []
        for cells in frame.itertuples(index=False, name=None):
            opened = [self.ranks.get(column, {}).get(cells[0], (0, -1)) for column in frame.columns[1:]]
            rows.append((cells, [best if best == worst else None for best, worst in opened]))
        return render("table.tex", title=self.title, header=list(frame.columns), rows=rows, words=WORDS)


def without_formulas(frame: pd.DataFrame) -> pd.DataFrame:
    """Add ' before each text that spreadsheets would interpret as a formula; remove NUL characters."""
    text = frame.apply(lambda cells: cells if is_numeric_dtype(cells) else cells.map(_plain_cell))
    return text.rename(columns=_plain_cell)


def _plain_cell(cell: Any) -> Any:
    """Add ' before text that starts like a formula and is not a number (OWASP, CSV injection); remove NUL characters.

    The csv module of Python 3.10 cannot write NUL.
    """
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\0", "")
    if not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return cell
    return cell if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", cell) else f"'{cell}"


def build_tables(results: Iterable[Result], published: Iterable[Published] = ()) -> list[Table]:
    """Return the tables of all families.

    They are `<family>` and `.ranking`, `.subset`, `.unranked`, `.conditions`, `.published` if they have rows, and
    `.full`. Results with equal key and metrics (copies in several folders) count once.
    """
    return tables_of(board_of(results), published)


def tables_of(board: Board, published: Iterable[Published] = ()) -> list[Table]:
    """Return the tables of arranged results; see `build_tables`."""
    runs, cells = board.runs, board.cells
    papers = pd.DataFrame([row.model_dump() for row in published], columns=list(Published.model_fields))
    tables = []
    for family, grids in groupby(board.grids, key=attrgetter("family")):
        members = runs[runs.family == family]
        for grid in grids:
            ranks = {} if grid.kind else board.ranks[family]
            tables.append(_wide_table(grid, ranks))
            if ranks:
                tables.append(_text_table(family, "ranking", _ranking(grid, ranks)))
        tables.append(_text_table(family, "conditions", _conditions(members, cells.xs(family, drop_level=False))))
        if len(papers):
            tables.append(_text_table(family, "published", _published(members, papers), "published and measured"))
        full = results_frame(members.result)[FULL_COLUMNS].sort_values(FULL_COLUMNS, na_position="first")
        tables.append(Table(f"{slug(family)}.full", "", full))
    return [table for table in tables if len(table.frame)]


def _text_table(family: str, ending: str, frame: pd.DataFrame, title: str = "") -> Table:
    title = f"{family.replace('_', ' ')}: {title or ending}"
    return Table(f"{slug(family)}.{ending}", title, frame, frame)


def _wide_table(grid: Grid, ranks: Mapping[str, Ranks]) -> Table:
    title = grid.family.replace("_", " ") + (f" ({KINDS[grid.kind]})" if grid.kind else "")
    short, detailed = (grid.wide(cell_texts(grid.cells, detailed)).fillna("") for detailed in (False, True))
    name = f"{slug(grid.family)}{grid.kind}"
    metrics = {column: grid.metric(column) for column in grid.columns}
    headers = {column: f"{column} ({m.legend})" if m.legend else column for column, m in metrics.items()}
    places = {headers[column]: found.open for column, found in ranks.items()}
    short, detailed = (frame.rename(columns=headers) for frame in (short, detailed))
    return Table(name, title, _with_models(short), _with_models(detailed), ranked=not grid.kind, ranks=places)


def _with_models(frame: pd.DataFrame) -> pd.DataFrame:
    """Convert the index of models to a column."""
    return frame.rename_axis(index="model", columns=None).reset_index()


def cell_texts(cells: pd.DataFrame, detailed: bool) -> pd.Series:
    """Return texts of cells: value and deviation, with `detailed` also the interval; MARK if the conditions differ."""

    def text(cell: Any) -> str:
        if np.isnan(cell.value):
            return "ambiguous" if cell.usable else "failed"
        metric = cell.results[0].metric()
        parts = [metric.text(cell.value)]
        if not np.isnan(cell.deviation):
            parts.append(f"± {metric.text(cell.deviation)}")
        if detailed:
            parts.append(metric.interval(cell.low, cell.high))
            parts.append(f"({cell.repeats} {cell.over})" if not np.isnan(cell.deviation) else "")
        return " ".join([*filter(None, parts), *([MARK] if cell.marks else [])])

    return pd.Series([text(cell) for cell in cells.itertuples()], index=cells.index, dtype="object")


def _ranking(grid: Grid, tested: Mapping[str, Ranks]) -> pd.DataFrame:
    """Return the win rate of each model and, by column, the ranks that the tests leave possible."""
    rates = win_rates(grid)
    number = grid.wide(grid.cells.value).notna().sum(axis=1)
    table = pd.DataFrame(
        {
            "win_rate": rates.map(lambda rate: "" if np.isnan(rate) else f"{100 * rate:.0f} %"),
            "columns": number.map(lambda count: f"{count} of {len(grid.columns)}"),
        },
        index=grid.models,
        dtype="object",
    )
    for column, ranks in tested.items():
        places = {m: f"{best}" if best == worst else f"{best}..{worst}" for m, (best, worst) in ranks.open.items()}
        name = column if ranks.how == PAIRED else f"{column} ({ranks.how})"
        table[name] = pd.Series(places, index=grid.models, dtype="object")
    return _with_models(table.fillna(""))


def _conditions(runs: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Return the conditions of each model in each column: input, sampling units of the interval, overlap of its
    training images with the data set, and differences from the other models of the column."""
    marks = {(cell.Index[2], cell.Index[3]): "; ".join(cell.marks) for cell in cells.itertuples()}
    rows = []
    for run in runs[runs.ok].itertuples():
        features, training = (run.result.provenance.get(name) or {} for name in ("features", "training"))
        known = [features.get("input_size"), features.get("used_size"), features.get("tokens")]
        known += [run.result.drawn_text, training.get("contamination"), training.get("data")]
        known.append(marks.get((run.model, run.column)))
        if any(known):
            rows.append([run.model, run.column, *("" if cell is None else str(cell) for cell in known)])
    return pd.DataFrame(rows, columns=CONDITIONS_COLUMNS).drop_duplicates().sort_values(CONDITIONS_COLUMNS)


def _published(runs: pd.DataFrame, papers: pd.DataFrame) -> pd.DataFrame:
    """Return all measured and published numbers of each model and task that has both.

    They share a row if protocol and metric agree; the difference is given if the result is rankable. Results with
    weights other than the official ones count as another model.
    """
    cells = cells_of(runs[runs.ok & runs.official.ne(False)])
    cells = cells.assign(text=cell_texts(cells, detailed=True)).reset_index()
    result = cells.results.str[0]
    measured = pd.DataFrame(
        {
            "spec": result.map(attrgetter("model")),
            "task": result.map(attrgetter("task")),
            "protocol_id": result.map(attrgetter("protocol")),
            "metric": result.map(attrgetter("primary_metric")),
            "model": cells.model,
            "protocol": cells.column.str.split("@", n=1).str[1],
            "measured": cells.text,
            "mean": cells.value.where(result.map(attrgetter("rankable")).astype(bool)),
        }
    )
    papers = papers.rename(columns={"model": "spec", "protocol": "protocol_id", "value": "published"})
    # Models and tasks that have both numbers:
    both = measured[["spec", "task"]].merge(papers[["spec", "task"]]).drop_duplicates()
    rows = measured.merge(papers, how="outer", on=["spec", "task", "protocol_id", "metric"]).merge(both)
    metrics = [metric_named(name) for name in rows.metric]
    scales = [metric.scale for metric in metrics]
    points = rows.published.astype(float) - scales * rows["mean"]
    digits = [metric.digits for metric in metrics]
    rows = rows.assign(
        model=rows.model.fillna(rows.spec),
        protocol=rows.protocol.fillna(rows.protocol_id),
        published=rows.published.map(str, na_action="ignore"),
        difference=[
            None if np.isnan(value) else f"{round(value, places) + 0.0:+.{places}f}"
            for value, places in zip(points, digits, strict=True)
        ],
    )
    return rows[PUBLISHED_COLUMNS].fillna("").sort_values(PUBLISHED_COLUMNS)
