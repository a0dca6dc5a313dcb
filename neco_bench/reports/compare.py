"""Compare two models on the same tasks: paired differences from stored per-item statistics, without running again."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

import numpy as np

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, UsageError, first_names
from neco_bench.core.metric import Metric
from neco_bench.metrics import segmentation
from neco_bench.metrics.intervals import FEWEST
from neco_bench.metrics.paired import DRAWS, Difference, holm, paired_difference
from neco_bench.metrics.sums import SumMetric, class_iou_sums, merged, size_sums
from neco_bench.reports.comparable import MUST, differences, fact
from neco_bench.results.schema import Result
from neco_bench.results.statistics import (
    Arrays,
    hits_column,
    in_order,
    item_ids,
    pck_sums,
    primary_sums,
    sampling_of,
)
from neco_bench.results.store import ResultStore

# Sizes of regions: limits of the share of an image's labelled pixels that a class covers.
SIZES = {"small (below 1 %)": (0.0, 0.01), "medium (1 to 10 %)": (0.01, 0.1), "large (from 10 %)": (0.1, 1.1)}


@dataclass(frozen=True)
class ComparisonRow:
    """The comparison of two models on a task, or on one class or size of it.

    first, second: values of the metric; None: undefined. difference: second minus first. p_holm: p adjusted for the
    number of rows compared together. note: other differences between the two results, and limits of the comparison.
    """

    name: str
    metric: Metric
    first: float | None
    second: float | None
    difference: Difference
    p_holm: float
    note: str = ""

    @property
    def items(self) -> int:
        """Number of units that the test uses: those on which the two models differ."""
        return self.difference.units

    @property
    def unit(self) -> str:
        """Name of the unit."""
        return self.difference.unit


ResultKey = tuple[object, ...]
StoredResult = tuple[Result, ResultStore]


def is_named(result: Result, task: str) -> bool:
    """Return whether `task` is the task of a result: its name or a glob, optionally with @ and the protocol."""
    names = (result.task, f"{result.task}@{result.protocol}")
    return task in names or any(fnmatchcase(name, task) for name in names)


def results_of(folders: Sequence[ResultStore], model: str, tasks: Sequence[str]) -> dict[ResultKey, StoredResult]:
    """Return the successful results of a model, by task, protocol, settings, seed and limit.

    Args:
        folders: results folders.
        model: its name in the results, or the start of a result's key if one name has several weights.
        tasks: see `is_named`; all if empty.

    Raises:
        MissingError: if there are no results.
        UsageError: if the name matches several results of one task.
    """
    finished = [(result, store) for store in folders for result in store.load_all() if result.status == "ok"]
    matching: dict[ResultKey, StoredResult] = {}
    for result, store in finished:
        of_model = result.model == model or (len(model) >= 6 and result.key.startswith(model))
        if of_model and (not tasks or any(is_named(result, task) for task in tasks)):
            other = matching.setdefault(result_key(result), (result, store))[0]
            if other.key != result.key:
                raise UsageError(
                    f"{model!r} has several results of {result.task}@{result.protocol}: name one by the start of "
                    f"its key, {other.key[:8]} or {result.key[:8]}."
                )
    if not matching:
        names = ", ".join(sorted({result.model for result, _ in finished})) or "none"
        raise MissingError(f"No result of {model!r}{_for_tasks(tasks)}. Results exist for: {names}.")
    return matching


def unmatched(tasks: Iterable[str], matching: Iterable[StoredResult], models: str) -> list[str]:
    """Return a message for each task, see `is_named`, of which no result matches."""
    results = [result for result, _ in matching]
    return [
        f"No result of {models} for {task}." for task in tasks if not any(is_named(result, task) for result in results)
    ]


def result_key(result: Result) -> ResultKey:
    """Return what two results must share to be compared: task, protocol, settings, seed and limit."""
    changed = json.dumps(result.changed, sort_keys=True, default=str)
    return (result.task, result.protocol, changed, result.seed, result.limit)


def item_scores(result: Result, arrays: Arrays) -> dict[str, float]:
    """Return the score of each item by its id: mIoU over the classes in the image, PCK, or the item's own score.

    Scores are averaged over seeds and draws. Images without ground truth are left out.

    Raises:
        MissingError: if a result stores no ids.
        BadInputError: if it stores no counts.
    """
    ids = item_ids(arrays)
    if ids is None:
        raise MissingError(
            f"The result of {result.model} on {result.task}@{result.protocol} was stored without image ids. Run it "
            f"again with --overwrite."
        )
    if "confusion" in arrays:
        counts = arrays["confusion"]
        images = counts.reshape(-1, *counts.shape[-3:]).swapaxes(0, 1)
        scores = [float(np.mean([segmentation.mean_iou(c, absent="exclude") for c in image])) for image in images]
    elif "hits" in arrays:
        scores = (arrays["hits"][:, hits_column(result)] / arrays["totals"]).tolist()
    else:
        form = next((f for f in ("score", "square") if f"{f}/{result.primary_metric}" in arrays), None)
        if form is None:
            raise BadInputError(f"The statistics of {result.model} on {result.column} contain no counts of items.")
        values = np.atleast_2d(arrays[f"{form}/{result.primary_metric}"]).mean(0)
        scores = (np.sqrt(values) if form == "square" else values).tolist()
    return {name: score for name, score in zip(ids, scores, strict=True) if not np.isnan(score)}


@dataclass(frozen=True)
class ResultPair:
    """Results of two models on one task and protocol, one pair per seed, and their per-item statistics.

    All statistics have their items in the same order.
    """

    results: Sequence[tuple[Result, Result]]
    arrays: Sequence[tuple[Arrays, Arrays]]

    @property
    def first(self) -> Result:
        """The first model's result for the first seed."""
        return self.results[0][0]

    @property
    def second(self) -> Result:
        """The second model's result for the first seed."""
        return self.results[0][1]

    @property
    def first_arrays(self) -> Arrays:
        """Statistics of `first`."""
        return self.arrays[0][0]

    @property
    def second_arrays(self) -> Arrays:
        """Statistics of `second`."""
        return self.arrays[0][1]

    @property
    def name(self) -> str:
        """The task with its protocol and changes, and the seed if it is a single one other than 0."""
        if len(self.results) > 1:
            return f"{self.first.column} ({len(self.results)} seeds)"
        return _measured(self.first)

    @property
    def note(self) -> str:
        """Conditions in which the two results differ, and what their interval does not cover."""
        drawn = self.first.drawn
        notes = [note for note in (drawn.notes if drawn else []) if not note.startswith("fewer than")]
        return "; ".join([*differences(self.first, self.second), *notes])

    def sums(self, of: Callable[[Result, Arrays], SumMetric]) -> tuple[SumMetric, SumMetric]:
        """Return a metric of the two models over the same items and all seeds."""
        first, second = (
            merged([of(results[side], arrays[side]) for results, arrays in zip(self.results, self.arrays, strict=True)])
            for side in (0, 1)
        )
        return first, second


