"""The command line: verbs only. Heavy imports happen inside the commands, so that help and listings are instant.

stdout carries results, and exactly one JSON document with --json; progress, logs and errors go to stderr.
Exit codes: 0 done, 2 wrong usage, 3 missing data or weights, 4 bad input file, 5 numerical failure, 130 interrupted (by
Ctrl-C or SIGTERM), 1 other.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neco_bench.errors import MissingError, UsageError, user_error
from neco_bench.tables import compared, foreign_code, images_compared, numbers, phases, print_rows, summary

if TYPE_CHECKING:
    from neco_bench.results.store import ResultStore

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Evaluate dense visual encoders under named protocols.\n\n"
    "Example: neco-bench run --model baseline_hog --task 'shapes_*'",
)
data_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Data sets: what is there, and is it whole.\n\nExample: neco-bench data list",
)
app.add_typer(data_app, name="data")

DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root", envvar="NECO_BENCH_DATA", show_envvar=True, help="Folder with one sub-folder per data set."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Weights = Annotated[Path | None, typer.Option(help="Weights file (safetensors, .pth, .ckpt) for the model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the best there is.")]
Precision = Annotated[str | None, typer.Option(help="fp32 (default), bf16 or fp16 for the encoder.")]
Layers = Annotated[str | None, typer.Option(help="Inner blocks of a ViT (8 or 2,5,8,11), or the stage of a CNN.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `neco-bench`; exits with the documented code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
    try:
        with _sigterm_as_interruption():
            app(args=arguments, prog_name="neco-bench")
    except Exception as caught:
        error = user_error(caught)
        if error is None or isinstance(caught, BrokenPipeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


@contextlib.contextmanager
def _sigterm_as_interruption() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: what is finished stays, temporary files and processes go."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def run(
    model: Annotated[
        list[str], typer.Option(help="Model spec; repeatable and comma-separated. See `neco-bench models`.")
    ],
    task: Annotated[list[str], typer.Option(help="Task, glob or task@protocol; repeatable and comma-separated.")],
    data_root: DataRoot = None,
    out: Annotated[Path, typer.Option(help="Results folder.")] = Path("results"),
    device: Device = None,
    precision: Precision = None,
    batch_size: Annotated[int, typer.Option(help="Images per encoder forward; halved when memory runs out.")] = 16,
    workers: Annotated[
        int | None, typer.Option(help="Loading processes; default: cores - 1 for a GPU, threads for a CPU.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    limit: Annotated[int | None, typer.Option(help="First N items of each split only; never ranked.")] = None,
    split_file: Annotated[Path | None, typer.Option(help="List of ids that restricts the training split.")] = None,
    weights: Weights = None,
    layers: Layers = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a constant; the protocol is then marked *."),
    ] = None,
    features: Annotated[
        str, typer.Option(help="Keep features for other tasks: fp32, fp16 (half the space, rounded) or off.")
    ] = "fp32",
    overwrite: Annotated[bool, typer.Option(help="Run again where a result is stored.")] = False,
    job_timeout: Annotated[
        float | None, typer.Option(help="Run each job in a process of its own, and end it after so many seconds.")
    ] = None,
    launcher: Annotated[
        str | None, typer.Option(help="Submit one job per result through submitit: slurm, or local processes.")
    ] = None,
    launcher_set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Parameter of the jobs, such as slurm_partition=gpu; repeatable."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show for each result where its time went, and its peak memory.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Check everything, say what would run and its cost, run nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run tasks for models and store one result each; stored results are returned, not computed again.

    Example: neco-bench run --model baseline_hog --task 'shapes_*'
    """
    from neco_bench import distributed, runner
    from neco_bench.protocol import find_tasks, parse_changes
    from neco_bench.results.store import ResultStore

    if distributed.started_by_torchrun():
        distributed.join()
    runner.check_device(device)
    tasks = find_tasks(task, parse_changes(changes or []))
    options = runner.Options(
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
        progress=distributed.rank() == 0,
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
    with foreign_code():
        jobs = runner.plan_all(_models(model), tasks, options, store)
    if dry_run:
        from neco_bench.estimate import forecast

        with foreign_code():
            rows = forecast(jobs, store)
        print_rows([{name: row[name] for name in row if as_json or name != "exit_code"} for row in rows], as_json)
        raise typer.Exit(next((row["exit_code"] for row in rows if row["exit_code"]), 0))
    results = []
    if launcher is not None:
        from neco_bench.launch import Grid

        grid = Grid(jobs, store, launcher, parse_changes(launcher_set or []))
    try:
        for number, job in enumerate(jobs):
            with foreign_code():
                if launcher is not None:
                    results.append(grid.result(number))
                elif job_timeout is not None:
                    from neco_bench.launch import run_apart

                    results.append(run_apart(job, store, job_timeout))
                else:
                    results.append(runner.run_job(job, store))
            if distributed.rank():
                continue
            if profile:
                print_rows(phases(results[-1]), False, file=sys.stderr)
            note = f"error: {results[-1].error}" if results[-1].error else "done"
            print(f"{job.label} on {job.task.card.name}@{job.task.label}: {note}", file=sys.stderr)
    except KeyboardInterrupt:
        if launcher is not None:
            grid.cancel()
        kept = f"finished results are in {out}" if results else "nothing was finished yet"
        print(f"interrupted; {kept}, the same command goes on from there.", file=sys.stderr)
        raise typer.Exit(130) from None
    if distributed.rank() == 0 and as_json:
        print(json.dumps([result.model_dump(mode="json") for result in results], indent=2))
    elif distributed.rank() == 0:
        print_rows([summary(result) for result in results], False)
    raise typer.Exit(next((result.error_code or 1 for result in results if result.status == "failed"), 0))


@app.command()
def models(as_json: Json = False) -> None:
    """List the models that have a name; any timm:, hub:, hf: or file.py:factory spec works besides.

    Example: neco-bench models
    """
    from neco_bench.encoders.zoo import describe_models

    with foreign_code():
        rows = describe_models()
    print_rows(rows, as_json)


@app.command()
def tasks(data_root: DataRoot = None, as_json: Json = False) -> None:
    """List every task with its data set, protocols (the first is the default), metric, and whether its data is here.

    Example: neco-bench tasks --data-root /data
    """
    from neco_bench.data import base_split
    from neco_bench.data.integrity import describe_datasets
    from neco_bench.protocol import all_cards

    with foreign_code():
        present = {row.name: set(row.present) for row in describe_datasets(data_root)}
        cards, broken = all_cards()
    rows = [
        {
            "task": card.name,
            "family": card.family,
            "dataset": card.dataset,
            "protocols": list(card.protocols),
            "metric": card.metric,
            "data": {base_split(split) for split in card.splits.values()} <= present.get(card.dataset, set()),
            "citation": card.citation,
        }
        for card in cards.values()
    ]
    print_rows(rows, as_json)
    for family, reason in broken.items():
        print(f"warning: task family {family!r} is broken: {reason}", file=sys.stderr)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Model spec.")],
    weights: Weights = None,
    device: Device = None,
    precision: Precision = None,
    layers: Layers = None,
    as_json: Json = False,
) -> None:
    """Check on synthetic images that an encoder keeps the contract; exits with 4 where it does not.

    Example: neco-bench check baseline_hog
    """
    from neco_bench.encoders import check_encoder, load_encoder

    with foreign_code():
        encoder = load_encoder(model, weights=weights, device=device, precision=precision, layers=layers)
        found = check_encoder(encoder)
    rows = [{"check": row.name, "passed": "pass" if row.passed else "FAIL", "detail": row.detail} for row in found]
    print_rows(rows, as_json)
    if any(row["passed"] == "FAIL" for row in rows):
        raise typer.Exit(4)


