"""Write the pages of `posttrain-report`: tables as one HTML file, Markdown, LaTeX and CSV. Computes no features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from neco_bench.core.files import write_whole
from neco_bench.reports.compare import ComparisonRow
from neco_bench.reports.comparison import comparison_frame
from neco_bench.reports.ranking import SIGNIFICANT
from neco_bench.reports.render import render
from neco_bench.reports.words import MEANING, TESTS, comparison_percent

MOST_SHOWN = 24  # rows of a table of classes on the pages; the CSV file has all


@dataclass(frozen=True)
class Section:
    """A table of the report.

    name: name of its CSV file. rows: the rows as printed on the pages. frame: the content of the CSV file, in full
    precision. marks: for each row, the positions of the difference and its interval in [0, 100], where 50 means no
    difference, and the verdict of the test; or None.
    """

    name: str
    title: str
    rows: list[dict[str, str]]
    frame: pd.DataFrame
    note: str = ""
    marks: Sequence[tuple[float, float, float, str] | None] = ()

    @property
    def header(self) -> list[str]:
        """Names of the columns."""
        return list(self.rows[0]) if self.rows else []


@dataclass(frozen=True)
class Picture:
    """Pictures of the outputs of two models for one item. tiles: (title, data URI) of each picture."""

    task: str
    item: str
    scores: str
    tiles: list[tuple[str, str]]


@dataclass
class Report:
    """Content of the pages. curve: (steps, values) of the training loss. problems: what could not be compared."""

    base: str
    tuned: str
    sections: list[Section] = field(default_factory=list)
    curve: tuple[np.ndarray, np.ndarray] | None = None
    pictures: list[Picture] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verdict(row: ComparisonRow) -> str:
    """Return the verdict of the adjusted test: better, worse, or not significant."""
    if not row.p_holm < SIGNIFICANT:
        return "not significant"
    return "better" if row.metric.sign * row.difference.value > 0 else "worse"


def comparison_section(
    name: str, title: str, groups: Sequence[tuple[dict[str, str], Sequence[ComparisonRow]]], note: str = ""
) -> Section:
    """Return a table of comparisons. groups: leading columns, such as the task, and the rows of each group."""
    rows, frames, compared = [], [], []
    for before, group in groups:
        whole = comparison_frame(group)
        whole["verdict"] = [verdict(row) for row in group]
        for position, (column, text) in enumerate(before.items()):
            whole.insert(position, column, text)
        frames.append(whole)
        kept = list(group)
        if len(kept) > MOST_SHOWN:
            kept = kept[: MOST_SHOWN // 2] + kept[-MOST_SHOWN // 2 :]
            note = f"{note} The {MOST_SHOWN} rows that change most; {name}.csv has all.".strip()
        for row in kept:
            cells = comparison_percent(row)
            shown = {"name": cells["name"], "base": cells["first"], "tuned": cells["second"]}
            shown |= {key: cells[key] for key in ("difference", "95 % interval", "p (Holm)")}
            rows.append({**before, **shown, "verdict": verdict(row), "items": cells["items"]})
            compared.append(row)
    frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    return Section(name, title, rows, frame, note, _marks(compared))


def _marks(rows: Sequence[ComparisonRow]) -> list[tuple[float, float, float, str] | None]:
    """Return the positions of differences on a scale that rows of the same unit share."""
    ends: dict[str, float] = {}
    for row in rows:
        for value in (row.difference.low, row.difference.value, row.difference.high):
            if not np.isnan(value):
                ends[row.metric.unit] = max(ends.get(row.metric.unit, 1e-12), abs(value))
    marks: list[tuple[float, float, float, str] | None] = []
    for row in rows:
        d, largest = row.difference, ends.get(row.metric.unit, 1.0)
        if np.isnan(d.value):
            marks.append(None)
            continue
        low, high = (d.value if np.isnan(end) else end for end in (d.low, d.high))
        places = [50 + 46 * value / largest for value in (low, d.value, high)]
        marks.append((places[0], places[1], places[2], verdict(row).replace(" ", "-")))
    return marks


def plain_section(name: str, title: str, rows: Sequence[dict[str, Any]], note: str = "") -> Section:
    """Return a table of arbitrary rows."""
    return Section(name, title, [{k: str(v) for k, v in row.items()} for row in rows], pd.DataFrame(rows), note)


def write_report(report: Report, out: Path) -> Path:
    """Write `report.html`, `report.md`, `report.tex` and a CSV file for each section; return the path of the first."""
    words = {"meaning": MEANING, "tests": TESTS, "level": SIGNIFICANT}
    curve = None if report.curve is None else _curve(*report.curve)
    for name in ("html", "md", "tex"):
        page = render(f"posttrain.{name}", report=report, words=words, curve=curve)
        write_whole(out / f"report.{name}", page.encode())
    for section in report.sections:
        write_whole(out / f"{section.name}.csv", section.frame.to_csv(index=False, lineterminator="\n").encode())
    return out / "report.html"


def _curve(steps: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """Return a line of at most 300 points (means of neighbouring points) in a box of 1000 by 200."""
    parts = np.array_split(np.arange(len(values)), min(300, len(values)))
    x, y = (np.array([column[part].mean() for part in parts]) for column in (steps, values))
    low, high, width = y.min(), y.max(), max(x.max() - x.min(), 1e-12)
    height = max(high - low, 1e-12)
    points = " ".join(
        f"{1000 * (a - x.min()) / width:.1f},{195 - 190 * (b - low) / height:.1f}" for a, b in zip(x, y, strict=True)
    )
    return {
        "points": points,
        "low": f"{low:.4g}",
        "high": f"{high:.4g}",
        "first": int(steps[0]),
        "last": int(steps[-1]),
    }
