"""The report page: one HTML file with its data inside, that needs no network. A pure function of the results."""

from __future__ import annotations

import importlib.resources
import json
import statistics
from collections.abc import Iterable
from typing import Any

from neco_bench.reports.grid import KINDS, Cell, Grid, grids, percent, usable
from neco_bench.results.schema import Result

_SHARED = ("environment", "packages", "python", "platform", "cpu", "git_commit", "git_dirty", "device", "precision")


def report_page(results: Iterable[Result]) -> str:
    """The page as text: tables by family, a section per model with intervals, classes and provenance, and plots."""
    content = _content(list(results))
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), sort_keys=True, default=str)
    page = importlib.resources.files("neco_bench.reports").joinpath("report.html").read_text(encoding="utf-8")
    return page.replace("__DATA__", text.replace("<", "\\u003c"))


def _content(results: list[Result]) -> dict[str, Any]:
    """columns, models, their order in each table, results, and provenance that many of them share, each once.

    Values are integers, in tenths of a percent point.
    """
    columns: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    order: dict[str, None] = {}
    shared: dict[str, int] = {}
    orders: dict[str, list[str]] = {}
    for grid in grids(results):
        orders[grid.family + KINDS[grid.kind]] = list(grid.models)
        places = {}
        for name in grid.columns:
            found = [cell for (_, column), cell in grid.cells.items() if column == name]
            places[name] = len(columns)
            columns.append(_column(grid, name, found))
        for model in grid.models:
            order.setdefault(model)
            for name in grid.columns:
                if (model, name) in grid.cells:
                    rows.append(_row(model, places[name], grid.cells[model, name], columns[places[name]], shared))
    return {
        "columns": columns,
        "models": list(order),
        "orders": orders,
        "results": rows,
        "provenance": [json.loads(text) for text in shared],
    }


def _column(grid: Grid, name: str, cells: list[Cell]) -> dict[str, Any]:
    result = cells[0].results[0]
    classes: dict[str, None] = {}
    for cell in cells:
        classes |= dict.fromkeys(_classes(usable(cell.results)))
    return {
        "name": name,
        "family": grid.family,
        "dataset": next((d["name"] for d in result.provenance.get("dataset", {}).values()), result.task),
        "protocol": result.protocol,
        "metric": result.primary_metric,
        "kind": KINDS[grid.kind],
        "classes": list(classes) or None,
    }


def _classes(results: list[Result]) -> dict[str, float | None]:
    """What the primary metric is per class (of mIoU: IoU), the mean over seeds."""
    rows = [r.per_class.get(r.primary_metric) or next(iter(r.per_class.values()), {}) for r in results]
    found: dict[str, float | None] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        known = [value for row in rows if (value := row.get(name)) is not None]
        found[name] = statistics.fmean(known) if known else None
    return found


def _tenths(value: float | None) -> int | None:
    return None if value is None else round(10 * float(percent(value)))


def _row(model: str, column: int, cell: Cell, about: dict[str, Any], shared: dict[str, int]) -> dict[str, Any]:
    found = usable(cell.results)
    result = (found or cell.results)[0]
    low, high = result.ci95.get(result.primary_metric, (None, None)) if len(found) == 1 else (None, None)
    per_class = {} if cell.mean is None else _classes(found)
    common = json.dumps({k: v for k, v in result.provenance.items() if k in _SHARED}, sort_keys=True, default=str)
    keep = ("weights_id", "protocol_hash", "features", "training", "dataset")
    return {
        "model": model,
        "column": column,
        "value": _tenths(cell.mean),
        "low": _tenths(low),
        "high": _tenths(high),
        "error": result.error if result.error else None if cell.mean is not None else "ambiguous",
        "seconds": round(result.timing.get("total", 0.0), 1),
        "params": result.provenance.get("encoder", {}).get("parameters", 0) / 1e6 or None,
        "classes": [_tenths(per_class.get(name)) for name in about["classes"]] if per_class else None,
        "provenance": shared.setdefault(common, len(shared)),
        "own": {"key": result.key, "seeds": [r.seed for r in found]}
        | {name: result.provenance[name] for name in keep if name in result.provenance},
    }
