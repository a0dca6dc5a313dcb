"""`neco-bench posttrain-report`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from neco_bench.cli.common import DataRoot, Device, Json, RunPrecision, app, is_quiet
from neco_bench.cli.output import foreign_code, print_rows
from neco_bench.core.errors import UsageError


@app.command("posttrain-report")
def posttrain_report(
    base: Annotated[str, typer.Argument(help="Model before training.")],
    tuned: Annotated[str, typer.Argument(help="Model after training: a run folder of `train`, or any model spec.")],
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task or glob; repeatable, comma-separated. Default: quick tasks, also on your own data."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("posttrain"),
    results: Annotated[Path, typer.Option(help="Results folder to read and to write.")] = Path("results"),
    every: Annotated[
        int | None, typer.Option(help="Also compare the checkpoints every N steps (see `train --keep-every`).")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Inner layers to compare, such as 2,5,8, or none. Default: quarters of a ViT.")
    ] = None,
    layer_task: Annotated[str | None, typer.Option(help="Task for the layers; default: the first.")] = None,
    images: Annotated[int, typer.Option(help="Items per task to draw of those that gain most, and lose most.")] = 2,
    base_weights: Annotated[Path | None, typer.Option(help="Weights file of BASE.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights file of TUNED.")] = None,
    data_root: DataRoot = None,
    device: Device = None,
    precision: RunPrecision = None,
    batch_size: Annotated[int, typer.Option(help="Images per encoder forward.")] = 16,
    workers: Annotated[int | None, typer.Option(help="Loading processes.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N items of each split.")] = None,
    as_json: Json = False,
) -> None:
    """Compare a model before and after training, and write one page, Markdown, LaTeX and CSV files.

    Tasks run in the same way as with `run`. Stored results are reused: a repeated command computes nothing.

    Example: neco-bench posttrain-report tiny_base runs/tiny_neco
    """
    from neco_bench.runner.options import RunOptions, check_device
    from neco_bench.viz.posttrain import posttrain_report as make

    check_device(device)
    try:
        chosen = None if layers is None else () if layers == "none" else tuple(int(part) for part in layers.split(","))
    except ValueError:
        raise UsageError(f"--layers {layers!r}: give numbers such as 2,5,8, or none.") from None
    run = RunOptions(
        data_root=data_root,
        device=device,
        precision=precision,
        batch_size=batch_size,
        workers=workers,
        limit=limit,
        progress=not is_quiet(),
    )
    try:
        with foreign_code():
            report = make(
                base,
                tuned,
                task or (),
                out=out,
                results=results,
                run=run,
                every=every,
                layers=chosen,
                layer_task=layer_task,
                images=images,
                base_weights=base_weights,
                weights=weights,
            )
    except KeyboardInterrupt:
        print(f"interrupted; finished results are in {results}; the same command continues.", file=sys.stderr)
        raise typer.Exit(130) from None
    for problem in report.problems:
        print(f"warning: {problem}", file=sys.stderr)
    if as_json:
        tables = {section.name: json.loads(section.frame.to_json(orient="records")) for section in report.sections}
        print(json.dumps({"page": str(report.page), "problems": report.problems, **tables}, indent=2))
        return
    print_rows(report.sections[0].rows, False)
    print(f"wrote {report.page}", file=sys.stderr)
