"""`neco-bench run`."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from neco_bench.cli.common import (
    DataRoot,
    Device,
    Json,
    RunPrecision,
    Suites,
    Weights,
    app,
    is_quiet,
    task_names,
    zoo_names,
)
from neco_bench.cli.output import foreign_code, phases, print_rows, summaries
from neco_bench.core.errors import MissingError, UsageError

if TYPE_CHECKING:
    from neco_bench.core.protocol import Task
    from neco_bench.results.schema import Result
    from neco_bench.results.store import ResultStore
    from neco_bench.runner.job import Job, MissingJob


@app.command()
def run(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model spec; repeatable and comma-separated. See `neco-bench models`. Default: those of --suite.",
            autocompletion=zoo_names,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task, glob or task@protocol; repeatable and comma-separated.", autocompletion=task_names),
    ] = None,
    suite: Suites = None,
    data_root: DataRoot = None,
    out: Annotated[Path, typer.Option(help="Results folder.")] = Path("results"),
    device: Device = None,
    precision: RunPrecision = None,
    batch_size: Annotated[int, typer.Option(help="Images per encoder forward; halved when memory runs out.")] = 16,
    workers: Annotated[
        int | None, typer.Option(help="Loading processes; default: cores - 1 on a GPU; on a CPU, threads are used.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    seeds: Annotated[
        int,
        typer.Option(
            help="Number of seeds to run, starting at --seed: one result per seed; tables show their mean and spread."
        ),
    ] = 1,
    limit: Annotated[int | None, typer.Option(help="First N items of each split only; never ranked.")] = None,
    split_file: Annotated[Path | None, typer.Option(help="List of ids that restricts the training split.")] = None,
    weights: Weights = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Inner blocks of a ViT (8 or 2,5,8,11), or a stage of a CNN. all: one result for each; for a ViT, "
            "they share forward passes if --features stores them. `show MODEL --layers` plots the curve."
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a constant; the protocol is then marked with *."),
    ] = None,
    features: Annotated[
        str, typer.Option(help="Store features for other tasks: fp32, fp16 (half the space, rounded) or off.")
    ] = "fp32",
    overwrite: Annotated[bool, typer.Option(help="Run again even if a result is stored.")] = False,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing", help="Fine-tuning: compute activations again in backward; less memory, more time."
        ),
    ] = False,
    job_timeout: Annotated[
        float | None, typer.Option(help="Run each job in a separate process, and end it after this many seconds.")
    ] = None,
    launcher: Annotated[
        str | None, typer.Option(help="Submit one job per result with submitit: slurm, or local (processes).")
    ] = None,
    launcher_set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Parameter of the launcher, such as slurm_partition=gpu; repeatable."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print the time of each phase and the peak memory of each result.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Check all settings, print what would run and its estimated cost, and run nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run tasks for models and store the results; stored results are returned and not computed again.

    With --suite, results whose data or weights are missing are listed and left out; the exit code is then 3.

    Example: neco-bench run --model baseline_hog --task 'shapes_*'
    """
    from neco_bench.core import distributed
    from neco_bench.core.config import parse_changes
    from neco_bench.results.store import ResultStore
    from neco_bench.runner import execute
    from neco_bench.runner.job import numbered, plan_all, stored
    from neco_bench.runner.options import RunOptions, check_device

    if distributed.started_by_torchrun():
        distributed.join()
    check_device(device)
    parts = _models_and_tasks(model, task, suite, parse_changes(changes or []), data_root)
    options = RunOptions(
        data_root=data_root,
        device=device,
        precision=precision,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        limit=limit,
        split_file=split_file,
        weights=weights,
        layers=layers,
        features=features,
        overwrite=overwrite,
        checkpointing=checkpointing,
        progress=distributed.rank() == 0 and not is_quiet(),
    )
    if job_timeout is not None and (job_timeout <= 0 or launcher is not None or distributed.world() > 1):
        raise UsageError(
            f"--job-timeout takes seconds above 0, got {job_timeout:g}."
            if job_timeout <= 0
            else "--job-timeout is for one process. With --launcher, use --launcher-set timeout_min=MINUTES."
        )
    if launcher is None and launcher_set:
        raise UsageError("--launcher-set needs --launcher.")
    store = ResultStore(out)
    missing: list[MissingJob] = []
    with foreign_code():
        planned: dict[tuple[str, str, str, int], Job] = {}
        for models, tasks in parts:
            part = plan_all(models, tasks, options, store, seeds=seeds, missing=missing if suite else None)
            planned |= {(job.label, job.task.card.name, job.task.label, job.options.seed): job for job in part}
        jobs = numbered(list(planned.values()), apart=launcher is not None or job_timeout is not None)
    if dry_run:
        _print_forecast(jobs, missing, store, suite, as_json)
    _print_missing(jobs, missing)
    known = [stored(job, store) is not None for job in jobs]
    results = []
    if launcher is not None:
        from neco_bench.runner.launch import JobPool

        pool = JobPool(jobs, store, launcher, parse_changes(launcher_set or []))
    try:
        for number, job in enumerate(jobs):
            with foreign_code():
                if launcher is not None:
                    results.append(pool.result(number))
                elif job_timeout is not None:
                    from neco_bench.runner.launch import run_apart

                    results.append(run_apart(job, store, job_timeout))
                else:
                    results.append(execute.run_job(job, store))
            if not distributed.rank():
                _print_done(job.title, results[-1], known[number], profile)
    except KeyboardInterrupt:
        if launcher is not None:
            pool.cancel()
        done = f"finished results are in {out}" if results else "no result was finished yet"
        print(f"interrupted; {done}; the same command continues from there.", file=sys.stderr)
        raise typer.Exit(130) from None
    if distributed.rank() == 0 and as_json:
        print(json.dumps([result.model_dump(mode="json") for result in results], indent=2))
    elif distributed.rank() == 0:
        print_rows(summaries(results), False)
    codes = [result.error_code or 1 for result in results if result.status == "failed"]
    raise typer.Exit(next(iter([*codes, *(absent.error.exit_code for absent in missing)]), 0))


