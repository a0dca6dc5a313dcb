"""Training runs of a suite, one after another or as jobs on a cluster; finished runs are skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neco_bench.core.errors import NecoBenchError, UsageError
from neco_bench.core.suites import Suite
from neco_bench.runner.launch import executor_for
from neco_bench.training import loop
from neco_bench.training.images import open_images
from neco_bench.training.options import TrainOptions
from neco_bench.training.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class PlannedRun:
    """A run of a suite: the arguments of `train`."""

    recipe: Recipe
    options: TrainOptions

    @property
    def is_done(self) -> bool:
        """Return whether its folder has the last checkpoint of this run; `train` computes missing scores.

        Raises MissingError if the images are missing, and other errors of `open_images`.
        """
        options = self.options
        try:
            stored = json.loads((options.out / "recipe.json").read_text(encoding="utf-8"))
            step = json.loads((options.out / "encoder.json").read_text(encoding="utf-8"))["step"]
            same = stored["recipe"] == self.recipe.model_dump(mode="json") and stored["steps"] == step
        except (OSError, ValueError, LookupError, TypeError):  # not started, or broken, which `train` reports
            return False
        if not same or options.evaluate:
            return False
        images = open_images(options.data, options.data_root)
        return (stored.get("data"), stored.get("images")) == (images.description, len(images))


@dataclass(frozen=True)
class RunStatus:
    """Status of a run of a suite: "trained", "done before", or the error, with its exit code."""

    folder: Path
    status: str
    exit_code: int = 0


def plan_runs(suite: Suite, options: TrainOptions, changes: Mapping[str, Any], data: str | None) -> list[PlannedRun]:
    """Return the runs of a suite, with folders `options.out`/NAME; runs that were started are resumed.

    changes: changes to all recipes, in addition to the suite's own. data: replaces the suite's data. Raises UsageError
    for a suite without runs or wrong changes, and errors of `load_recipe`, before any run starts.
    """
    if not suite.runs:
        raise UsageError(f"Suite {suite.id!r} has no training runs. `neco-bench suites` lists those that have.")
    return [
        PlannedRun(
            load_recipe(run.recipe, {**run.set, **changes}),
            replace(options, out=options.out / run.folder, data=data or run.data, resume=True),
        )
        for run in suite.runs
    ]


def train_runs(
    runs: Sequence[PlannedRun], folder: Path, launcher: str | None = None, parameters: Mapping[str, Any] | None = None
) -> Iterator[RunStatus]:
    """Train the runs, and yield the status of each.

    If a run fails, the others continue; an interruption ends all. folder: folder for logs of jobs. launcher,
    parameters: as for `run`; without a launcher, the runs are trained in this process, in order.
    """
    waiting: list[tuple[PlannedRun, Any]] = []
    executor = executor_for(folder, launcher, parameters or {}) if launcher else None
    try:
        for run in runs:
            job = executor.submit(loop.train, run.recipe, run.options) if executor and not run.is_done else None
            waiting.append((run, job))
        for run, job in waiting:
            if job is None and (executor or run.is_done):
                yield RunStatus(run.options.out, "done before")
                continue
            try:
                if job is None:
                    loop.train(run.recipe, run.options)
                else:
                    job.result()
                yield RunStatus(run.options.out, "trained")
            except NecoBenchError as error:
                if error.exit_code == loop.Interrupted.exit_code:
                    raise
                yield RunStatus(run.options.out, str(error), error.exit_code)
            except Exception as error:
                if job is None:
                    raise
                text = str(error).strip().splitlines()  # submitit does not document its exceptions
                reason = f"job {job.job_id} failed ({text[-1] if text else error!r}). Its log: {job.paths.stderr}"
                yield RunStatus(run.options.out, reason, 1)
    except BaseException:
        for _, job in waiting:
            if job is not None and not job.done():
                job.cancel(check=False)
        raise