@app.command()
def diagnose(
    model: Annotated[str, typer.Argument(help="Model spec.")],
    dataset: Annotated[str, typer.Option(help="Data set of images and masks; see `neco-bench data list`.")] = "shapes",
    split: Annotated[str, typer.Option(help="Its split.")] = "val",
    images: Annotated[int, typer.Option(help="Images, spread evenly over the split.")] = 32,
    size: Annotated[int, typer.Option(help="Pixels a side, rounded down to the stride.")] = 224,
    picture: Annotated[Path | None, typer.Option(help="PNG to write: images, components as colours, norms.")] = None,
    data_root: DataRoot = None,
    weights: Weights = None,
    device: Device = None,
    precision: Precision = None,
    layers: Layers = None,
    as_json: Json = False,
) -> None:
    """Why a score may be what it is: norm outliers, effective rank, positional leakage, neighbour purity, shifts.

    Example: neco-bench diagnose baseline_hog --picture hog.png
    """
    from neco_bench.data import load_dataset
    from neco_bench.data.base import SegmentationDataset
    from neco_bench.encoders import load_encoder
    from neco_bench.viz.diagnosis import diagnose as run_diagnosis

    with foreign_code():
        data = load_dataset(dataset, split, root=data_root)
        if not isinstance(data, SegmentationDataset):
            raise UsageError(f"{dataset!r} has no masks. Name a data set for segmentation with --dataset.")
        encoder = load_encoder(model, weights=weights, device=device, precision=precision, layers=layers)
        rows = run_diagnosis(encoder, data, size, images, picture)
    print_rows(rows, as_json)


