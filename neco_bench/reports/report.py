"""The report page: one HTML file with its data inside, that needs no network. A pure function of the results."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from neco_bench.core.metric import Metric
from neco_bench.reports.grid import KINDS, Grid, cells_of, grids_of, runs_frame
from neco_bench.reports.render import render
from neco_bench.reports.words import WORDS
from neco_bench.results.schema import Result

# Provenance that is the same for many results: the page holds each of its versions once.
SHARED = ("environment", "packages", "python", "platform", "cpu", "git_commit", "git_dirty", "device", "precision")

# Provenance of one result.
OWN = ("weights_id", "protocol_hash", "features", "training", "dataset")


def report_page(results: Iterable[Result]) -> str:
    """Make the page: tables by family, a section per model with intervals, classes and provenance, and plots."""
    return render("report.html", content=_content(results), words=WORDS)


def _content(results: Iterable[Result]) -> dict[str, Any]:
    """columns, models, their order in each table, results, and provenance that many of them share, each once.

    Values are integers: as printed, times ten to the power of the digits of their column.
    """
    columns: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    shared: dict[str, int] = {}
    grids = list(grids_of(cells_of(runs_frame(results))))
    for grid in grids:
        first = len(columns)
        columns += [_column(grid, name) for name in grid.columns]
        cells = {cell.Index: cell for cell in grid.cells.itertuples()}
        for model in grid.models:
            for number, name in enumerate(grid.columns, first):
                if (model, name) in cells:
                    row = _row(cells[model, name], columns[number]["classes"], shared)
                    rows.append({"model": model, "column": number, **row})
    return {
        "columns": columns,
        "models": list(dict.fromkeys(model for grid in grids for model in grid.models)),
        "orders": {grid.family + KINDS[grid.kind]: list(grid.models) for grid in grids},
        "results": rows,
        "provenance": [json.loads(text) for text in shared],
    }


def _column(grid: Grid, name: str) -> dict[str, Any]:
    cells = grid.cells.xs(name, level="column")
    result = cells.results.iloc[0][0]
    metric = result.metric()
    classes = dict.fromkeys(name for cell in cells.itertuples() for name in _per_class(cell.results[: cell.usable]))
    return {
        "name": name,
        "family": grid.family,
        "dataset": next(
            (d["name"] for results in cells.results for r in results for d in r.provenance.get("dataset", {}).values()),
            result.task,
        ),
        "protocol": result.protocol,
        "metric": result.primary_metric,
        "unit": metric.unit,
        "legend": metric.legend,
        "lower": metric.lower_is_better,
        "digits": metric.digits,
        "kind": KINDS[grid.kind],
        "classes": list(classes) or None,
    }


def _per_class(results: list[Result]) -> dict[str, float]:
    """The primary metric of each class (of mIoU: IoU), the mean over seeds; NaN where it is undefined."""
    rows = [r.per_class.get(r.primary_metric) or next(iter(r.per_class.values()), {}) for r in results]
    values: dict[str, list[float]] = defaultdict(list)
    for name, value in (item for row in rows for item in row.items()):
        values[name] += [] if value is None else [value]
    return {name: statistics.fmean(known) if known else np.nan for name, known in values.items()}


def _whole(metric: Metric, value: float) -> int | None:
    """A value as printed, without its point."""
    text = metric.text(value)
    return round(float(text) * 10**metric.digits) if text else None


def _row(cell: Any, classes: list[str], shared: dict[str, int]) -> dict[str, Any]:
    """What the page holds of a row of `cells_of`."""
    result, usable = cell.results[0], cell.results[: cell.usable]
    metric = result.metric()
    per_class = {} if np.isnan(cell.value) else _per_class(usable)
    common = {name: value for name, value in result.provenance.items() if name in SHARED}
    own = {name: result.provenance[name] for name in OWN if name in result.provenance}
    return {
        "value": _whole(metric, cell.value),
        "low": _whole(metric, cell.low),
        "high": _whole(metric, cell.high),
        "spread": f"± {metric.text(cell.deviation)} ({cell.repeats} {cell.over})"
        if not np.isnan(cell.deviation)
        else None,
        "over": result.drawn_text or None,
        "marks": "; ".join(cell.marks) or None,
        "error": result.error or ("ambiguous" if np.isnan(cell.value) else None),
        "seconds": round(result.timing.get("total", 0.0), 1),
        "params": result.provenance.get("encoder", {}).get("parameters", 0) / 1e6 or None,
        "classes": [_whole(metric, per_class.get(name, np.nan)) for name in classes] if per_class else None,
        "provenance": shared.setdefault(json.dumps(common, sort_keys=True, default=str), len(shared)),
        "own": {"key": result.key, "seeds": [r.seed for r in usable], **own},
    }
