"""Two models on the same tasks: paired bootstrap differences from stored per-image statistics. No re-run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, UsageError
from neco_bench.metrics import segmentation
from neco_bench.metrics.bootstrap import (
    BootstrapMetric,
    Difference,
    class_iou_sums,
    holm,
    miou_sums,
    paired_difference,
    ratio_sums,
    size_sums,
)
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore

# Sizes of regions: the share of an image's labelled pixels that a class covers, from and below.
SIZES = {"small (below 1 %)": (0.0, 0.01), "medium (1 to 10 %)": (0.01, 0.1), "large (from 10 %)": (0.1, 1.1)}


MOST_LISTED = 8  # results in a message


@dataclass(frozen=True)
class ComparisonRow:
    """The comparison of two models on a task, or on one class or size of it."""

    name: str
    first: float | None  # fractions; None: undefined
    second: float | None
    difference: Difference  # second minus first
    p_holm: float  # p adjusted for the number of rows compared together
    items: int  # images or pairs


ResultKey = tuple[object, ...]
StoredResult = tuple[Result, ResultStore]


def results_of(folders: Iterable[ResultStore], model: str, tasks: Sequence[str]) -> dict[ResultKey, StoredResult]:
    """Find the finished results of a model, by task, protocol, settings, seed and limit.

    Args:
        folders: where to look.
        model: its name in the results, or the start of a result's key where equal names have several weights.
        tasks: names or globs; none means all.

    Raises:
        MissingError: where there are no results.
        UsageError: where the name stands for several.
    """
    finished = [(result, store) for store in folders for result in store.load_all() if result.status == "ok"]
    matching: dict[ResultKey, StoredResult] = {}
    for result, store in finished:
        of_model = result.model == model or (len(model) >= 6 and result.key.startswith(model))
        if of_model and (not tasks or any(fnmatchcase(result.task, pattern) for pattern in tasks)):
            changed = json.dumps(result.changed, sort_keys=True, default=str)
            place = (result.task, result.protocol, changed, result.seed, result.limit)
            other = matching.setdefault(place, (result, store))[0]
            if other.key != result.key:
                raise UsageError(
                    f"{model!r} has several results of {result.task}@{result.protocol}: name one by the start of "
                    f"its key, {other.key[:8]} or {result.key[:8]}."
                )
    if not matching:
        names = ", ".join(sorted({result.model for result, _ in finished})) or "none"
        raise MissingError(f"No result of {model!r}{_for_tasks(tasks)}. There are results of: {names}.")
    return matching


def item_scores(result: Result, arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Score each image or pair by its id: mIoU over the classes in it, the mean over seeds and draws, or PCK.

    Images without ground truth are left out.

    Raises:
        MissingError: where a result stores no ids.
        BadInputError: where it stores no counts.
    """
    ids = next((arrays[name] for name in ("image_id", "pair_id", "item_id") if name in arrays), None)
    if ids is None:
        raise MissingError(
            f"The result of {result.model} on {result.task}@{result.protocol} was stored without image ids. Run it "
            f"again with --overwrite."
        )
    if "confusion" in arrays:
        counts = arrays["confusion"]
        images = counts.reshape(-1, *counts.shape[-3:]).swapaxes(0, 1)
        scores = [float(np.mean([segmentation.mean_iou(c, absent="exclude") for c in image])) for image in images]
    elif f"score/{result.primary_metric}" in arrays:
        scores = arrays[f"score/{result.primary_metric}"].tolist()
    else:
        if "hits" not in arrays:
            raise BadInputError(f"The statistics of {result.model} on {result.column} hold no counts of items.")
        scores = (arrays["hits"][:, hits_column(result)] / arrays["totals"]).tolist()
    return {str(name): score for name, score in zip(ids, scores, strict=True) if not np.isnan(score)}


def hits_column(result: Result) -> int:
    """Find the column of the stored hits that belongs to the primary metric, PCK@alpha."""
    try:
        alphas = [f"PCK@{alpha:.2f}" for alpha in _setting(result, "alphas")]
        return alphas.index(result.primary_metric)
    except (TypeError, ValueError) as error:
        raise BadInputError(
            f"The result of {result.model} on {result.column} is not complete: its settings do not name "
            f"{result.primary_metric}. Run it again with --overwrite."
        ) from error


