"""Run jobs in separate processes: on this machine with a time limit, or on a cluster, where each result that is not
stored yet is one submitit job.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from neco_bench.core.errors import NecoBenchError, UsageError
from neco_bench.core.protocol import find_tasks
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from neco_bench.runner.execute import failed_result, run_job, store_result
from neco_bench.runner.job import Job, identify, plan, stored
from neco_bench.runner.options import RunOptions

GRACE = 3  # seconds for an interrupted process to remove its temporary files


def work(model: str, task: str, changes: Mapping[str, Any], options: RunOptions, out: Path) -> Result:
    """Run a submitted job: compute one result and store it in `out`."""
    (named,) = find_tasks([task], changes, data_root=options.data_root)
    store = ResultStore(out)
    return run_job(plan(model, named, options, identity=identify(model, options, store)), store)


def _arguments(job: Job, store: ResultStore) -> tuple[Any, ...]:
    """Return the arguments of `work` for a job."""
    task = f"{job.task.card.name}@{job.task.protocol.id}"
    return job.model, task, dict(job.task.changed), job.options, store.folder


def run_apart(job: Job, store: ResultStore, seconds: float) -> Result:
    """Call `run_job` in a separate process, which is ended after `seconds`, including its start.

    Every failure of that process gives a failed result of this job, also a hang, a crash in C code, or a kill by the
    system when memory runs out.
    """
    if (known := stored(job, store)) is not None:
        return known
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads or a GPU may hang
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_work_and_send, args=(sender, *_arguments(job, store)))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            problem = f"The job did not end within --job-timeout {seconds:g} seconds. Raise it, or check the encoder."
        else:
            try:
                given: Result | NecoBenchError = receiver.recv()
                process.join(GRACE)
                return given if isinstance(given, Result) else failed_result(job, given)
            except EOFError:
                process.join()
                code = process.exitcode or 0
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                hint = " Memory may have run out." if code == -9 else ""
                problem = f"The process of the job {how} before it had a result.{hint}"
    finally:
        _end(process)
        receiver.close()
    return store_result(job, store, failed_result(job, NecoBenchError(problem)))


def _work_and_send(sender: Connection, *arguments: Any) -> None:
    """Run in the process of `run_apart`. It ends when its parent ends, together with its own child processes."""
    if hasattr(os, "setsid"):
        os.setsid()
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - this is the child of `run_apart`

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        try:
            sender.send(work(*arguments))
        except NecoBenchError as error:
            sender.send(error)


def _end(process: Any) -> None:
    """End a process and its children: at once if it is done, else after time to remove its temporary files."""
    with contextlib.suppress(OSError):
        if process.is_alive():
            os.kill(process.pid, signal.SIGINT)
            process.join(GRACE)
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def executor_for(folder: Path, launcher: str, parameters: Mapping[str, Any]) -> Any:
    """Return submitit's executor, with logs in `<folder>/jobs`.

    parameters: those of AutoExecutor (timeout_min, gpus_per_node, slurm_partition, ...). Raises UsageError for an
    unknown launcher or parameter, or if submitit is not installed.
    """
    if launcher not in ("slurm", "local"):
        raise UsageError(f"Unknown --launcher {launcher!r}: use slurm or local.")
    try:
        import submitit
    except ImportError as error:
        raise UsageError("--launcher needs submitit: pip install 'neco-bench[launcher]'.") from error
    try:
        executor = submitit.AutoExecutor(folder=folder / "jobs" / "%j", cluster=launcher)
    except RuntimeError as error:
        raise UsageError(
            f"--launcher {launcher}: {error}. Use --launcher local, or submit from the cluster."
        ) from error
    try:
        executor.update_parameters(name="neco-bench", **{"timeout_min": 24 * 60, **parameters})
    except (NameError, TypeError, ValueError) as error:
        raise UsageError(f"--launcher-set: {error}.") from error
    return executor


class JobPool:
    """Submit jobs on construction; `result` waits for a job.

    launcher, parameters: see `executor_for`, whose errors are raised. Logs are written to `<results folder>/jobs`.
    """

    def __init__(self, jobs: Sequence[Job], store: ResultStore, launcher: str, parameters: Mapping[str, Any]) -> None:
        executor = executor_for(store.folder, launcher, parameters)
        self._store = store
        self._waiting: list[tuple[Job, Any]] = []  # each with its stored result, or with its submitit job
        for job in jobs:
            pending: Any = stored(job, store)
            if pending is None:
                pending = executor.submit(work, *_arguments(job, store))
            self._waiting.append((job, pending))

    def cancel(self) -> None:
        """Cancel the jobs that are not done."""
        for _, pending in self._waiting:
            if not isinstance(pending, Result) and not pending.done():
                pending.cancel(check=False)

    def result(self, number: int) -> Result:
        """Wait for a job and return its result; if it died, a failed result that names its log."""
        job, pending = self._waiting[number]
        if isinstance(pending, Result):
            return pending
        try:
            result: Result = pending.result()
            return result
        except NecoBenchError as error:
            return failed_result(job, error)
        except Exception as error:  # submitit does not document its exceptions
            text = str(error).strip().splitlines()
            died = NecoBenchError(
                f"{job.label} on {job.task.card.name}: job {pending.job_id} ended without a result "
                f"({text[-1] if text else type(error).__name__}). Its log: {pending.paths.stderr}"
            )
            return store_result(job, self._store, failed_result(job, died))