def _models_and_tasks(
    model: list[str] | None,
    task: list[str] | None,
    suite: list[str] | None,
    changed: dict[str, Any],
    data_root: Path | None,
) -> "list[tuple[list[str], list[Task]]]":
    """Return the models and tasks to run, of each suite and of --task. Raises UsageError if nothing is named."""
    from neco_bench.core.protocol import find_tasks
    from neco_bench.core.suites import find_suites

    given = None if model is None else _models(model)
    parts = []
    for one_suite in find_suites(suite or []):
        models = one_suite.specs if given is None else given
        if not models:
            hint = f"Train them: neco-bench train --suite {one_suite.id}. Then name" if one_suite.runs else "Name"
            raise UsageError(f"Suite {one_suite.id!r} has no models that can be run. {hint} some with --model.")
        parts.append((models, [column.task for column in one_suite.columns(changed, data_root)]))
    if task is not None:
        if given is None:
            raise UsageError("--task needs --model. See `neco-bench models`.")
        parts.append((given, find_tasks(task, changed, data_root=data_root)))
    if not parts:
        raise UsageError(
            "Name what to run: --task (`neco-bench tasks` lists the tasks), or --suite (`neco-bench suites`)."
        )
    return parts


def _print_missing(jobs: "list[Job]", missing: "list[MissingJob]") -> None:
    """Print once each what a suite lacks. Raises MissingError if nothing can be run."""
    for text in dict.fromkeys(str(absent.error) for absent in missing):
        models = dict.fromkeys(absent.model for absent in missing if str(absent.error) == text)
        tasks = dict.fromkeys(absent.task.card.name for absent in missing if str(absent.error) == text)
        count = f"{len(models)} model{'s' * (len(models) > 1)}"
        print(f"missing: {', '.join(tasks)} ({count}): {text}", file=sys.stderr)
    if missing and not jobs:
        raise MissingError("Nothing in the suite can be run: data or weights are missing. Check --data-root.")


def _print_forecast(
    jobs: "list[Job]", missing: "list[MissingJob]", store: "ResultStore", suite: list[str] | None, as_json: bool
) -> NoReturn:
    """Print what would run, what is missing and the estimated cost; for a suite, print totals on stderr. Then exit."""
    from neco_bench.runner.estimate import forecast

    with foreign_code():
        rows = forecast(jobs, store, fetch=not suite, progress=not is_quiet())
    rows += [
        {**dict.fromkeys(rows[0] if rows else ()), "model": absent.model, "task": absent.task.card.name,
         "protocol": absent.task.label, "stored": False, "problem": str(absent.error),
         "exit_code": absent.error.exit_code}
        for absent in missing
    ]  # fmt: skip
    one_seed = len({row.get("seed") for row in rows if row.get("seed") is not None}) < 2
    hidden = () if as_json else ("exit_code", "layers_ahead", *(("seed",) if one_seed else ()))
    shown = [{name: row[name] for name in row if name not in hidden} for row in rows]
    if suite and not as_json:  # full messages are printed separately, once each
        shown = [{**row, "problem": (row["problem"] or "").partition("\n")[0]} for row in shown]
    print_rows(shown, as_json)
    if any(row.get("layers_ahead") for row in rows):
        print("The hours of the first layer include the forward passes that all layers share.", file=sys.stderr)
    if suite:
        hours = sum(row.get("hours") or 0 for row in rows)
        faulty = [row for row in rows if row["problem"]]
        stored = sum(row["stored"] for row in rows)
        print(
            f"{len(rows)} results: {stored} stored, {len(rows) - stored - len(faulty)} to run, {len(faulty)} cannot "
            f"run (data, weights or something else is missing); about {hours:.2g} hours, as far as could be estimated.",
            file=sys.stderr,
        )
    raise typer.Exit(next((row["exit_code"] for row in rows if row["exit_code"]), 0))


def _print_done(title: str, result: "Result", known: bool, profile: bool) -> None:
    if profile:
        print_rows(phases(result), False, file=sys.stderr)
    if result.error or not is_quiet():
        state = f"error: {result.error}" if result.error else "already stored" if known else "done"
        print(f"{title}: {state}", file=sys.stderr)


def _models(values: Sequence[str]) -> list[str]:
    """Split comma-separated specs; commas between numbers belong to a spec (timm:NAME?layers=2,5)."""
    parts = [part.strip() for value in values for part in re.split(r",(?!-?\d+(?:,|&|$))", value)]
    if not any(parts):
        raise UsageError("--model is empty. Give a model spec; see `neco-bench models`.")
    return list(dict.fromkeys(part for part in parts if part))
