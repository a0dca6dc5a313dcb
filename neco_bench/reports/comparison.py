"""`neco_bench.compare`: compare two models, with tables by task, class, size and image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from neco_bench.core.config import split_names
from neco_bench.core.errors import UsageError
from neco_bench.reports import compare as comparing
from neco_bench.reports.compare import ComparisonRow, ResultPair
from neco_bench.results.store import ResultStore

Folders = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Comparison:
    """Comparison of two models on the same tasks, second minus first. Notebooks show the table of tasks.

    first, second: the models. pairs: their results by task. rows: the comparison of each task. problems: messages on
    results that could not be compared and files that could not be used.
    """

    first: str
    second: str
    pairs: tuple[ResultPair, ...]
    rows: tuple[ComparisonRow, ...]
    problems: tuple[str, ...] = ()

    def to_dataframe(self) -> pd.DataFrame:
        """Return a table with one row per task: values and differences as stored, p, and p adjusted over the rows."""
        return comparison_frame(self.rows)

    def classes(self, task: str | None = None) -> pd.DataFrame:
        """Compare the classes or categories of a task, the largest gain first. task: optional if there is only one."""
        return comparison_frame(comparing.compare_classes(self._pair(task)))

    def sizes(self, task: str | None = None) -> pd.DataFrame:
        """Compare small, medium and large regions of a segmentation task."""
        return comparison_frame(comparing.compare_sizes(self._pair(task)))

    def images(self, task: str | None = None) -> pd.DataFrame:
        """Return the id and both scores of each image or pair, the largest gain first."""
        return pd.DataFrame(comparing.compare_images(self._pair(task)), columns=["image", "first", "second"])

    def _pair(self, task: str | None) -> ResultPair:
        named = [pair for pair in self.pairs if task is None or pair.name == task or pair.name.startswith(f"{task}@")]
        if len(named) != 1:
            known = ", ".join(pair.name for pair in self.pairs)
            count = f"{len(named)} tasks were compared"
            if task is not None:
                count = f"{len(named)} of the compared tasks match {task!r}"
            raise UsageError(f"{count}. Name one of: {known}.")
        return named[0]

    def _repr_html_(self) -> str:
        html: str = self.to_dataframe().to_html(index=False, float_format="{:.4g}".format)
        return html


def compare(first: str, second: str, tasks: str | Sequence[str] = (), *, results: Folders = "results") -> Comparison:
    """Compare two models with the statistics stored with their results; nothing runs again.

    Args:
        first: a model as named in the results, or the start of a result's key.
        second: the model to compare with it.
        tasks: names or globs; all if empty.
        results: one results folder or several.

    Raises:
        MissingError: if a folder does not exist, or the models have no task in common.
        UsageError: if a name matches several results of one task.
        BadInputError: if the results are for different images or settings.
    """
    patterns = [tasks] if isinstance(tasks, str) else list(tasks)
    folders = [results] if isinstance(results, str | os.PathLike) else list(results)
    stores = [ResultStore(Path(folder)) for folder in folders]
    pairs = comparing.find_pairs(stores, first, second, split_names(patterns))
    problems = dict.fromkeys(problem for store in stores for problem in store.problems)
    return Comparison(first, second, tuple(pairs), tuple(comparing.compare_tasks(pairs)), tuple(problems))


def comparison_frame(rows: Sequence[ComparisonRow]) -> pd.DataFrame:
    """Return rows as a table, in full precision."""
    return pd.DataFrame(
        [
            {
                "name": row.name,
                "first": row.first,
                "second": row.second,
                "difference": row.difference.value,
                "low": row.difference.low,
                "high": row.difference.high,
                "p": row.difference.p,
                "p_holm": row.p_holm,
                "items": row.items,
            }
            for row in rows
        ]
    )
