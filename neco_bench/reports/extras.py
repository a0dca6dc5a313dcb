"""Additional content of the report page: pages of `show`, training curves of run folders, the plot library."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from neco_bench.core.errors import MissingError
from neco_bench.core.files import slug
from neco_bench.core.log import Table
from neco_bench.results.schema import Result

POINTS = 200  # points of a curve on the page: means of equal parts of its steps

# Observable Plot needs D3. These are the released files of the npm registry, with their licences.
LIBRARY = {"D3": "d3.min.js", "Observable Plot": "plot.min.js"}


def picture_folder(result: Result, out: Path) -> Path:
    """Return the folder in `out` for the pictures of a result."""
    return out / slug(result.model) / f"{slug(f'{result.task}@{result.protocol}')}-{result.key[:8]}"


def picture_links(results: Iterable[Result], pictures: Path, out: Path) -> dict[str, str]:
    """Return links to the pages that `show` wrote into `pictures`: {key of a result: link from a page in `out`}."""
    pages = {result.key: picture_folder(result, pictures) / "index.html" for result in results}
    return {
        key: quote(Path(os.path.relpath(page, out)).as_posix(), safe="/")
        for key, page in pages.items()
        if page.is_file()
    }


def run_folders_of(results: Iterable[Result]) -> list[Path]:
    """Return the existing run folders of `train` that results name as their models."""
    names = dict.fromkeys(result.model.partition("[layers=")[0] for result in results)
    return [folder for folder in map(Path, names) if len(str(folder)) < 1000 and (folder / "log.csv").is_file()]


def curves_of(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the training curves of run folders or `log.csv` files: one for each, with at most POINTS of the loss.

    Scores in `eval.csv` of the run folder are returned as curves too, one per name.

    Raises:
        MissingError: if there is no log.
        BadInputError: if a log is damaged.
    """
    found: list[dict[str, Any]] = []
    for folder in folders:
        file = folder / "log.csv" if folder.is_dir() else folder
        if not file.is_file():
            raise MissingError(f"{file}: no such log of a training run. Check --run-folder.")
        name = folder.name if folder.is_dir() else file.stem
        found += _curves(name, Table(file).rows(), ["loss"])
        if folder.is_dir() and (folder / "eval.csv").is_file():
            for score, rows in Table(folder / "eval.csv").rows().groupby(["task", "metric"]):
                title = " ".join(map(str, score))
                found += _curves(name, rows.rename(columns={"value": title}), [title])
    return found


def _curves(name: str, rows: pd.DataFrame, columns: Sequence[str]) -> list[dict[str, Any]]:
    numbers = {column: pd.to_numeric(rows[column], errors="coerce") for column in columns if column in rows}
    steps = rows.step.to_numpy(dtype=float)
    curves = []
    for column, values in numbers.items():
        known = np.isfinite(values.to_numpy(dtype=float))
        if known.any():
            part = np.array_split(np.flatnonzero(known), min(POINTS, int(known.sum())))
            means = [
                [float(steps[own].mean()), float(f"{values.to_numpy(dtype=float)[own].mean():.6g}")] for own in part
            ]
            curves.append({"name": name, "value": column, "points": means})
    return curves


def plot_library() -> dict[str, Any]:
    """Return the scripts of the plot library for a page, and the text about them for its footer."""
    folder = files("neco_bench.reports") / "vendor"
    scripts = [(folder / name).read_text(encoding="utf-8") for name in LIBRARY.values()]
    names = []
    for name, script in zip(LIBRARY, scripts, strict=True):
        version = re.match(r"//[^\n]* v([\d.]+) ", script)
        names.append(f"{name} {version[1] if version else ''}".rstrip())
    size = sum(len(script.encode()) for script in scripts)
    return {"scripts": scripts, "text": f"{' with '.join(reversed(names))} (ISC licence), {size / 1000:.0f} kB"}
