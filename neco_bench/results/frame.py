"""Results as a pandas table, as returned by `neco_bench.load_results` and written to the `.full.csv` files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore

# Columns of `results_frame`. Unknown text is None.
COLUMNS = {
    "family": "object",
    "model": "object",
    "task": "object",
    "protocol": "object",
    "seed": "int64",
    "status": "object",  # ok or failed
    "metric": "object",
    "primary": "bool",  # whether this is the metric of the leaderboards
    "value": "float64",  # as stored: a fraction if the unit is percent
    "ci95_low": "float64",
    "ci95_high": "float64",
    "n_images": "int64",  # images or pairs
    "subset": "object",  # split found/expected of incomplete splits, else empty
    "limit": "Int64",
    "changed": "object",  # the changes of --set, as JSON
    "weights_id": "object",
    "protocol_hash": "object",
    "seconds": "float64",
    "peak_memory_mb": "float64",
    "key": "object",
    "error": "object",
    "unit": "object",  # percent (value is a fraction), metres, degrees or ratio
    "direction": "object",  # higher or lower is better
    "interval_over": "object",  # sampling units of the interval of the primary metric
    "rankable": "bool",  # whole data set and unchanged protocol
}


def load_results(*folders: Path | str) -> pd.DataFrame:
    """Load stored results as a table, one row per result and metric; the primary metrics are `frame[frame.primary]`.

    Args:
        folders: results folders, which are read with their subfolders; the default is `results`.

    Returns:
        A table with the columns of COLUMNS, ordered by folder and path. Metrics are fractions. A failed result has one
        row with the value NaN.

    Raises:
        MissingError: if a folder does not exist. Files that cannot be used are skipped and named in warnings.

    Example: the share of correct points for each model of a folder.

    >>> import neco_bench
    >>> frame = neco_bench.load_results("leaderboards/example/results")
    >>> scores = frame[frame.primary & frame.rankable & (frame.task == "shapes_correspondence")]
    >>> scores.set_index("model").value.round(3).head(2).to_dict()
    {'baseline_hog': 0.183, 'baseline_rgb': 0.152}
    """
    results = []
    for folder in folders or ("results",):
        store = ResultStore(folder)
        results += store.load_all()
        for problem in store.problems:
            warnings.warn(problem, stacklevel=2)
    return results_frame(results)


def results_frame(results: Iterable[Result]) -> pd.DataFrame:
    """Arrange results as a table with the columns of COLUMNS, one row per result and metric."""
    rows = []
    for result in results:
        metrics: dict[str, float | None] = {**result.metrics} or {result.primary_metric: None}
        for metric, value in metrics.items():
            low, high = result.ci95.get(metric, (None, None))
            rows.append(
                {
                    "family": result.family,
                    "model": result.model,
                    "task": result.task,
                    "protocol": result.protocol,
                    "seed": result.seed,
                    "status": result.status,
                    "metric": metric,
                    "primary": metric == result.primary_metric,
                    "value": value,
                    "ci95_low": low,
                    "ci95_high": high,
                    "n_images": result.n_images,
                    "subset": "; ".join(result.subset_notes),
                    "limit": result.limit,
                    "changed": json.dumps(result.changed, sort_keys=True) if result.changed else None,
                    "weights_id": result.provenance.get("weights_id"),
                    "protocol_hash": result.provenance.get("protocol_hash"),
                    "seconds": result.timing.get("total"),
                    "peak_memory_mb": result.peak_memory_mb,
                    "key": result.key,
                    "error": result.error,
                    "unit": result.metric(metric).unit,
                    "direction": result.metric(metric).direction,
                    "interval_over": (result.drawn_text or None) if metric == result.primary_metric else None,
                    "rankable": result.rankable,
                }
            )
    return pd.DataFrame(rows, columns=list(COLUMNS), dtype="object").astype(COLUMNS)