@app.command()
def train(
    data: Annotated[
        str,
        typer.Option(help="Folder of images, list file, shapes[:N], or coco, imagenet, voc with an optional :FOLDER."),
    ],
    out: Annotated[Path, typer.Option(help="Run folder; `run --model` takes it afterwards.")],
    recipe: Annotated[str, typer.Option(help="Recipe name or .toml file; a wrong name lists those there are.")],
    base: Annotated[str | None, typer.Option(help="Model spec to start from; default: the recipe's.")] = None,
    weights: Weights = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random; default: the recipe's.")] = None,
    data_root: DataRoot = None,
    device: Device = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: the recipe's.")] = None,
    workers: Annotated[int | None, typer.Option(help="Loading processes; default: cores - 1, at most 16.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the last checkpoint in --out; learning rates, precision, steps and the like may change.",
        ),
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    evaluate: Annotated[
        list[str] | None, typer.Option("--eval", metavar="TASK", help="Score on this task while training; repeatable.")
    ] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 1000,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Run the encoder through torch.compile; needs drop_path=0.")
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations again in backward: less memory, more time.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events too.")] = False,
) -> None:
    """Post-train an encoder with NeCo, on one device or, started by torchrun, on several.

    Example: neco-bench train --base dinov2_vits14_reg --data coco --recipe neco_vits14_518 --out runs/neco
    """
    from neco_bench.training import loop
    from neco_bench.training.recipe import load_recipe, parse_changes

    given = {"base": base, "seed": seed, "precision": precision}
    settings = parse_changes(changes or []) | {name: value for name, value in given.items() if value is not None}
    options = loop.Options(
        out=out,
        data=data,
        data_root=data_root,
        weights=weights,
        device=device,
        workers=workers,
        resume=resume,
        stated=tuple(settings),
        save_every=save_every,
        evaluate=tuple(evaluate or ()),
        eval_every=eval_every,
        compiled=compiled,
        checkpointing=checkpointing,
        tensorboard=tensorboard,
    )
    try:
        with foreign_code():
            run_folder = loop.train(load_recipe(recipe, settings), options)
    except KeyboardInterrupt:  # a second Ctrl-C, or one before the first step
        print(f"interrupted; --resume goes on from the last checkpoint in {out}, if there is one.", file=sys.stderr)
        raise typer.Exit(130) from None
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several of us
        print(run_folder)
        print(f"done; evaluate it with: neco-bench run --model {out} --task TASK", file=sys.stderr)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Model spec, such as a run folder.")],
    out: Annotated[Path, typer.Option(help="File to write: .safetensors or .pth.")],
    layout: Annotated[
        str, typer.Option(help="Names of the weights: timm, or dinov2 (torch.hub's, of NeCo too).")
    ] = "timm",
    weights: Weights = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the file where there is one.")] = False,
) -> None:
    """Write an encoder's weights so that timm or torch.hub's DINOv2 load them.

    Of a run folder the student's; RUN?branch=teacher writes the teacher's. Position embeddings are resized by the rule
    of the code that reads the file; where that differs from the encoder's, a message says at which size features are
    the same.

    Example: neco-bench export runs/neco --layout dinov2 --out neco_vits14.pth
    """
    from neco_bench.encoders import load_encoder, run_folder
    from neco_bench.encoders.export import check_target
    from neco_bench.encoders.export import export as write

    check_target(layout, out, overwrite)
    with foreign_code():
        written = write(load_encoder(model, weights=weights, device="cpu"), layout, out, overwrite=overwrite)
    print(written)
    if weights is None and (branch := run_folder.branch_of(model)):
        other = "student" if branch == "teacher" else "teacher"
        print(f"the {branch}'s weights; ?branch={other} exports the {other}'s", file=sys.stderr)


