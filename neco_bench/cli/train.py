"""`neco-bench train`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from neco_bench.cli.common import DataRoot, Device, Weights, app, is_quiet, suite_names
from neco_bench.cli.output import foreign_code, print_rows
from neco_bench.core.errors import UsageError

if TYPE_CHECKING:
    from neco_bench.training.options import TrainOptions


@app.command()
def train(
    out: Annotated[
        Path, typer.Option(help="Run folder; can be used as a model afterwards. With --suite, its parent folder.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of images, list file, shapes[:N], or coco, imagenet, imagenet100, voc with an optional "
            ":FOLDER; comma-separated for a mixture. Default: the data of --suite."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe name or .toml file; an unknown name lists the built-in recipes.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="Suite of runs, or FILE.toml:NAME, instead of --recipe.", autocompletion=suite_names),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Model spec to start from; default: the recipe's.")] = None,
    weights: Weights = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers; default: the recipe's.")] = None,
    data_root: DataRoot = None,
    device: Device = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: the recipe's.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Loading processes; default: the cores per training process minus one, at most 16."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the last checkpoint in --out; learning rates, precision, steps and similar may change.",
        ),
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; the last two are kept.")] = 500,
    keep_every: Annotated[
        int | None, typer.Option(help="Steps between permanent checkpoints, for `posttrain-report --every`.")
    ] = None,
    evaluate: Annotated[
        list[str] | None, typer.Option("--eval", metavar="TASK", help="Task to score during training; repeatable.")
    ] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 1000,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the encoder with torch.compile; needs drop_path=0.")
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations again in backward: less memory, more time.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    launcher: Annotated[
        str | None,
        typer.Option(help="With --suite: submit one job per run with submitit: slurm, or local (processes)."),
    ] = None,
    launcher_set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Parameter of the launcher, such as slurm_partition=gpu; repeatable."),
    ] = None,
) -> None:
    """Post-train an encoder with NeCo, on one device, or on several if started by torchrun.

    With --suite, all runs of an ablation are trained one after another: finished runs are skipped, interrupted runs
    continue.

    Example: neco-bench train --base dinov2_vits14_reg --data coco --recipe neco_vits14_518 --out runs/neco
    """
    from neco_bench.core import config
    from neco_bench.training import loop
    from neco_bench.training.options import TrainOptions
    from neco_bench.training.recipe import load_recipe, parse_changes

    if (recipe is None) == (suite is None):
        raise UsageError("Give either --recipe for one run, or --suite for all runs of a suite.")
    if launcher_set and launcher is None:
        raise UsageError("--launcher-set needs --launcher.")
    if suite is None and (launcher is not None or data is None):
        raise UsageError("--launcher is for the runs of a --suite." if launcher else "--recipe needs --data.")
    given = {"base": base, "seed": seed, "precision": precision}
    settings = parse_changes(changes or []) | {name: value for name, value in given.items() if value is not None}
    options = TrainOptions(
        out=out,
        data=data or "",
        data_root=data_root,
        weights=weights,
        device=device,
        workers=workers,
        resume=resume,
        stated=tuple(settings),
        save_every=save_every,
        keep_every=keep_every,
        evaluate=tuple(evaluate or ()),
        eval_every=eval_every,
        compiled=compiled,
        checkpointing=checkpointing,
        tensorboard=tensorboard,
        progress=not is_quiet(),
    )
    if suite is not None:
        _train_suite(suite, options, settings, data, launcher, config.parse_changes(launcher_set or []))
    try:
        with foreign_code():
            run_folder = loop.train(load_recipe(str(recipe), settings), options)
    except KeyboardInterrupt:  # a second Ctrl-C, or one before the first step
        print(f"interrupted; --resume continues from the last checkpoint in {out}, if there is one.", file=sys.stderr)
        raise typer.Exit(130) from None
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several processes
        print(run_folder)
        print(f"done; evaluate it with: neco-bench run --model {out} --task TASK", file=sys.stderr)


def _train_suite(
    name: str,
    options: "TrainOptions",
    settings: dict[str, Any],
    data: str | None,
    launcher: str | None,
    parameters: dict[str, Any],
) -> NoReturn:
    """Train the runs of a suite and print a row for each; exit with the code of the first error."""
    from neco_bench.core.suites import find_suite
    from neco_bench.training.suite import plan_runs, train_runs

    suite = find_suite(name)
    runs = plan_runs(suite, options, settings, data)
    rows = []
    first = os.environ.get("RANK", "0") == "0"
    try:
        with foreign_code():
            for done in train_runs(runs, options.out, launcher, parameters):
                rows.append(done)
                if first:
                    print(f"{done.folder}: {done.status}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoints.", file=sys.stderr)
        raise typer.Exit(130) from None
    code = next((row.exit_code for row in rows if row.exit_code), 0)
    if first:
        print_rows([{"run": str(row.folder), "status": row.status} for row in rows], False)
        models = ",".join(str(row.folder) for row in rows if not row.exit_code)
        print(f"evaluate them with: neco-bench run --suite {name} --model {models}", file=sys.stderr)
    raise typer.Exit(code)