def find_pairs(folders: Sequence[ResultStore], first: str, second: str, tasks: Sequence[str]) -> list[ResultPair]:
    """Pair the results of two models with the same task, protocol and settings; several seeds form one pair.

    Args:
        folders: results folders.
        first: a model, see `results_of`.
        second: the model to compare with it.
        tasks: see `is_named`; all if empty.

    Raises:
        MissingError: if there is nothing to compare.
        UsageError: if a name matches several results of one task.
        BadInputError: if two results were not measured on the same images.
    """
    of_first, of_second = (results_of(folders, model, tasks) for model in (first, second))
    shared = sorted(set(of_first) & set(of_second), key=str)
    if not shared:
        raise MissingError(
            f"{first!r} and {second!r} have nothing in common{_for_tasks(tasks)}: task, protocol, settings, limit and "
            f"seed must be the same. {first!r} has {_listed(of_first)}; {second!r} has {_listed(of_second)}."
        )
    folders[0].problems += unmatched(tasks, map(of_first.__getitem__, shared), f"{first!r} and {second!r}")
    return pair_results(of_first, of_second)


def pair_results(of_first: dict[ResultKey, StoredResult], of_second: dict[ResultKey, StoredResult]) -> list[ResultPair]:
    """Pair the results that two models have in common; see `find_pairs`.

    Raises:
        NecoBenchError: the last problem, if no results can be paired; else problems are added to those of the stores.
    """
    by_task: dict[ResultKey, list[tuple[tuple[Result, Result], tuple[Arrays, Arrays]]]] = defaultdict(list)
    failure = None
    for place in sorted(set(of_first) & set(of_second), key=str):
        (one, store), (other, other_store) = of_first[place], of_second[place]
        task = (*place[:3], place[4])  # without the seed
        try:
            ids = item_ids(by_task[task][0][1][0]) if by_task[task] else None
            arrays = _paired(one, other, store.statistics(one), other_store.statistics(other), ids)
            by_task[task].append(((one, other), arrays))
        except NecoBenchError as error:  # the other pairs are still compared
            failure = error
            store.problems.append(str(error))
    pairs = [ResultPair(*map(list, zip(*found, strict=True))) for found in by_task.values() if found]
    if failure and not pairs:
        raise failure
    return pairs


