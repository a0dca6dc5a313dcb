"""The report page: one HTML file that contains its data and the plot library, and needs no network.

The same results give the same bytes, whatever their order.
"""

from __future__ import annotations

import json
import statistics as numbers
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from neco_bench.core.errors import NecoBenchError
from neco_bench.core.metric import Metric
from neco_bench.metrics.intervals import estimates
from neco_bench.metrics.sums import merged
from neco_bench.reports.compare import class_sums
from neco_bench.reports.extras import plot_library
from neco_bench.reports.grid import KINDS, Grid
from neco_bench.reports.published import Published
from neco_bench.reports.ranking import PAIRED, SIGNIFICANT, Board, Ranks, Statistics, board_of
from neco_bench.reports.render import render
from neco_bench.reports.words import WORDS
from neco_bench.results.schema import Result
from neco_bench.results.statistics import in_order, item_ids, sampling_of

# Provenance that is the same for many results; the page contains each version once.
SHARED = ("environment", "packages", "python", "platform", "cpu", "git_commit", "git_dirty", "device", "precision")

# Provenance of one result.
OWN = ("weights_id", "protocol_hash", "features", "training", "dataset")

SPEED = "speed"  # the family of `neco-bench speed`, shown as throughput and not as columns of the tables


def report_page(
    results: Iterable[Result] | Board,
    published: Sequence[Published] = (),
    statistics: Statistics | None = None,
    *,
    pictures: Mapping[str, str] | None = None,
    curves: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the page: ranking, heat map, tables by family, throughput, classes, differences, a section per model.

    Args:
        results: the results, or the return value of `board_of`.
        published: published numbers, which are shown in grey in the columns of their protocol.
        statistics: returns the per-item statistics of a result, for tests and for intervals of classes.
        pictures: {key of a result: link to the page of its pictures}.
        curves: curves of training runs, see `extras.curves_of`.
    """
    board = results if isinstance(results, Board) else board_of(results, statistics)
    return page_of({**_content(board, published, pictures or {}), "curves": list(curves)})


def page_of(content: Mapping[str, Any]) -> str:
    """Return the page that shows `content`."""
    library = plot_library()
    folder = files("neco_bench.reports") / "templates"
    style, script = ((folder / f"report.{ending}").read_text(encoding="utf-8") for ending in ("css", "js"))
    return render("report.html", content=content, words=WORDS, style=style, script=script, library=library)


def _content(board: Board, published: Sequence[Published], pictures: Mapping[str, str]) -> dict[str, Any]:
    """Return columns, models, their order in each table, results, differences, speeds, and provenance.

    Values are integers: the printed value times ten to the power of the digits of the column. Missing fields of a
    result are left out. Each version of the provenance is stored once.
    """
    columns: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    differences: list[list[Any]] = []
    shared: dict[str, int] = {}
    grids = [grid for grid in board.grids if grid.family != SPEED]
    models = list(dict.fromkeys(model for grid in grids for model in grid.models))
    at = {model: number for number, model in enumerate(models)}
    for grid in grids:
        first = len(columns)
        ranks = {} if grid.kind else board.ranks[grid.family]
        columns += [_column(grid, name, ranks.get(name), published) for name in grid.columns]
        cells = {cell.Index: cell for cell in grid.cells.itertuples()}
        for model in grid.models:
            for number, name in enumerate(grid.columns, first):
                if (model, name) in cells:
                    row = _row(cells[model, name], columns[number]["classes"], shared, board.statistics)
                    row["rank"] = ranks[name].open.get(model) if name in ranks else None
                    links = (pictures[r.key] for r in cells[model, name].results if r.key in pictures)
                    row["pictures"] = next(links, None)
                    known = {key: value for key, value in row.items() if value is not None}
                    rows.append({"model": model, "column": number, "value": None, **known})
        differences += [_differences(ranks.get(name), grid.metric(name), at) for name in grid.columns]
    return {
        "columns": columns,
        "models": models,
        "orders": {grid.family + KINDS[grid.kind]: list(grid.models) for grid in grids},
        "results": rows,
        "differences": differences,
        "speeds": _speeds(board),
        "provenance": [json.loads(text) for text in shared],
        "published": False,
    }


def _column(grid: Grid, name: str, ranks: Ranks | None, published: Sequence[Published]) -> dict[str, Any]:
    cells = grid.cells.xs(name, level="column")
    result = cells.results.iloc[0][0]
    metric = result.metric()
    classes = dict.fromkeys(name for cell in cells.itertuples() for name in _per_class(cell.results[: cell.usable]))
    same = (result.task, result.protocol, result.primary_metric)
    papers = [p for p in published if not grid.kind and (p.task, p.protocol, p.metric) == same]
    return {
        "name": name,
        "family": grid.family,
        "dataset": next(
            (d["name"] for results in cells.results for r in results for d in r.provenance.get("dataset", {}).values()),
            result.task,
        ),
        "protocol": result.protocol,
        "metric": result.primary_metric,
        **_unit(metric),
        "digits": metric.digits,
        "kind": KINDS[grid.kind],
        "classes": list(classes) or None,
        "how": None if ranks is None else "" if ranks.how == PAIRED else ranks.how,
        "papers": [
            {"model": p.model, "arch": p.arch, "text": str(p.value), "value": float(p.value), "source": source_of(p)}
            for p in papers
        ],
    }


def _unit(metric: Metric) -> dict[str, Any]:
    return {"unit": metric.unit, "legend": metric.legend, "lower": metric.lower_is_better}


def source_of(row: Published) -> str:
    """Return the source of a published number, and how it was read."""
    return "; ".join(filter(None, [row.setting, row.source, "" if row.quality == "printed" else row.quality]))


def _per_class(results: list[Result]) -> dict[str, float]:
    """Return the primary metric of each class (IoU for mIoU), averaged over seeds; NaN if undefined."""
    rows = [r.per_class.get(r.primary_metric) or next(iter(r.per_class.values()), {}) for r in results]
    values: dict[str, list[float]] = defaultdict(list)
    for name, value in (item for row in rows for item in row.items()):
        values[name] += [] if value is None else [value]
    return {name: numbers.fmean(known) if known else np.nan for name, known in values.items()}


def _class_intervals(
    results: list[Result], values: Mapping[str, float], statistics: Statistics | None
) -> dict[str, tuple[float, float]]:
    """Return intervals of the classes whose value agrees with the stored counts; none without counts."""
    if statistics is None or not values:
        return {}
    try:
        arrays = [statistics(result) for result in results]
        arrays = [in_order(own, item_ids(arrays[0]) or ()) for own in arrays]
        found = [class_sums(result, own) for result, own in zip(results, arrays, strict=True)]
        sums = merged([sums for _, sums in found])
        made = zip(found[0][0], estimates(sums, sampling_of(results[0], arrays[0])), strict=True)
        known = {name: one for name, one in made if abs(one.value - values.get(name, np.nan)) < 1e-6}
        return {name: ends for name, one in known.items() if (ends := one.interval().ends) is not None}
    except (NecoBenchError, ValueError, KeyError, IndexError):
        return {}


def _whole(metric: Metric, value: float) -> int | None:
    """Return a value as printed, without the decimal point."""
    text = metric.text(value)
    return round(float(text) * 10**metric.digits) if text else None


def _row(cell: Any, classes: list[str] | None, shared: dict[str, int], statistics: Statistics | None) -> dict[str, Any]:
    """Return the content of the page for a row of `cells_of`."""
    result, usable = cell.results[0], cell.results[: cell.usable]
    metric = result.metric()
    per_class = {} if np.isnan(cell.value) else _per_class(usable)
    ends = _class_intervals(usable, per_class, statistics)
    common = {name: value for name, value in result.provenance.items() if name in SHARED}
    own = {name: result.provenance[name] for name in OWN if name in result.provenance}
    features, training = (result.provenance.get(name) or {} for name in ("features", "training"))
    lows, highs = (
        [_whole(metric, ends[name][side]) if name in ends else None for name in classes or []] for side in (0, 1)
    )
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
        "params": result.provenance.get("encoder", {}).get("parameters", 0) / 1e6 or None,
        "classes": [_whole(metric, per_class.get(name, np.nan)) for name in classes or []] if per_class else None,
        "class_ends": [lows, highs] if ends else None,
        "seen": training.get("contamination"),
        "tokens": features.get("tokens"),
        "provenance": shared.setdefault(json.dumps(common, sort_keys=True, default=str), len(shared)),
        "own": {"key": result.key, "seeds": [r.seed for r in usable], **own},
    }


def _differences(ranks: Ranks | None, metric: Metric, at: Mapping[str, int]) -> list[Any]:
    """Return, for every two models of a column: their indices, second minus first, its interval, and p below 0.05."""
    return (
        []
        if ranks is None
        else [
            [
                at[one],
                at[other],
                *(_whole(metric, v) for v in (test.value, test.low, test.high)),
                int(test.p < SIGNIFICANT),
            ]
            for (one, other), test in ranks.tests.items()
        ]
    )


def _speeds(board: Board) -> list[dict[str, Any]]:
    """Return the throughput measured by `neco-bench speed`, one row per model, size, precision and device."""
    runs = board.runs[(board.runs.family == SPEED) & board.runs.ok]
    rows = []
    for run in runs.itertuples():
        result, provenance = run.result, run.result.provenance
        size, precision = provenance.get("features", {}).get("used_size"), provenance.get("precision")
        setting = f"{size} px, {precision}, batch {provenance.get('batch_size_used')}, {provenance.get('device')}"
        rows.append(
            {
                "model": run.model,
                "setting": setting,
                "images": round(result.metrics["images_per_second"], 2),
                "gflops": round(result.metrics.get("gflops_per_image", 0.0), 2),
                "params": round(result.metrics.get("million_parameters", 0.0), 2),
                "memory": round(result.peak_memory_mb),
            }
        )
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))