def _setting(result: Result, name: str) -> Any:
    """Read a constant that a result was measured with. Raises BadInputError where it is not recorded."""
    try:
        return result.provenance["settings"][name]
    except KeyError as error:
        raise BadInputError(
            f"The result of {result.model} on {result.column} is not complete: it does not record {name}. Run it again "
            f"with --overwrite."
        ) from error


@dataclass(frozen=True)
class ResultPair:
    """Results of two models on one task and protocol, with their per-image statistics."""

    first: Result
    second: Result
    first_arrays: dict[str, np.ndarray]
    second_arrays: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        """The task with its protocol and what was changed, and the seed where it is not 0."""
        return _measured(self.first)


def find_pairs(folders: Iterable[ResultStore], first: str, second: str, tasks: Sequence[str]) -> list[ResultPair]:
    """Pair the results of two models of the same task, protocol, seed and settings.

    Args:
        folders: where to look.
        first: a model, named as for `results_of`.
        second: the model to compare with it.
        tasks: names or globs; none means all.

    Raises:
        MissingError: where there is nothing to compare.
        UsageError: where a name stands for several results.
        BadInputError: where two results were not measured on the same images.
    """
    stores = list(folders)
    of_first, of_second = (results_of(stores, model, tasks) for model in (first, second))
    shared = sorted(set(of_first) & set(of_second), key=str)
    if not shared:
        raise MissingError(
            f"{first!r} and {second!r} have nothing in common{_for_tasks(tasks)}: task, protocol, settings, limit and "
            f"seed must be the same. {first!r} has {_listed(of_first)}; {second!r} has {_listed(of_second)}."
        )
    pairs, failure = [], None
    for place in shared:
        (one, store), (other, other_store) = of_first[place], of_second[place]
        try:
            pairs.append(_pair(one, other, store.statistics(one), other_store.statistics(other)))
        except NecoBenchError as error:  # the other pairs are compared all the same
            failure = error
            store.problems.append(str(error))
    if failure and not pairs:
        raise failure
    return pairs


def _pair(first: Result, second: Result, *arrays: dict[str, np.ndarray]) -> ResultPair:
    """Pair two results. Raises BadInputError where their images or settings are not the same."""
    for fact in ("dataset_fingerprint", "card_hash", "protocol_hash"):  # input sizes may differ, as strides do
        if first.provenance.get(fact) != second.provenance.get(fact):
            raise BadInputError(
                f"{first.task}@{first.protocol}: the two results differ in {fact}, so their images or settings are not "
                f"the same. Run one of them again with --overwrite."
            )
    counts = ("confusion", "hits", "totals")
    shapes = [{name: side[name].shape for name in counts if name in side} for side in arrays]
    if shapes[0] != shapes[1]:
        raise BadInputError(
            f"{first.task}@{first.protocol}: the statistics of the two results have different shapes, {shapes[0]} and "
            f"{shapes[1]}. Run both again with --overwrite."
        )
    return ResultPair(first, second, *arrays)


def _measured(result: Result) -> str:
    return result.column + (f" seed {result.seed}" if result.seed else "")


def _listed(results: dict[ResultKey, StoredResult]) -> str:
    names = sorted({_measured(result) for result, _ in results.values()})
    return ", ".join(names[:MOST_LISTED]) + (
        f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    )


def _for_tasks(tasks: Sequence[str]) -> str:
    return f" for {', '.join(tasks)}" if tasks else ""


def compare_tasks(pairs: Sequence[ResultPair], *, draws: int = 10_000) -> list[ComparisonRow]:
    """Compare the primary metric of each pair; p is adjusted over the rows."""
    rows = []
    for pair in pairs:
        (difference,) = paired_difference(*_sums(pair), draws=draws, seed=pair.first.seed)
        metric = pair.first.primary_metric
        values = pair.first.metrics[metric], pair.second.metrics[metric]
        rows.append((pair.name, *values, difference, pair.first.n_images))
    return _adjusted(rows)