@app.command()
def leaderboard(
    results: Annotated[list[Path] | None, typer.Option(help="Results folder; repeatable. Default: results")] = None,
    out: Annotated[Path, typer.Option(help="Where the tables go.")] = Path("leaderboards/local"),
    published: Annotated[Path | None, typer.Option(help="CSV of published numbers; default: the one shipped.")] = None,
    latex_intervals: Annotated[
        bool, typer.Option("--latex-intervals", help="Put the 95 % intervals into the LaTeX tables.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write one CSV per task family and a Markdown page from stored results, published numbers beside measured ones.

    Example: neco-bench leaderboard --results results --out leaderboards/local
    """
    import neco_bench.leaderboards
    from neco_bench.results.leaderboard import write_leaderboard

    with _stores(results) as stores:
        found = [result for store in stores for result in store.load_all()]
    if not found:
        raise MissingError(f"No results in {', '.join(str(store.folder) for store in stores)}. Check --results.")
    shipped = Path(neco_bench.leaderboards.__file__).with_name("published.csv")
    paths = write_leaderboard(found, out, published or shipped, latex_intervals=latex_intervals)
    if as_json:
        print(json.dumps({"results": len(found), "files": [str(path) for path in paths]}))
        return
    print((out / "leaderboard.md").read_text(encoding="utf-8"))
    print("\n".join(f"wrote {path}" for path in paths), file=sys.stderr)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="Model as named in the results, or the start of a result's key.")],
    second: Annotated[str, typer.Argument(help="Model to compare with it.")],
    task: Annotated[list[str] | None, typer.Option(help="Task name or glob; repeatable, comma-separated.")] = None,
    results: Annotated[list[Path] | None, typer.Option(help="Results folder; repeatable. Default: results")] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Compare the classes of each task too.")] = False,
    per_size: Annotated[
        bool, typer.Option("--per-size", help="Compare small, medium and large regions of each segmentation task too.")
    ] = False,
    images: Annotated[int, typer.Option(help="Show so many of the most gained and most lost images of each task.")] = 0,
    as_json: Json = False,
) -> None:
    """Difference of two models, second less first, by paired bootstrap over images: interval, p, and p after Holm.

    Example: neco-bench compare baseline_rgb baseline_hog --task 'shapes_*'
    """
    from neco_bench.results import compare as comparing

    patterns = [part for value in task or [] for part in value.split(",") if part]
    _not_negative("--images", images)
    told = numbers if as_json else compared
    with _stores(results) as stores:
        pairs = comparing.find_pairs(stores, first, second, patterns)
    tables: dict[str, list[dict[str, Any]]] = {"tasks": [told(row) for row in comparing.compare_tasks(pairs)]}
    for pair in pairs:
        if per_class:
            tables[f"{pair.name} by class"] = [told(row) for row in comparing.compare_classes(pair)]
        if per_size and "confusion" in pair.first_arrays:
            tables[f"{pair.name} by size"] = [told(row) for row in comparing.compare_sizes(pair)]
        if images > 0:
            tables[f"{pair.name} by image"] = images_compared(comparing.compare_images(pair), images, as_json)
    if as_json:
        print(json.dumps(tables, indent=2))
        return
    for title, table in tables.items():
        print(f"{first} -> {second}" if title == "tasks" else f"\n{title}")
        print_rows(table, False)


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="Model as named in the results, or the start of a result's key.")],
    task: Annotated[list[str] | None, typer.Option(help="Task name or glob; repeatable, comma-separated.")] = None,
    results: Annotated[list[Path] | None, typer.Option(help="Results folder; repeatable. Default: results")] = None,
    out: Annotated[Path, typer.Option(help="Where the pages go, one folder per result.")] = Path("pictures"),
    worst: Annotated[int, typer.Option(help="So many images or pairs with the lowest scores.")] = 4,
    best: Annotated[int, typer.Option(help="So many with the highest scores.")] = 4,
    image: Annotated[list[str] | None, typer.Option(help="Ids to show instead; repeatable.")] = None,
    data_root: DataRoot = None,
    weights: Weights = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Pictures for stored results: predictions and errors, nearest patches, clusters, found points; a page and a PNG.

    The task runs again for them, on kept features where there are, and its predictions are held against the stored
    counts.

    Example: neco-bench show baseline_hog --task shapes_ic
    """
    from neco_bench.results.compare import results_of
    from neco_bench.results.files import slug
    from neco_bench.runner import job_of
    from neco_bench.viz.show import show as draw

    patterns = [part for value in task or [] for part in value.split(",") if part]
    _not_negative("--worst", worst)
    _not_negative("--best", best)
    rows: list[dict[str, Any]] = []
    failure = 0
    with _stores(results) as stores:
        found = results_of(stores, model, patterns)
    for result, store in found.values():
        folder = out / slug(result.model) / f"{slug(f'{result.task}@{result.protocol}')}-{result.key[:8]}"
        try:
            with foreign_code():
                job = job_of(result, data_root=data_root, weights=weights, device=device, progress=True)
                shown = draw(result, store.statistics(result), job, folder, worst=worst, best=best, named=image or [])
        except Exception as caught:
            error = user_error(caught)
            if error is None or len(found) == 1:
                raise
            print(f"error: {result.model} on {result.column}: {error}", file=sys.stderr)
            failure = failure or error.exit_code
            continue
        if shown.differing:
            print(
                f"warning: {result.model} on {result.column}: {shown.differing} of {shown.items} items "
                f"have other counts than those stored; versions, weights or data changed since.",
                file=sys.stderr,
            )
        rows.append({"task": result.column, "items": shown.items, "page": str(shown.page)})
    print_rows(rows, as_json)
    raise typer.Exit(failure)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete them; those that a process writes stay.")] = False,
    as_json: Json = False,
) -> None:
    """List the features that are kept to be shared by tasks (NECO_BENCH_FEATURES_GB, 20 by default), or delete them.

    Example: neco-bench cache
    """
    from datetime import datetime

    from neco_bench.features.store import remove_leftovers, remove_stream, stored_streams

    rows = stored_streams()
    if clear:
        remove_leftovers()
        left = [row for row in rows if not remove_stream(Path(row["folder"]))]
        freed = sum(row["bytes"] for row in rows) - sum(row["bytes"] for row in left)
        print(f"deleted {len(rows) - len(left)} of {len(rows)}, {freed / 1e6:.1f} MB", file=sys.stderr)
        rows = left
    for row in rows:
        row["used"] = datetime.fromtimestamp(row["used"]).isoformat(" ", "minutes")
    print_rows(rows, as_json)


@app.command()
def doctor(data_root: DataRoot = None, as_json: Json = False) -> None:
    """Show versions, devices, folders and data sets: what to paste into a bug report.

    Example: neco-bench doctor
    """
    import torch

    from neco_bench.cache import cache_dir
    from neco_bench.data.integrity import describe_datasets
    from neco_bench.results.provenance import environment
    from neco_bench.search import fastest, sizes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keys, queries = (torch.randn(count, 384, device=device) for count in sizes(device).measured)
    facts: dict[str, Any] = {
        **environment(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "search_seconds": fastest(keys, queries, 30),
        "cache": str(cache_dir()),
        "data": {row.name: bool(row.present) for row in describe_datasets(data_root)},
    }
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        print_rows([{"fact": name, "value": value} for name, value in facts.items()], False)


@data_app.command("list")
def data_list(data_root: DataRoot = None, as_json: Json = False) -> None:
    """List the data sets and whether they are under the data root.

    Example: neco-bench data list --data-root /data
    """
    from neco_bench.data.integrity import describe_datasets

    with foreign_code():
        rows = [vars(row) for row in describe_datasets(data_root)]
    if not as_json:
        for row in rows:
            del row["citation"]
    print_rows(rows, as_json)


@data_app.command("check")
def data_check(
    name: Annotated[str, typer.Argument(help="Data set; see `neco-bench data list`.")],
    data_root: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Read a whole data set and say what is wrong with it; exits with 4 where something is.

    Example: neco-bench data check voc2012 --data-root /data
    """
    from tqdm import tqdm

    from neco_bench.data.integrity import check_dataset

    with foreign_code():
        findings = check_dataset(name, data_root, progress=partial(tqdm, disable=None, leave=False))
    short = [{"level": f.level, "split": f.split, "finding": f"{f.text} {f.mend}"} for f in findings]  # long text last
    print_rows([vars(finding) for finding in findings] if as_json else short, as_json)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(4)


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="voc_sbd, coco_panoptic, or a data set whose archive is unpacked.")],
    data_root: DataRoot = None,
    source: Annotated[
        Path | None, typer.Option(help="Archive (zip, tar), the folder of SBD, or nyu_depth_v2_labeled.mat.")
    ] = None,
    into: Annotated[str, typer.Option(help="Sub-folder for an archive, such as stuffthingmaps.")] = "",
    as_json: Json = False,
) -> None:
    """Unpack an archive, or convert annotations, without touching the originals; may be interrupted and repeated.

    Example: neco-bench data prepare voc_sbd --source benchmark.tgz --data-root /data
    """
    from tqdm import tqdm

    from neco_bench.data.prepare import prepare

    progress = partial(tqdm, disable=None, leave=False)
    print_rows([vars(row) for row in prepare(name, data_root, source=source, into=into, progress=progress)], as_json)


def _models(values: Sequence[str]) -> list[str]:
    """Comma-separated specs; commas between numbers belong to a spec (timm:NAME?layers=2,5)."""
    parts = [part.strip() for value in values for part in re.split(r",(?!-?\d+(?:,|&|$))", value)]
    if not any(parts):
        raise UsageError("--model names nothing. Give a model spec; see `neco-bench models`.")
    return list(dict.fromkeys(part for part in parts if part))


@contextlib.contextmanager
def _stores(folders: Sequence[Path] | None) -> Iterator[list[ResultStore]]:
    """The results folders, which warn of what they could not use."""
    from neco_bench.results.store import ResultStore

    stores = [ResultStore(folder) for folder in folders or [Path("results")]]
    try:
        yield stores
    finally:
        for problem in dict.fromkeys(problem for store in stores for problem in store.problems):
            print(f"warning: {problem}", file=sys.stderr)


def _not_negative(option: str, value: int) -> None:
    """Raise UsageError for a negative number."""
    if value < 0:
        raise UsageError(f"{option} must be at least 0, got {value}.")
