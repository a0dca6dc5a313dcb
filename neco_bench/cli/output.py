"""Print results and comparisons as rows, and rows as a table or as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from neco_bench.core.errors import user_error

if TYPE_CHECKING:
    from neco_bench.reports.compare import ComparisonRow
    from neco_bench.results.schema import Result


@contextlib.contextmanager
def foreign_code() -> Iterator[None]:
    """Reserve stdout for results while user code may run.

    Output of that code on stdout, from Python or C, is redirected to stderr. Its `sys.exit()` raises BadInputError.
    """
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except SystemExit as error:
        raise user_error(error) or error from error
    finally:
        with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):
            (sys.__stdout__ or sys.stdout).flush()  # some code prints there
            import ctypes  # takes a tenth of the time of `--help`

            ctypes.CDLL(None).fflush(None)  # C code has a separate output buffer
        os.dup2(stdout, 1)
        os.close(stdout)


def summary(result: Result) -> dict[str, Any]:
    """Return a result as a row: value and interval in its unit, its sampling units, and part of the data."""
    value, metric = result.metrics.get(result.primary_metric), result.metric()
    notes = result.subset_notes
    notes += [f"limit {result.limit}"] if result.limit else []
    return {
        "model": result.model,
        "task": result.task,
        "protocol": result.protocol,
        "metric": result.primary_metric + (f" ({metric.legend})" if metric.legend else ""),
        "value": "failed" if value is None else metric.text(value),
        "95 % interval": metric.interval(*result.ci95.get(result.primary_metric, (None, None))),
        "over": result.drawn_text,
        "note": ", ".join([*(["subset"] if result.subset else []), *notes]),
        "seconds": f"{result.timing.get('total', 0):.1f}",
    }


def summaries(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return results as rows; several seeds of a model on a task are one row."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.model, result.column), []).append(result)
    return [summary(group[0]) if len(group) == 1 else _over_seeds(group) for group in groups.values()]


def _over_seeds(results: list[Result]) -> dict[str, Any]:
    """Return the results of several seeds as a row: mean, standard deviation and interval, as in leaderboards."""
    from neco_bench.reports.grid import cells_of, runs_frame  # pandas is slow to import

    good = [result for result in results if result.status == "ok"]
    row = summary(good[0] if good else results[0])
    row["seconds"] = f"{sum(result.timing.get('total', 0) for result in results):.1f}"
    if len(good) < len(results):
        row["note"] = ", ".join(
            filter(None, [row["note"], f"{len(results) - len(good)} of {len(results)} seeds failed"])
        )
    if len(good) > 1:
        metric, (cell,) = good[0].metric(), cells_of(runs_frame(good)).itertuples()
        row["value"] = f"{metric.text(cell.value)} ± {metric.text(cell.deviation)} ({len(good)} seeds)"
        row["95 % interval"] = metric.interval(cell.low, cell.high)
    return row


def comparison_fractions(row: ComparisonRow) -> dict[str, Any]:
    """Return a row of a comparison for JSON: values as stored, None for missing numbers."""
    difference = row.difference
    values: dict[str, Any] = {
        "first": row.first,
        "second": row.second,
        "difference": difference.value,
        "low": difference.low,
        "high": difference.high,
        "p": difference.p,
        "p_holm": row.p_holm,
    }
    values = {name: None if value is None or value != value else float(value) for name, value in values.items()}
    facts = {"items": row.items, "unit": row.unit, "test": difference.test, "note": row.note}
    return {"name": row.name, **values, **facts, "better": row.metric.direction}


def comparison_images(rows: list[tuple[str, float, float]], most: int, as_json: bool) -> list[dict[str, Any]]:
    """Return the first and last `most` of (id, first, second) as rows: fractions for JSON, percent for a table."""
    rows = rows if len(rows) <= 2 * most else [*rows[:most], *rows[-most:]]
    if as_json:
        return [{"image": name, "first": a, "second": b, "difference": b - a} for name, a, b in rows]
    return [
        {"image": name, "first": f"{100 * a:.1f}", "second": f"{100 * b:.1f}", "difference": f"{100 * (b - a):+.1f}"}
        for name, a, b in rows
    ]


def speed_row(result: Result) -> dict[str, Any]:
    """Return a result of `speed` as a row."""
    features, measured = result.provenance["features"], result.metrics
    return {
        "model": result.model,
        "size": features["used_size"],
        "tokens": features["tokens"],
        "precision": result.provenance["precision"],
        **{
            name.replace("_", " "): result.metric(name).text(measured[name])
            for name in ("images_per_second", "gflops_per_image", "million_parameters")
        },
        "peak memory (MiB)": f"{result.peak_memory_mb:.0f}",
        "batch": result.provenance["batch_size_used"],
        "device": result.provenance["device"],
    }


def phases(result: Result) -> list[dict[str, Any]]:
    """Return the seconds and the share of each phase, the longest first, then those outside all phases."""
    total = result.timing.get("total", 0.0)
    parts = {name: seconds for name, seconds in result.timing.items() if name != "total"}
    rows = [
        *sorted(parts.items(), key=lambda item: -item[1]),
        ("other", total - sum(parts.values())),
        ("total", total),
    ]
    table = [
        {"phase": name, "seconds": f"{seconds:.2f}", "share": f"{100 * seconds / max(total, 1e-9):.0f} %"}
        for name, seconds in rows
    ]
    return [*table, {"phase": "peak memory", "seconds": f"{result.peak_memory_mb:.0f} MB", "share": ""}]


def print_rows(rows: Sequence[dict[str, Any]], as_json: bool, file: TextIO | None = None) -> None:
    """Print rows as a table, or as one JSON list.

    On a terminal, rich fits the table to the width. Otherwise it is plain text with one line per row, and columns are
    separated by two or more spaces. file: the output file; default: stdout.
    """
    file = file or sys.stdout
    if as_json:
        print(json.dumps(list(rows), indent=2, default=str))
        return
    if not rows:
        print("nothing", file=file)
        return
    header, lines = list(rows[0]), [[_text(value) for value in row.values()] for row in rows]
    if file.isatty():
        _print_in_width(header, lines, file)
        return
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    for line in [header, *lines]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), file=file)


def _print_in_width(header: Sequence[str], lines: Sequence[Sequence[str]], file: TextIO) -> None:
    from rich.console import Console  # imported here because it takes a tenth of a second
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for line in lines:
        table.add_row(*line)
    Console(file=file, markup=False, highlight=False, emoji=False).print(table)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)
