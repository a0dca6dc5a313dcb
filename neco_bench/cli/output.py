"""What the command line prints: results and comparisons as rows, and rows as a table for people or as JSON."""

from __future__ import annotations

import contextlib
import ctypes
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
    """While code of others may run: what it prints on stdout, from Python or C, goes to stderr, and its `sys.exit()`
    is a BadInputError. stdout is for results alone.
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
            ctypes.CDLL(None).fflush(None)  # what C code printed lies in a buffer of its own
        os.dup2(stdout, 1)
        os.close(stdout)


def summary(result: Result) -> dict[str, Any]:
    """A result in one row: value and interval in percent, and what part of the data it is of."""
    value = result.metrics.get(result.primary_metric)
    low, high = result.ci95.get(result.primary_metric, (None, None))
    notes = result.subset_notes
    notes += [f"limit {result.limit}"] if result.limit else []
    return {
        "model": result.model,
        "task": result.task,
        "protocol": result.protocol,
        "metric": result.primary_metric,
        "value": "failed" if value is None else f"{100 * value:.1f}",
        "95 % interval": "" if low is None or high is None else f"[{100 * low:.1f}, {100 * high:.1f}]",
        "note": ", ".join([*(["subset"] if result.subset else []), *notes]),
        "seconds": f"{result.timing.get('total', 0):.1f}",
    }


def numbers(row: ComparisonRow) -> dict[str, Any]:
    """A row of a comparison as fractions, None where there is no number."""
    low, value, high, p = row.difference.low, row.difference.value, row.difference.high, row.difference.p
    known: dict[str, Any] = {
        "first": row.first,
        "second": row.second,
        "difference": value,
        "low": low,
        "high": high,
        "p": p,
        "p_holm": row.p_holm,
    }
    known = {name: None if number is None or number != number else float(number) for name, number in known.items()}
    return {"name": row.name, **known, "items": row.items}


def compared(row: ComparisonRow) -> dict[str, Any]:
    """A row of a comparison in percent points."""

    def percent(value: float | None, sign: str = "") -> str:
        return "" if value is None or value != value else f"{100 * value:{sign}.1f}"

    difference = row.difference
    known = difference.p == difference.p
    return {
        "name": row.name,
        "first": percent(row.first),
        "second": percent(row.second),
        "difference": percent(difference.value, "+"),
        "95 % interval": f"[{percent(difference.low, '+')}, {percent(difference.high, '+')}]" if known else "",
        "p": f"{difference.p:.4f}" if known else "",
        "p (Holm)": f"{row.p_holm:.4f}" if known else "",
        "items": row.items,
    }


def images_compared(rows: list[tuple[str, float, float]], most: int, as_json: bool) -> list[dict[str, Any]]:
    """The first and the last `most` of (id, first, second), as fractions, or in percent for people."""
    rows = rows if len(rows) <= 2 * most else [*rows[:most], *rows[-most:]]
    if as_json:
        return [{"image": name, "first": a, "second": b, "difference": b - a} for name, a, b in rows]
    return [
        {"image": name, "first": f"{100 * a:.1f}", "second": f"{100 * b:.1f}", "difference": f"{100 * (b - a):+.1f}"}
        for name, a, b in rows
    ]


def phases(result: Result) -> list[dict[str, Any]]:
    """Seconds and share of each phase, the longest first, and what none of them covers."""
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
    """Rows as a table for people, or as one JSON list; on stdout, or on `file`."""
    if as_json:
        print(json.dumps(list(rows), indent=2, default=str))
        return
    if not rows:
        print("nothing")
        return
    table = [[*rows[0]], *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), file=file)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)
