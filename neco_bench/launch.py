"""A grid of models and tasks on a cluster: one submitit job for each result that is not stored yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neco_bench.errors import NecoBenchError, UsageError
from neco_bench.protocol import find_tasks
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from neco_bench.runner import Job, Options, identify, plan, run_job, stored

LAUNCHERS = ("slurm", "local")


def work(model: str, task: str, changes: Mapping[str, Any], options: Options, out: Path) -> Result:
    """What a submitted job does: one result, stored in `out`."""
    (chosen,) = find_tasks([task], changes)
    store = ResultStore(out)
    return run_job(plan(model, chosen, options, identity=identify(model, options, store)), store)


class Grid:
    """Submits jobs when it is made; `results` waits for them, in the order of the jobs.

    parameters: of submitit's AutoExecutor (timeout_min, gpus_per_node, slurm_partition, ...). Logs lie in
    `<results folder>/jobs`. Raises UsageError for another launcher, a parameter that submitit does not know, or where
    submitit is not installed.
    """

    def __init__(self, jobs: Sequence[Job], store: ResultStore, launcher: str, parameters: Mapping[str, Any]) -> None:
        if launcher not in LAUNCHERS:
            raise UsageError(f"Unknown --launcher {launcher!r}: use {' or '.join(LAUNCHERS)}.")
        try:
            import submitit
        except ImportError as error:
            raise UsageError("--launcher needs submitit: pip install 'neco-bench[launcher]'.") from error
        try:
            executor = submitit.AutoExecutor(folder=store.folder / "jobs" / "%j", cluster=launcher)
        except RuntimeError as error:
            raise UsageError(
                f"--launcher {launcher}: {error}. Use --launcher local, or submit from the cluster."
            ) from error
        try:
            executor.update_parameters(name="neco-bench", **{"timeout_min": 24 * 60, **parameters})
        except (NameError, TypeError, ValueError) as error:
            raise UsageError(f"--launcher-set: {error}.") from error
        self._waiting: list[tuple[Job, Any]] = []  # with a result, or the job that will give it
        for job in jobs:
            found: Any = stored(job, store)
            if found is None:
                task = f"{job.task.card.name}@{job.task.protocol.id}"
                found = executor.submit(work, job.model, task, dict(job.task.changed), job.options, store.folder)
            self._waiting.append((job, found))

    def cancel(self) -> None:
        """End the jobs that are not done."""
        for _, found in self._waiting:
            if not isinstance(found, Result) and not found.done():
                found.cancel(check=False)

    def result(self, number: int) -> Result:
        """Wait for one of them. Raises the job's own NecoBenchError, one with the log where it died."""
        job, found = self._waiting[number]
        if isinstance(found, Result):
            return found
        try:
            result: Result = found.result()
            return result
        except NecoBenchError:
            raise
        except Exception as error:  # submitit's own, whose names and kinds are its affair
            text = str(error).strip().splitlines()
            raise NecoBenchError(
                f"{job.label} on {job.task.card.name}: job {found.job_id} ended without a result "
                f"({text[-1] if text else type(error).__name__}). Its log: {found.paths.stderr}"
            ) from error
