"""What intervals, tests and ranks mean, in the words that the page, `compare`, LaTeX and the docs share; comparisons as
text. Imports nothing that is slow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neco_bench.reports.compare import ComparisonRow

MEANING = (
    "An interval is that of the metric over the population that the units of the data set (images, pairs of images, "
    "scenes, sequences, or blocks of frames of a drive) were drawn from, for this encoder, protocol and training "
    "set; where a number is a mean over seeds or draws of the training set, their spread is in it too. It is made "
    "by leaving out one unit at a time, from the variance and the bias that this shows. Called 95 %, it covered the "
    "true value in 90 to 100 % of simulations (docs/pages/intervals.md), in fewer where many classes are in fewer "
    "than five images, or where all frames are of one drive. It says nothing of other data sets, of errors in "
    "labels, of other protocols, and, for a number of one seed, of other seeds."
)

TESTS = (
    "Two models are compared on the same units: p is that of exchanging the two unit by unit (sign flips; Student's "
    "t where pairs share images, or where seeds are averaged), adjusted for the number of comparisons made together "
    "(Holm). Units in which the two do not differ are not counted, and below six that do there is no p. Intervals "
    "that overlap are no test, and models that are not told apart are not shown to be equal."
)

RANKS = (
    "Ranks: in each column every two models are compared as above, Holm over the pairs; `2..4` are the ranks left "
    "open, from 1 + the models that are better to the number less those that are worse, at an adjusted p below "
    "0.05. `unpaired`: no counts are stored, and the intervals were compared as if the two models had different "
    "items, which tells fewer apart. `not tested`: a result has no interval, or one of an earlier version whose "
    "counts are not stored, and its rank is open. The win rate is no test: the share of columns in which a model "
    "has the better value, with each other model over the columns that both have, then the mean over those models; "
    "it depends on which models are there."
)

SUITES = (
    "Numbers are percent, higher is better, where the head of a column says nothing else. Difference: published minus "
    "measured; blank where the protocol of the published number is not the one that was measured, or not known to be, "
    "and where part of the data was measured. ‡: measured on part of the data, no measurement of the task. †: measured "
    "under other conditions than others of its column. Empty: not published, or not measured."
)

WORDS = {"meaning": MEANING, "tests": TESTS, "ranks": RANKS}


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.00005 else "<0.0001"


def plural(unit: str, count: int) -> str:
    """The name of so many units."""
    first, _, rest = unit.partition(" ")
    return unit if count == 1 else f"{first}s {rest}".rstrip()


def comparison_percent(row: ComparisonRow) -> dict[str, Any]:
    """Write a row of a comparison for a table: in the unit of the metric, empty where there is no number."""
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
