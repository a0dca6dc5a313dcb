"""Arrange results as models by columns (task@protocol), and compute the values of cells."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from neco_bench.core.metric import Metric
from neco_bench.reports.comparable import MUST, fact, marks, with_ids
from neco_bench.results.schema import Result

# Provenance entries in which the results of one cell (the seeds) must agree; otherwise the cell is "ambiguous".
SETTINGS = ("features", "precision")

# Kinds of tables: the ending of the table's name, and its title.
KINDS = {"": "", ".subset": "parts of the data sets", ".unranked": "--limit or --set, never ranked"}

RUN_COLUMNS = {
    "family": "object",
    "kind": "object",  # of KINDS
    "model": "object",  # names in all tables
    "column": "object",
    "weights_id": "object",
    "protocol_hash": "object",
    "card_hash": "object",
    "dataset_fingerprint": "object",
    "official": "object",  # whether these are the official weights of the zoo name; None: the zoo has none
    "seed": "int64",
    "settings": "object",  # as JSON
    "ok": "bool",
    "value": "float64",  # of the primary metric, with its interval
    "low": "float64",
    "high": "float64",
    "draws": "int64",  # draws of the training set, and the deviation over them
    "deviation": "float64",
    "result": "object",
}

CELL_COLUMNS = {
    "value": "float64",
    "low": "float64",
    "high": "float64",
    "deviation": "float64",
    "repeats": "int64",
    "over": "object",
    "usable": "int64",
    "results": "object",
    "marks": "object",
}

NORMAL = 1.959964  # the 97.5 % quantile of the normal distribution


def runs_frame(results: Iterable[Result]) -> pd.DataFrame:
    """Return results as a table with RUN_COLUMNS, one row each, with the model names used in all tables.

    Results with equal key and metrics (copies in several folders) count once. The rows do not depend on the order of
    the results.
    """
    ordered = sorted(results, key=lambda result: json.dumps(result.model_dump(), sort_keys=True, default=str))
    distinct = {(r.key, r.status, json.dumps(r.metrics, sort_keys=True)): r for r in ordered}
    rows = [_run(result) for result in distinct.values()]
    runs = pd.DataFrame(rows, columns=list(RUN_COLUMNS), dtype="object").astype(RUN_COLUMNS)
    weights = runs.groupby(["model", "weights_id"], dropna=False).official
    other = weights.transform(lambda known: False in set(known) and True not in set(known)).astype(bool)
    several_weights = runs.groupby("model").weights_id.transform("nunique") > 1
    names = runs.column
    for name, word in MUST.items():
        several = runs.groupby(["family", "column"])[name].transform("nunique") > 1
        names = names.mask(several, pd.Series(with_ids(names, word, runs[name]), runs.index, dtype="object"))
    with_weights = pd.Series(with_ids(runs.model, "weights", runs.weights_id), runs.index, dtype="object")
    runs = runs.assign(model=runs.model.mask(other | several_weights, with_weights), column=names)
    runs["marks"] = None
    for _, rows in runs[runs.ok].groupby(["family", "column"]):
        for row, notes in zip(rows.index, marks(rows.result.tolist()), strict=True):
            runs.at[row, "marks"] = notes
    return runs


def _run(result: Result) -> dict[str, Any]:
    metric, provenance = result.primary_metric, result.provenance
    low, high = result.ci95.get(metric, (None, None))
    given = "weights" in (provenance.get("arguments") or {})  # earlier versions recorded nothing else on the weights
    official = provenance.get("official", False if given else None)
    return {
        "family": result.family,
        "kind": ".unranked" if result.is_changed else ".subset" if result.subset else "",
        "model": result.model,
        "column": result.column,
        "weights_id": provenance.get("weights_id") or None,
        **{name: fact(result, name) for name in MUST},
        "official": official if isinstance(official, bool) else None,
        "seed": result.seed,
        "settings": json.dumps([provenance.get(name) for name in SETTINGS], sort_keys=True, default=str),
        "ok": result.status == "ok",
        "value": result.metrics[metric] if result.status == "ok" else None,
        "low": low,
        "high": high,
        "draws": sum(role.startswith("train/") for role in provenance.get("dataset", {})),
        "deviation": result.metrics.get(f"{metric}_std"),
        "result": result,
    }


def cells_of(runs: pd.DataFrame) -> pd.DataFrame:
    """Summarise the runs of each cell of the tables.

    Returns:
        A table indexed by family, kind, model and column, with `value` (mean over seeds; NaN if the cell has no single
        number), `low` and `high` (NaN without an interval; for several seeds, the interval includes the spread of items
        and of seeds), `deviation` (over `repeats` seeds or draws of the training set, according to `over`; NaN for
        one), `usable` (number of results that did not fail), `results` (successful ones first, by seed), and `marks`
        (conditions in which the cell differs from others of its column).
    """
    cell = ["family", "kind", "model", "column"]
    runs = runs.sort_values(["ok", "seed"], ascending=[False, True], kind="stable")
    groups: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    for run in runs.itertuples():
        groups[run.family, run.kind, run.model, run.column].append(run)
    rows = [dict(zip(cell, names, strict=True)) | _cell(groups[names]) for names in sorted(groups)]
    return pd.DataFrame(rows, columns=[*cell, *CELL_COLUMNS]).astype(CELL_COLUMNS).set_index(cell)


def _cell(runs: list[Any]) -> dict[str, Any]:
    """Return the row of `cells_of` for the runs of one cell, where successful runs are first."""
    good = [run for run in runs if run.ok]
    several = len(good) > 1
    one_number = len({run.settings for run in good}) == 1 and len({run.seed for run in good}) == len(good)
    notes = [note for run in good for note in run.marks]
    if good and len(good) < len(runs):
        notes.append(f"{len(runs) - len(good)} of {len(runs)} runs failed")
    values = [run.value for run in good]
    low, high = _interval_over_seeds(good) if several else (good[0].low, good[0].high) if good else (np.nan, np.nan)
    draws = good[0].draws if good else 0
    return {
        "value": float(np.mean(values)) if one_number else np.nan,
        "low": low if one_number else np.nan,
        "high": high if one_number else np.nan,
        "deviation": float(np.std(values, ddof=1)) if several else good[0].deviation if draws else np.nan,
        "repeats": len(good) if several else draws,
        "over": "seeds" if several else "draws",
        "usable": len(good),
        "results": [run.result for run in runs],
        "marks": list(dict.fromkeys(notes)),
    }


def _interval_over_seeds(good: list[Any]) -> tuple[float, float]:
    """Return the interval of the mean over seeds from the variance over items (averaged over seeds) and over seeds.

    It uses Student's t with the degrees of freedom of both (Welch and Satterthwaite), where those of the items are
    assumed to be large. A seed without an interval is assumed to have the same width as the others.
    """
    from scipy.stats import t

    metric, values = good[0].result.metric(), np.array([run.value for run in good])
    widths = [run.high - run.low for run in good if not np.isnan(run.low)]
    of_items = (np.mean(widths) / 2 / NORMAL) ** 2 if widths else 0.0
    of_seeds = values.var(ddof=1) / len(values)
    total = of_items + of_seeds
    if total <= 0:
        return np.nan, np.nan
    freedom = (len(values) - 1) * total**2 / of_seeds**2 if of_seeds > 0 else np.inf
    half = float(t.ppf(0.975, freedom)) * total**0.5
    low, high = np.clip((values.mean() - half, values.mean() + half), metric.low, metric.high)
    return float(low), float(high)


@dataclass(frozen=True)
class Grid:
    """Models by columns of one family and kind (of KINDS), in the order of its table.

    cells: rows of `cells_of`, indexed by model and column.
    """

    family: str
    kind: str
    models: Sequence[str]
    columns: Sequence[str]
    cells: pd.DataFrame

    def metric(self, column: str) -> Metric:
        """Return unit and direction of a column."""
        metric: Metric = self.cells.xs(column, level="column").results.iloc[0][0].metric()
        return metric

    def wide(self, values: pd.Series) -> pd.DataFrame:
        """Return values of the cells as a table of models by columns; NaN if there is no cell."""
        return values.unstack("column").reindex(index=self.models, columns=self.columns)


def grids_of(cells: pd.DataFrame) -> Iterator[Grid]:
    """Yield the grids of cells, family by family.

    Models of a ranked grid are sorted by win rate; ties, models without a win rate, and other grids by name.
    """
    for (family, kind), part in cells.groupby(level=["family", "kind"]):
        part = part.droplevel(["family", "kind"])
        models, columns = (sorted(part.index.unique(level)) for level in ("model", "column"))
        grid = Grid(family, kind, models, columns, part)
        if not kind:
            rates = win_rates(grid)
            models = list(rates.sort_values(ascending=False, kind="stable", na_position="last").index)
            grid = replace(grid, models=models)
        yield grid


def win_rates(grid: Grid) -> pd.Series:
    """Return the win rate of each model: the share of columns won against another model, averaged over the others.

    Only columns that both models have are compared. A tie is half a win; NaN if a model shares no column with another.
    """
    values = grid.wide(grid.cells.value)
    signs = np.array([grid.metric(name).sign for name in grid.columns])
    scores = values.to_numpy() * signs
    shared = np.isfinite(scores)[:, None] & np.isfinite(scores)[None]
    wins = (scores[:, None] > scores[None]) + 0.5 * (scores[:, None] == scores[None])
    number = shared.sum(2)
    rates = np.divide((wins * shared).sum(2), number, out=np.full(number.shape, np.nan), where=number > 0)
    np.fill_diagonal(rates, np.nan)
    known = np.isfinite(rates).sum(1)
    mean = np.divide(np.nansum(rates, axis=1), known, out=np.full(len(rates), np.nan), where=known > 0)
    return pd.Series(mean, values.index)
