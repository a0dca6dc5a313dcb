"""`neco-bench train`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from neco_bench.cli.common import DataRoot, Device, Weights, app, is_quiet
from neco_bench.cli.output import foreign_code


@app.command()
def train(
    data: Annotated[
        str,
        typer.Option(help="Folder of images, list file, shapes[:N], or coco, imagenet, voc with an optional :FOLDER."),
    ],
    out: Annotated[Path, typer.Option(help="Run folder; `run --model` takes it afterwards.")],
    recipe: Annotated[str, typer.Option(help="Recipe name or .toml file; a wrong name lists the shipped ones.")],
    base: Annotated[str | None, typer.Option(help="Model spec to start from; default: the recipe's.")] = None,
    weights: Weights = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random; default: the recipe's.")] = None,
    data_root: DataRoot = None,
    device: Device = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: the recipe's.")] = None,
    workers: Annotated[int | None, typer.Option(help="Loading processes; default: the cores of each training process less one, at most 16.")] = None,
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
    from neco_bench.training.options import TrainOptions
    from neco_bench.training.recipe import load_recipe, parse_changes

    given = {"base": base, "seed": seed, "precision": precision}
    settings = parse_changes(changes or []) | {name: value for name, value in given.items() if value is not None}
    options = TrainOptions(
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
        progress=not is_quiet(),
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
