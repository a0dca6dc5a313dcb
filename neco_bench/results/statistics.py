"""Compute the primary metric, the intervals and the item ids of a result from its stored per-item statistics.

The supported forms of statistics are those of `core.sampling`. Results of other forms (plug-ins) are used as stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neco_bench.core.errors import BadInputError, NecoBenchError
from neco_bench.core.sampling import Sampling
from neco_bench.data.load import DATASETS
from neco_bench.metrics.intervals import Interval, estimate
from neco_bench.metrics.sums import SumMetric, category_sums, mean_sums, miou_sums
from neco_bench.results.schema import Drawn, Result

Arrays = Mapping[str, np.ndarray]

# For classes in fewer images than this, intervals do not reach their nominal coverage.
RARE = 5


def item_ids(arrays: Arrays) -> list[str] | None:
    """Return the ids of the items; None if they were not stored."""
    ids = next((arrays[name] for name in ("image_id", "pair_id", "item_id") if name in arrays), None)
    return None if ids is None else ids.astype(str).tolist()


def in_order(arrays: Arrays, ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the statistics with their items in the order of `ids`.

    Raises:
        BadInputError: if the items have other ids, or none.
    """
    own = item_ids(arrays)
    if own is None or len(set(own)) < len(own) or set(own) != set(ids):
        raise BadInputError("The statistics belong to different items. Run both tasks again with --overwrite.")
    if own == list(ids):
        return dict(arrays)
    rows = {name: row for row, name in enumerate(own)}
    order = np.array([rows[name] for name in ids])
    ordered = {}
    for name, array in arrays.items():
        axis = -3 if name == "confusion" else -1 if name.startswith(("score/", "square/")) else 0
        ordered[name] = array if name == "mapping" else np.take(array, order, axis=axis)
    return ordered


def setting(result: Result, name: str) -> Any:
    """Return a protocol constant of a result. Raises BadInputError if it is not recorded."""
    try:
        return result.provenance["settings"][name]
    except KeyError as error:
        raise BadInputError(
            f"The result of {result.model} on {result.column} is not complete: it does not record {name}. Run it again "
            f"with --overwrite."
        ) from error


def hits_column(result: Result) -> int:
    """Return the column of the stored hits that belongs to the primary metric, PCK@alpha."""
    try:
        alphas = [f"PCK@{alpha:.2f}" for alpha in setting(result, "alphas")]
        return alphas.index(result.primary_metric)
    except (TypeError, ValueError) as error:
        raise BadInputError(
            f"The result of {result.model} on {result.column} is not complete: its settings do not name "
            f"{result.primary_metric}. Run it again with --overwrite."
        ) from error


def pck_sums(result: Result, arrays: Arrays, column: int, *, apart: bool = False) -> SumMetric:
    """Return PCK at one threshold with the average of the primary metric, or with `apart` PCK of each category."""
    settings = result.provenance.get("settings", {})
    average = settings.get("average") or ("class_mean" if settings.get("pairs_per_bin") is not None else "points")
    hits, totals = arrays["hits"][:, column], arrays["totals"]
    if average == "pairs":
        hits, totals = hits / totals, np.ones(len(totals))
    mean = "categories" if average == "class_mean" else "totals"
    return category_sums(hits, totals, arrays["category"], mean=mean, apart=apart)


def primary_sums(result: Result, arrays: Arrays) -> SumMetric:
    """Return the primary metric as a function of sums over items. Raises BadInputError for an unknown form."""
    name = result.primary_metric
    if "confusion" in arrays:
        return miou_sums(arrays["confusion"], setting(result, "absent"))
    if "hits" in arrays and "category" in arrays:
        return pck_sums(result, arrays, hits_column(result))
    for form in ("score", "square"):
        if f"{form}/{name}" in arrays:
            return _mean(result, name, arrays, form)
    raise BadInputError(f"The statistics of {result.model} on {result.column} are not of a kind that can be compared.")


def _mean(result: Result, name: str, arrays: Arrays, form: str) -> SumMetric:
    metric = result.metric(name)
    fraction = form == "score" and (metric.low, metric.high) == (0.0, 1.0)
    return mean_sums(arrays[f"{form}/{name}"], arrays.get("weight"), root=form == "square", fraction=fraction)


