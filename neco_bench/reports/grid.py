"""Results arranged as models by columns (task@protocol), and their ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from neco_bench.results.schema import Result

# Provenance entries in which the results of one cell (the seeds) must agree; otherwise the cell reads "ambiguous".
SETTINGS = ("dataset_fingerprint", "card_hash", "features", "precision")

# Results that stand in a table of their own, by the ending of its name.
KINDS = {"": "", ".subset": "parts of the data sets", ".unranked": "--limit or --set, never ranked"}

RUN_COLUMNS = {
    "family": "object",
    "kind": "object",  # of KINDS
    "model": "object",  # names in all tables
    "column": "object",
    "weights_id": "object",
    "protocol_hash": "object",
    "official": "object",  # are these the weights that a name of the zoo stands for? None: it stands for none
    "seed": "int64",
    "settings": "object",  # as JSON
    "ok": "bool",
    "value": "float64",  # of the primary metric, a fraction, with its interval
    "low": "float64",
    "high": "float64",
    "draws": "int64",  # of the training set, and the deviation over them
    "deviation": "float64",
    "result": "object",
}


def runs_frame(results: Iterable[Result]) -> pd.DataFrame:
    """Arrange results as a table with RUN_COLUMNS, one row each, under the names that they have in all tables.

    Results of equal key and metrics (copies in several folders) count once. The rows do not depend on the order of the
    results.
    """
    ordered = sorted(results, key=lambda result: json.dumps(result.model_dump(), sort_keys=True, default=str))
    distinct = {(r.key, r.status, json.dumps(r.metrics, sort_keys=True)): r for r in ordered}
    rows = [_run(result) for result in distinct.values()]
    runs = pd.DataFrame(rows, columns=list(RUN_COLUMNS), dtype="object").astype(RUN_COLUMNS)
    weights = runs.groupby(["model", "weights_id"], dropna=False).official
    other = weights.transform(lambda known: False in set(known) and True not in set(known)).astype(bool)
    several_weights = runs.groupby("model").weights_id.transform("nunique") > 1
    several_hashes = runs.groupby(["family", "column"]).protocol_hash.transform("nunique") > 1
    return runs.assign(
        model=runs.model.mask(other | several_weights, _with_id(runs.model, "weights", runs.weights_id)),
        column=runs.column.mask(several_hashes, _with_id(runs.column, "hash", runs.protocol_hash)),
    )


def _run(result: Result) -> dict[str, Any]:
    metric, provenance = result.primary_metric, result.provenance
    low, high = result.ci95.get(metric, (None, None))
    given = "weights" in (provenance.get("arguments") or {})  # all that earlier versions recorded of the weights
    official = provenance.get("official", False if given else None)
    return {
        "family": result.family,
        "kind": ".unranked" if result.is_changed else ".subset" if result.subset else "",
        "model": result.model,
        "column": result.column,
        "weights_id": provenance.get("weights_id") or None,
        "protocol_hash": provenance.get("protocol_hash") or None,
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


def _with_id(names: pd.Series, word: str, ids: pd.Series) -> pd.Series:
    return names + f" ({word} " + ids.map(lambda identity: identity[:8] if identity else "unknown") + ")"


def cells_of(runs: pd.DataFrame) -> pd.DataFrame:
    """Summarise the runs of each cell of the tables.

    Returns:
        A table indexed by family, kind, model and column, of `value` (mean over seeds; NaN where the cell has no one
        number), `low` and `high` (means too; NaN without intervals), `deviation` (over `repeats` seeds, or draws of the
        training set, as `over` says; NaN for one), `usable` (number of results that did not fail), and `results` (these
        first, by seed).
    """
    cell = ["family", "kind", "model", "column"]
    runs = runs.sort_values(["ok", "seed"], ascending=[False, True], kind="stable")
    good = runs[runs.ok]
    mean = good.groupby(cell).value.transform("mean")
    # A seed without an interval counts as a point, where others have one.
    good = good.assign(low=good.low.fillna(mean), high=good.high.fillna(mean), interval=good.low.notna())
    groups = good.groupby(cell)
    cells = groups.agg(
        value=("value", "mean"),
        low=("low", "mean"),
        high=("high", "mean"),
        interval=("interval", "any"),
        over_seeds=("value", "std"),
        over_draws=("deviation", "first"),
        draws=("draws", "first"),
        usable=("seed", "size"),
        seeds=("seed", "nunique"),
        settings=("settings", "nunique"),
    )
    cells = runs.groupby(cell).result.agg(list).to_frame("results").join(cells)
    several = cells.usable > 1
    return pd.DataFrame(
        {
            "value": cells.value.where((cells.settings == 1) & (cells.seeds == cells.usable)),
            "low": cells.low.where(cells.interval.eq(True)),
            "high": cells.high.where(cells.interval.eq(True)),
            "deviation": cells.over_seeds.where(several, cells.over_draws.where(cells.draws > 0)),
            "repeats": cells.usable.where(several, cells.draws).fillna(0).astype(int),
            "over": np.where(several, "seeds", "draws"),
            "usable": cells.usable.fillna(0).astype(int),
            "results": cells.results,
        }
    )


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

    def wide(self, values: pd.Series) -> pd.DataFrame:
        """Spread values of the cells to a table of models by columns; NaN where there is no cell."""
        return values.unstack("column").reindex(index=self.models, columns=self.columns)


def grids_of(cells: pd.DataFrame) -> Iterator[Grid]:
    """Arrange cells as grids, family by family.

    Models of a ranked grid that have every column come first, by mean rank; ties, and all others, are in order of name.
    """
    for (family, kind), part in cells.groupby(level=["family", "kind"]):
        part = part.droplevel(["family", "kind"])
        models, columns = (sorted(part.index.unique(level)) for level in ("model", "column"))
        grid = Grid(family, kind, models, columns, part)
        if not kind:
            mean_ranks = ranks(grid.wide(part.value)).mean(axis=1)
            models = list(mean_ranks.reindex(models).sort_values(kind="stable").index)
            grid = Grid(family, kind, models, columns, part)
        yield grid


def ranks(values: pd.DataFrame) -> pd.DataFrame:
    """Rank the models that have every column, 1 for the best; ties share the mean of their ranks."""
    return values.dropna().rank(ascending=False)


def percent(fraction: float) -> str:
    """Format a fraction as all tables print it."""
    return f"{100 * fraction:.1f}"
