"""Explanations of intervals, tests and ranks that the page, `compare`, LaTeX and the docs share; rows of comparisons.

This module has no slow imports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neco_bench.core.errors import plural

if TYPE_CHECKING:
    from neco_bench.reports.compare import ComparisonRow

MEANING = (
    "An interval describes the uncertainty of the metric over the population from which the units of the data set "
    "(images, pairs of images, scenes, sequences, or blocks of frames of a drive) were drawn, for this encoder, "
    "protocol and training set. If a number is a mean over seeds or over draws of the training set, the interval "
    "includes their spread. It is computed from the variance and the bias that leaving out one unit at a time "
    "shows. In simulations, intervals with a nominal level of 95 % covered the true value in 90 to 100 % of the "
    "cases (docs/pages/intervals.md), and in fewer cases if many classes occur in fewer than five images, or if all "
    "frames are from one drive. An interval says nothing about other data sets, errors in labels, other protocols "
    "or, for a number of one seed, other seeds."
)

TESTS = (
    "Two models are compared on the same units. p is the p-value of a test that exchanges the two models unit by "
    "unit (sign flips), or of Student's t-test where pairs share images or where seeds are averaged. It is adjusted "
    "for the number of comparisons made together (Holm). Units on which the two models do not differ are not "
    "counted, and no p is given if the models differ on fewer than six units. Overlapping intervals are not a test, "
    "and models without a significant difference are not shown to be equal."
)

RANKS = (
    "Ranks: in each column, every two models are compared as described above, with Holm's adjustment over the "
    "pairs. `2..4` is the range of ranks that the tests leave possible: from 1 plus the number of models that are "
    "better, to the number of models minus the number that are worse, at an adjusted p below 0.05. `unpaired`: no "
    "counts are stored, and the intervals were compared as if the two models had been measured on different items, "
    "which detects fewer differences. `not tested`: a result has no interval, or has an interval of an earlier "
    "version whose counts are not stored, so its rank is not known. The win rate is not a test. It is the share of "
    "columns in which a model has the better value, computed against each other model over the columns that both "
    "have, and then averaged over the other models. It depends on which models are in the table."
)

SUITES = (
    "Numbers are percent, and higher is better, unless the column header states otherwise. Difference: published "
    "minus measured. It is blank if the measured protocol is not, or is not known to be, the protocol of the "
    "published number, and if only part of the data was measured. ‡: measured on part of the data, so not a "
    "measurement of the task. †: measured under other conditions than the other results in the column. Empty: not "
    "published, or not measured."
)

WORDS = {"meaning": MEANING, "tests": TESTS, "ranks": RANKS}


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.00005 else "<0.0001"


def comparison_percent(row: ComparisonRow) -> dict[str, Any]:
    """Return a row of a comparison for a table: values in the unit of the metric, "" for missing numbers."""
    difference, metric = row.difference, row.metric
    defined = difference.p == difference.p
    return {
        "name": row.name + (f" ({metric.legend})" if metric.legend else ""),
        "first": metric.text(row.first),
        "second": metric.text(row.second),
        "difference": metric.text(difference.value, plus=True),
        "95 % interval": metric.interval(difference.low, difference.high, plus=True),
        "p": _p(difference.p) if defined else "",
        "p (Holm)": _p(row.p_holm) if defined else "",
        "items": f"{row.items} {plural(row.unit, row.items)}",
        "note": row.note,
    }