def _paired(first: Result, second: Result, own: Arrays, others: Arrays, ids: list[str] | None) -> tuple[Arrays, Arrays]:
    """Return the statistics of two results with the same items in the same order: that of `ids`, else of the first.

    Raises:
        BadInputError: if their images or settings differ.
    """
    place = f"{first.task}@{first.protocol}"
    for name in MUST:
        if fact(first, name) != fact(second, name):
            raise BadInputError(
                f"{place}: the two results differ in {name}, so their images or settings are not the same. Run one of "
                f"them again with --overwrite."
            )
    counts = ("confusion", "hits", "totals")
    shapes = [{name: side[name].shape for name in counts if name in side} for side in (own, others)]
    if shapes[0] != shapes[1] and {*shapes[0]} == {*shapes[1]}:
        shapes = [{name: shape[-2:] for name, shape in side.items() if name != "totals"} for side in shapes]
    if shapes[0] != shapes[1]:
        raise BadInputError(
            f"{place}: the statistics of the two results have different shapes, {shapes[0]} and {shapes[1]}. Run both "
            f"again with --overwrite."
        )
    ids = ids or item_ids(own)
    if ids is None or item_ids(others) is None:
        raise MissingError(f"{place}: a result was stored without the ids of its items. Run it again with --overwrite.")
    try:
        return in_order(own, ids), in_order(others, ids)
    except BadInputError as error:
        raise BadInputError(
            f"{place}: the two results were measured on different items. Run both again with --overwrite."
        ) from error


def _measured(result: Result) -> str:
    return result.column + (f" seed {result.seed}" if result.seed else "")


def _listed(results: dict[ResultKey, StoredResult]) -> str:
    return first_names(sorted({_measured(result) for result, _ in results.values()}))


def _for_tasks(tasks: Sequence[str]) -> str:
    return f" for {', '.join(tasks)}" if tasks else ""


def compare_tasks(pairs: Sequence[ResultPair], *, draws: int = DRAWS) -> list[ComparisonRow]:
    """Compare the primary metric of each pair; p is adjusted over the rows, where several seeds are one row."""
    rows = []
    for pair in pairs:
        first, second = pair.sums(primary_sums)
        (difference,) = _differences(pair, first, second, draws)
        rows.append(
            _row(pair.name, float(first.value()), float(second.value()), difference, pair.first.metric(), pair.note)
        )
    return _adjusted(rows)