def known_sums(result: Result, arrays: Arrays) -> dict[str, SumMetric]:
    """Return every metric that can be computed from the statistics, by name."""
    settings = result.provenance.get("settings", {})
    if "confusion" in arrays:
        known = result.primary_metric == "mIoU" and settings.get("absent") in ("zero", "exclude", "union")
        return {"mIoU": primary_sums(result, arrays)} if known else {}
    if "hits" in arrays and "category" in arrays:
        alphas = [f"PCK@{alpha:.2f}" for alpha in settings.get("alphas", ())]
        if result.primary_metric not in alphas or len(alphas) != arrays["hits"].shape[1]:
            return {}
        return {name: pck_sums(result, arrays, column) for column, name in enumerate(alphas)}
    sums = {}
    for array in arrays:
        form, _, name = array.partition("/")
        if form in ("score", "square") and name in result.metrics:
            sums[name] = _mean(result, name, arrays, form)
    return sums


def sampling_of(result: Result, arrays: Arrays) -> Sampling:
    """Return how the items were sampled, according to the data set with the stored name and for the stored ids."""
    if "hits" in arrays:
        return Sampling("pair", images=arrays.get("images"))
    datasets = result.provenance.get("dataset", {})
    facts: dict[str, Any] = next((datasets[role] for role in ("val", "test") if role in datasets), {})
    ids, unit, names = item_ids(arrays), facts.get("sampling_unit"), arrays.get("group")
    if names is not None:
        return Sampling.of(unit or "group", names.astype(str).tolist())
    try:
        dataset = DATASETS.load(facts.get("name", ""))
        if ids is None:
            return Sampling(unit or dataset.sampling_unit)
        return Sampling.of(unit or dataset.sampling_unit, [dataset.group_of(item) for item in ids])
    except (NecoBenchError, AttributeError):  # a data set of a plug-in that is not installed, or not a data set
        return Sampling(unit or "image")


def check_primary(result: Result, sums: Mapping[str, SumMetric]) -> None:
    """Raise BadInputError if the primary metric of a document differs from the value computed from its statistics."""
    name = result.primary_metric
    if result.status != "ok" or name not in sums:
        return
    computed, stored = float(sums[name].value()), result.metrics[name]
    if not abs(computed - stored) <= 1e-9 * max(1.0, abs(stored)):  # equal, except for rounding
        raise BadInputError(
            f"{name} of {result.model} on {result.column} is {stored:.6g}, but its stored counts give {computed:.6g}: "
            f"one of the two was changed. Run it again with --overwrite."
        )


def with_intervals(result: Result, arrays: Arrays, sums: Mapping[str, SumMetric] | None = None) -> Result:
    """Return the result with intervals computed from its statistics; unchanged if they give none."""
    sums = known_sums(result, arrays) if sums is None else sums
    if not sums or result.status != "ok":
        return result
    sampling, ci95 = sampling_of(result, arrays), dict(result.ci95)
    drawn = result.drawn
    for name, metric in sums.items():
        try:
            interval = estimate(metric, sampling).interval(_notes(result, arrays))
        except NecoBenchError:  # undefined
            continue
        ci95.pop(name, None)
        if interval.ends is not None:
            ci95[name] = interval.ends
        if name == result.primary_metric:
            drawn = _drawn(interval)
    return result.model_copy(update={"ci95": ci95, "drawn": drawn})


def _drawn(interval: Interval) -> Drawn:
    return Drawn(
        unit=interval.unit,
        units=interval.units,
        groups=interval.groups,
        repeats=interval.repeats,
        method=interval.method,
        notes=list(interval.notes),
    )


def _notes(result: Result, arrays: Arrays) -> list[str]:
    """Return notes on what the interval does not cover, derived from the counts."""
    if "confusion" not in arrays:
        return []
    counts = arrays["confusion"]
    truth = counts.reshape(-1, *counts.shape[-3:])[0].sum(2)
    images = (truth > 0).sum(0)
    rare, absent, classes = int(((images > 0) & (images < RARE)).sum()), int((images == 0).sum()), len(images)
    notes = [f"{rare} of {classes} classes are in fewer than {RARE} images"] if rare else []
    zero = result.provenance.get("settings", {}).get("absent") == "zero"
    return notes + ([f"{absent} of {classes} classes are in no image and count as 0"] if absent and zero else [])
