"""`neco-bench models`, `check`, `speed`, `diagnose`, `export`. Slow imports are inside the commands."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from neco_bench.cli.common import DataRoot, Device, Json, Layers, Precision, Weights, app
from neco_bench.cli.output import foreign_code, print_rows, speed_row
from neco_bench.core.config import split_names
from neco_bench.core.errors import UsageError


@app.command()
def models(as_json: Json = False) -> None:
    """List the named models; any timm:, hub:, hf: or file.py:factory spec works too.

    Example: neco-bench models
    """
    from neco_bench.encoders.zoo import describe_models

    with foreign_code():
        rows = describe_models()
    print_rows(rows, as_json)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Model spec.")],
    weights: Weights = None,
    device: Device = None,
    precision: Precision = None,
    layers: Layers = None,
    as_json: Json = False,
) -> None:
    """Check an encoder on synthetic images: shapes, grid order, determinism and more. Exits with 4 if a check fails.

    Example: neco-bench check baseline_hog
    """
    from neco_bench.encoders import check_encoder, load_encoder

    with foreign_code():
        encoder = load_encoder(model, weights=weights, device=device, precision=precision, layers=layers)
        results = check_encoder(encoder)
    rows = [{"check": row.name, "passed": "pass" if row.passed else "FAIL", "detail": row.detail} for row in results]
    if not as_json:  # an error that fails several checks is printed with the first of them
        first: dict[str, str] = {}
        for row in rows:
            if row["passed"] == "FAIL":
                name = first.setdefault(re.sub(r"\(\d+(, \d+)*\)", "", row["detail"]), row["check"])  # without shapes
                row["detail"] = row["detail"] if name == row["check"] else f"as {name}"
    print_rows(rows, as_json)
    if any(row["passed"] == "FAIL" for row in rows):
        raise typer.Exit(4)


@app.command()
def speed(
    model: Annotated[list[str], typer.Argument(help="Model specs.")],
    size: Annotated[
        list[str] | None,
        typer.Option(help="Pixels per side; repeatable, comma-separated. Default: the sizes of most tasks."),
    ] = None,
    precision: Annotated[str, typer.Option(help="Comma-separated: fp32, bf16, fp16.")] = "fp32,bf16",
    batch_size: Annotated[int, typer.Option(help="Images at once; halved when memory runs out.")] = 16,
    seconds: Annotated[float, typer.Option(help="Measuring time for each size and precision.")] = 2.0,
    out: Annotated[Path, typer.Option(help="Results folder.")] = Path("results"),
    overwrite: Annotated[bool, typer.Option(help="Measure again even if a result is stored.")] = False,
    weights: Weights = None,
    device: Device = None,
    layers: Layers = None,
    as_json: Json = False,
) -> None:
    """Measure and store images per second, GFLOP, parameters and peak memory at the input sizes of the tasks.

    Example: neco-bench speed baseline_hog --size 224 --seconds 1
    """
    from neco_bench.encoders import load_encoder
    from neco_bench.encoders.identity import loaded_id
    from neco_bench.results.store import ResultStore
    from neco_bench.runner.speed import SpeedOptions, measure_speed, task_sizes

    texts = split_names(size or [])
    if not all(text.isdecimal() and len(text) < 6 for text in texts):
        raise UsageError(f"--size takes pixels such as 224 or 224,448, got {', '.join(size or [])!r}.")
    sizes = tuple(map(int, texts)) or task_sizes()
    precisions = tuple(dict.fromkeys(part.strip() for part in precision.split(",")))
    options = SpeedOptions(sizes, precisions, batch_size, seconds)
    store = ResultStore(out)
    store.check_writable()
    results = []
    with foreign_code():
        for name in model:
            encoder = load_encoder(name, weights=weights, device=device, layers=layers)
            identity = loaded_id(name, weights, encoder)
            results += measure_speed(encoder, identity, options, store, overwrite=overwrite)
    if as_json:
        print(json.dumps([result.model_dump(mode="json") for result in results], indent=2))
        return
    print_rows([speed_row(result) for result in results], False)


@app.command()
def diagnose(
    model: Annotated[str, typer.Argument(help="Model spec.")],
    dataset: Annotated[str, typer.Option(help="Data set with masks; see `neco-bench data list`.")] = "shapes",
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "val",
    images: Annotated[int, typer.Option(help="Number of images, spread evenly over the split.")] = 32,
    size: Annotated[int, typer.Option(help="Pixels per side, rounded down to a multiple of the stride.")] = 224,
    picture: Annotated[
        Path | None, typer.Option(help="PNG file to write: images, labels, components as colours, norms.")
    ] = None,
    data_root: DataRoot = None,
    weights: Weights = None,
    device: Device = None,
    precision: Precision = None,
    layers: Layers = None,
    as_json: Json = False,
) -> None:
    """Measure what may explain a score: norm outliers, effective rank, positional leakage, neighbour purity, shifts.

    Example: neco-bench diagnose baseline_hog --picture hog.png
    """
    from neco_bench.data.base import SegmentationDataset
    from neco_bench.data.load import load_dataset
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
def export(
    model: Annotated[str, typer.Argument(help="Model spec, such as a run folder.")],
    out: Annotated[Path, typer.Option(help="File to write: .safetensors or .pth.")],
    layout: Annotated[
        str, typer.Option(help="Parameter names: timm, or dinov2 (those of torch.hub's DINOv2, also used by NeCo).")
    ] = "timm",
    weights: Weights = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write an encoder's weights to a file that timm or torch.hub's DINOv2 can load.

    For a run folder, the student's weights are written; RUN?branch=teacher writes the teacher's. Position embeddings
    will be resized by the rule of the code that reads the file. If this differs from the encoder's rule, a message
    states the input size at which features are the same.

    Example: neco-bench export runs/neco --layout dinov2 --out neco_vits14.pth
    """
    from neco_bench.encoders import load_encoder
    from neco_bench.encoders.export import check_target
    from neco_bench.encoders.export import export as write
    from neco_bench.encoders.spec import branch_of, parse_spec

    check_target(layout, out, overwrite)
    spec = parse_spec(model)
    with foreign_code():
        written = write(load_encoder(spec, weights=weights, device="cpu"), layout, out, overwrite=overwrite)
    print(written)
    if weights is None and (branch := branch_of(spec)):
        other = "student" if branch == "teacher" else "teacher"
        print(f"the {branch}'s weights; ?branch={other} exports the {other}'s", file=sys.stderr)