def class_sums(result: Result, arrays: Arrays) -> tuple[list[str], SumMetric]:
    """Return the names of classes or categories, and their IoU or PCK as functions of sums over items.

    Raises:
        BadInputError: if the result does not name them, or the statistics have none.
    """
    if "confusion" in arrays:
        names = list(next(iter(result.per_class.values()), ()))
        if len(names) != arrays["confusion"].shape[-1]:
            raise BadInputError(f"{result.column}: the result of {result.model} does not name its classes.")
        return names, class_iou_sums(arrays["confusion"])
    if "hits" not in arrays:
        raise BadInputError(f"The statistics of {result.model} on {result.column} have no classes.")
    categories = list(result.per_class.get(result.primary_metric, ()))
    present = np.unique(arrays["category"])
    if present.max(initial=0) >= len(categories):
        raise BadInputError(f"{result.column}: the result of {result.model} does not name its categories.")
    return [categories[number] for number in present], pck_sums(result, arrays, hits_column(result), apart=True)


def compare_classes(pair: ResultPair, *, draws: int = DRAWS) -> list[ComparisonRow]:
    """Compare each class or category, sorted by gain, the largest first; p is adjusted over them.

    Raises:
        BadInputError: if a result does not name them.
    """
    if not {"confusion", "hits"} & set(pair.first_arrays):
        return []
    names = class_sums(pair.first, pair.first_arrays)[0]
    first, second = pair.sums(lambda result, arrays: class_sums(result, arrays)[1])
    values = first.value(), second.value()
    rows = [
        _row(name, a, b, difference, Metric())
        for name, a, b, difference in zip(names, *values, _differences(pair, first, second, draws), strict=True)
    ]
    rows.sort(key=lambda row: -np.nan_to_num(row.difference.value, nan=-9.0))
    return _adjusted(rows)


def compare_sizes(pair: ResultPair, *, draws: int = DRAWS) -> list[ComparisonRow]:
    """Compare mIoU on small, medium and large regions (SIZES); p is adjusted over them.

    A region is all pixels of one class in one image.

    Raises:
        UsageError: if the results have no confusion counts.
    """
    if "confusion" not in pair.first_arrays:
        raise UsageError(f"{pair.name} has no regions of pixels to compare.")
    rows = []
    for name, limits in SIZES.items():
        first, second = pair.sums(partial(_of_size, limits))
        if (first.columns > 0).any():
            (difference,) = _differences(pair, first, second, draws)
            rows.append(_row(name, float(first.value()), float(second.value()), difference, Metric()))
    return _adjusted(rows)


def _of_size(limits: tuple[float, float], result: Result, arrays: Arrays) -> SumMetric:
    return size_sums(arrays["confusion"], *limits)


def compare_images(pair: ResultPair) -> list[tuple[str, float, float]]:
    """Return (id, first score, second score) of each image or pair, the largest gain first; see `item_scores`.

    Raises:
        MissingError: if a result stores no ids.
    """
    first, second = item_scores(pair.first, pair.first_arrays), item_scores(pair.second, pair.second_arrays)
    rows = [(name, first[name], second[name]) for name in first if name in second]
    return sorted(rows, key=lambda row: (row[1] - row[2], row[0]))


def _differences(pair: ResultPair, first: SumMetric, second: SumMetric, draws: int) -> list[Difference]:
    sampling = sampling_of(pair.first, pair.first_arrays)
    if sampling.unit == "pair" and sampling.images is None:  # an older result does not name the images of its pairs
        sampling = sampling_of(pair.second, pair.second_arrays)
    return paired_difference(first, second, sampling, draws=draws, seed=pair.first.seed)


def _row(
    name: str, first: float, second: float, difference: Difference, metric: Metric, note: str = ""
) -> ComparisonRow:
    a, b = (None if np.isnan(value) else float(value) for value in (first, second))
    if np.isnan(difference.p) and difference.units:
        note = "; ".join(filter(None, [f"no p below {FEWEST} units that differ", note]))
    return ComparisonRow(name, metric, a, b, difference, float("nan"), note)


def _adjusted(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    adjusted = holm(np.array([row.difference.p for row in rows]))
    return [replace(row, p_holm=float(p)) for row, p in zip(rows, adjusted, strict=True)]