def compare_classes(pair: ResultPair, *, draws: int = 10_000) -> list[ComparisonRow]:
    """Compare the classes of pixels or categories of pairs, the largest gain first; p is adjusted over them.

    Raises:
        BadInputError: for a result that does not name them.
    """
    if "confusion" in pair.first_arrays:
        first, second = (class_iou_sums(arrays["confusion"]) for arrays in (pair.first_arrays, pair.second_arrays))
        names = list(next(iter(pair.first.per_class.values()), ()))
        if len(names) != pair.first_arrays["confusion"].shape[-1]:
            raise BadInputError(f"{pair.name}: the result of {pair.first.model} does not name its classes.")
        items = np.full(len(names), pair.first.n_images)
    else:
        first, second = _point_sums(pair, apart=True)
        categories = list(pair.first.per_class.get(pair.first.primary_metric, ()))
        present, items = np.unique(pair.first_arrays["category"], return_counts=True)
        if present.max(initial=0) >= len(categories):
            raise BadInputError(f"{pair.name}: the result of {pair.first.model} does not name its categories.")
        names = [categories[number] for number in present]
    differences = paired_difference(first, second, draws=draws, seed=pair.first.seed)
    rows = [
        (name, None if np.isnan(a) else float(a), None if np.isnan(b) else float(b), d, int(count))
        for name, a, b, d, count in zip(names, first.value(), second.value(), differences, items, strict=True)
    ]
    rows.sort(key=lambda row: -np.nan_to_num(row[3].value, nan=-9.0))
    return _adjusted(rows)


def compare_sizes(pair: ResultPair, *, draws: int = 10_000) -> list[ComparisonRow]:
    """Compare mIoU on small, medium and large regions (SIZES); p is adjusted over them.

    A region is all that one class covers in one image.

    Raises:
        UsageError: for results without confusion counts.
    """
    if "confusion" not in pair.first_arrays:
        raise UsageError(f"{pair.name} has no regions of pixels to compare.")
    rows = []
    for name, (low, high) in SIZES.items():
        first, second = (
            size_sums(arrays["confusion"], low, high) for arrays in (pair.first_arrays, pair.second_arrays)
        )
        items = int((first.columns > 0).any(1).sum())
        if items:
            (difference,) = paired_difference(first, second, draws=draws, seed=pair.first.seed)
            rows.append((name, float(first.value()), float(second.value()), difference, items))
    return _adjusted(rows)


def compare_images(pair: ResultPair) -> list[tuple[str, float, float]]:
    """Compare each image or pair: (id, first, second) as in `item_scores`, the largest gain first.

    Raises:
        MissingError: where a result stores no ids.
    """
    first, second = item_scores(pair.first, pair.first_arrays), item_scores(pair.second, pair.second_arrays)
    rows = [(name, first[name], second[name]) for name in first if name in second]
    return sorted(rows, key=lambda row: (row[1] - row[2], row[0]))


def _sums(pair: ResultPair) -> tuple[BootstrapMetric, BootstrapMetric]:
    """The primary metric of the two, over the same items. Raises BadInputError for statistics of another kind."""
    sides = (pair.first_arrays, pair.second_arrays)
    if all("confusion" in arrays for arrays in sides):
        first, second = (miou_sums(arrays["confusion"], _setting(pair.first, "absent")) for arrays in sides)
        return first, second
    if all("hits" in arrays for arrays in sides):
        first, second = _point_sums(pair)
        return first, second
    raise BadInputError(f"{pair.name}: the stored statistics are not of a kind that can be compared.")


def _point_sums(pair: ResultPair, *, apart: bool = False) -> list[BootstrapMetric]:
    """PCK of the two by the average of the primary metric, or with `apart` that of each category."""
    settings, column = pair.first.provenance.get("settings", {}), hits_column(pair.first)
    average = settings.get("average") or ("class_mean" if settings.get("pairs_per_bin") is not None else "points")
    sides = []
    for arrays in (pair.first_arrays, pair.second_arrays):
        hits, totals = arrays["hits"][:, column], arrays["totals"]
        if average == "pairs":
            hits, totals = hits / totals, np.ones(len(totals))
        groups = arrays["category"] if apart or average == "class_mean" else None
        sides.append(ratio_sums(hits, totals, groups, images=arrays.get("images"), apart=apart))
    return sides


def _adjusted(rows: Sequence[tuple[str, float | None, float | None, Difference, int]]) -> list[ComparisonRow]:
    adjusted = holm(np.array([difference.p for _, _, _, difference, _ in rows]))
    return [
        ComparisonRow(name, a, b, difference, float(p), items)
        for (name, a, b, difference, items), p in zip(rows, adjusted, strict=True)
    ]
