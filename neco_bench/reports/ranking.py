"""Ranks of models from paired tests.

In each column, every two models are compared on the items on which both were measured. p-values are adjusted for the
number of pairs (Holm). The possible ranks of a model are those from 1 plus the number of better models to the number of
models minus the number of worse models, at an adjusted p below 0.05.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import erfc
from typing import Any

import numpy as np
import pandas as pd

from neco_bench.core.errors import NecoBenchError
from neco_bench.core.sampling import Sampling
from neco_bench.metrics.intervals import estimate
from neco_bench.metrics.paired import DRAWS, holm, paired_difference, student
from neco_bench.metrics.sums import SumMetric, merged
from neco_bench.reports.grid import NORMAL, Grid, cells_of, grids_of, runs_frame
from neco_bench.results.schema import Result
from neco_bench.results.statistics import in_order, item_ids, primary_sums, sampling_of

# Returns the statistics of a result; raises NecoBenchError if there are none.
Statistics = Callable[[Result], Mapping[str, np.ndarray]]

SIGNIFICANT = 0.05  # significance level of p adjusted by Holm

# With more models than this, the comparisons are not kept, because their number grows with the square.
MOST_COMPARED = 40

# How the pairs of a column were compared.
PAIRED = "paired"
UNPAIRED = "unpaired: no counts are stored"
NOT_TESTED = "not tested"


_NAN = float("nan")


@dataclass(frozen=True)
class Tested:
    """Difference of two models (second minus first), its interval and p; NaN if they are undefined."""

    value: float
    low: float = _NAN
    high: float = _NAN
    p: float = _NAN


@dataclass(frozen=True)
class Ranks:
    """Ranks of one column: {model: (best, worst) rank}, how they were tested, and {(first, second): comparison}.

    p of the comparisons is adjusted for their number. The comparisons are empty for more models than MOST_COMPARED.
    """

    open: Mapping[str, tuple[int, int]]
    how: str
    tests: Mapping[tuple[str, str], Tested] = field(default_factory=dict)


@dataclass(frozen=True)
class Board:
    """Results arranged for tables and pages, computed once for both.

    runs: return value of `runs_frame`. cells: return value of `cells_of`. grids: all grids. ranks: of the ranked grids,
    {family: {column: ranks}}.
    """

    runs: pd.DataFrame
    cells: pd.DataFrame
    grids: Sequence[Grid]
    ranks: Mapping[str, Mapping[str, Ranks]]
    statistics: Statistics | None = None


def board_of(results: Iterable[Result], statistics: Statistics | None = None) -> Board:
    """Arrange results, and compute the ranks of models from paired tests."""
    runs = runs_frame(results)
    cells = cells_of(runs)
    grids = list(grids_of(cells))
    ranks = {grid.family: ranks_of(grid, statistics) for grid in grids if not grid.kind}
    return Board(runs, cells, grids, ranks, statistics)


@dataclass(frozen=True)
class _Known:
    """Input of a test from a cell. items: its sums over items; None without statistics. error: of the value."""

    value: float
    items: SumMetric | None = None
    sampling: Sampling | None = None
    ids: tuple[str, ...] = ()
    error: float | None = None


def ranks_of(grid: Grid, statistics: Statistics | None) -> dict[str, Ranks]:
    """Return the possible ranks for each column of a grid that has two models or more."""
    found = {}
    for column in grid.columns:
        cells = grid.cells.xs(column, level="column")
        cells = cells[cells.value.notna()]
        ids: tuple[str, ...] = ()  # of the first model with statistics; the others are put in the same order
        known = {}
        for cell in cells.itertuples():
            known[cell.Index] = own = _known(cell, statistics, ids)
            ids = ids or own.ids
        if len(known) > 1:
            found[column] = _ranks(known, grid.metric(column).sign)
    return found


def _known(cell: Any, statistics: Statistics | None, ids: tuple[str, ...]) -> _Known:
    results: Sequence[Result] = cell.results[: cell.usable]
    untold = np.isnan(cell.low) or any(result.has_old_interval for result in results)
    error = None if untold else (cell.high - cell.low) / 2 / NORMAL
    if statistics is None:
        return _Known(cell.value, error=error)
    try:
        arrays = [statistics(result) for result in results]
        ids = ids or tuple(item_ids(arrays[0]) or ())
        arrays = [in_order(own, ids) for own in arrays]
        sums = merged([primary_sums(result, own) for result, own in zip(results, arrays, strict=True)])
        return _Known(cell.value, sums, sampling_of(results[0], arrays[0]), ids, error)
    except (NecoBenchError, ValueError, KeyError, IndexError):
        return _Known(cell.value, error=error)


def _ranks(known: Mapping[str, _Known], sign: int) -> Ranks:
    models = list(known)
    pairs = list(combinations(models, 2))
    tests = [_tested(known[first], known[second], len(pairs)) for first, second in pairs]
    adjusted = holm(np.array([test.p for test, _ in tests]))
    beaten_by = dict.fromkeys(models, 0)
    beats = dict.fromkeys(models, 0)
    for (first, second), p in zip(pairs, adjusted, strict=True):
        if p < SIGNIFICANT:
            ahead = sign * known[first].value > sign * known[second].value
            winner, loser = (first, second) if ahead else (second, first)
            beats[winner] += 1
            beaten_by[loser] += 1
    hows = {how for _, how in tests}
    how = next((how for how in (NOT_TESTED, UNPAIRED, PAIRED) if how in hows), PAIRED)
    found = {}
    if len(models) <= MOST_COMPARED:
        found = {pair: replace(test, p=float(p)) for pair, (test, _), p in zip(pairs, tests, adjusted, strict=True)}
    return Ranks({model: (1 + beaten_by[model], len(models) - beats[model]) for model in models}, how, found)


def _tested(first: _Known, second: _Known, pairs: int) -> tuple[Tested, str]:
    """Compare two models; also return how they were compared."""
    if first.items is not None and second.items is not None and first.sampling is not None:
        # With more than 500 pairs, the test would need too many draws: Student's t of the same differences is used.
        if pairs > 500:
            one, other = (estimate(side, first.sampling) for side in (first.items, second.items))
            less = other.minus(one)
            low, high = less.interval().ends or (_NAN, _NAN)
            return Tested(less.value, low, high, student(less)), PAIRED
        draws = max(DRAWS, 60 * pairs)
        found = paired_difference(first.items, second.items, first.sampling, draws=draws)[0]
        return Tested(found.value, found.low, found.high, found.p), PAIRED
    change = second.value - first.value
    if first.error is None or second.error is None:
        return Tested(change), NOT_TESTED
    error = (first.error**2 + second.error**2) ** 0.5
    if error <= 0:
        return Tested(change), NOT_TESTED
    p = erfc(abs(change) / error / 2**0.5)
    return Tested(change, change - NORMAL * error, change + NORMAL * error, p), UNPAIRED
