"""`neco_bench.show`: the pictures of a stored result, as an object that notebooks display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neco_bench.core.errors import UsageError
from neco_bench.reports.compare import results_of
from neco_bench.reports.extras import picture_folder
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from neco_bench.runner.job import job_of
from neco_bench.viz import show as drawing
from neco_bench.viz.show import Shown


def show(
    model: str | Result,
    task: str | None = None,
    *,
    results: str | Path = "results",
    out: str | Path = "pictures",
    worst: int = 4,
    best: int = 4,
    images: Sequence[str] = (),
    **options: Any,
) -> Shown:
    """Draw a stored result: predictions and errors of images, matched points of pairs. The task runs again.

    Args:
        model: a Result, a model as named in the results, or the start of a result's key.
        task: name or glob that selects one result.
        results: results folder that contains it.
        out: output folder for the page and the pictures, in a subfolder for this result.
        worst, best: number of images or pairs with the lowest and the highest scores.
        images: ids to draw instead.
        options: as for `run` (data_root, weights, device), if they differ from those recorded in the result.

    Raises:
        MissingError: if there is no such result, or data or weights are missing.
        UsageError: if several results match, or there is nothing to draw.
    """
    store = ResultStore(results)
    if isinstance(model, Result):
        result = model
    else:
        stored = [result for result, _ in results_of([store], model, [task] if task else []).values()]
        if len(stored) != 1:
            names = ", ".join(sorted(f"{result.column}, seed {result.seed}, key {result.key[:8]}" for result in stored))
            raise UsageError(
                f"{model!r} has {len(stored)} results: name one by its task or the start of its key ({names})."
            )
        result = stored[0]
    job = job_of(
        result, **{name: Path(v) if name in ("data_root", "weights") else v for name, v in options.items() if v}
    )
    folder = picture_folder(result, Path(out))
    return drawing.show(result, store.statistics(result), job, folder, worst=worst, best=best, named=list(images))
