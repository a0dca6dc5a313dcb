"""The application object and the options that several commands share."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neco_bench.core.errors import UsageError

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


@contextlib.contextmanager
def open_stores(folders: Sequence[Path] | None) -> Iterator[list[ResultStore]]:
    """The results folders, which warn of what they could not use."""
    from neco_bench.results.store import ResultStore

    stores = [ResultStore(folder) for folder in folders or [Path("results")]]
    try:
        yield stores
    finally:
        for problem in dict.fromkeys(problem for store in stores for problem in store.problems):
            print(f"warning: {problem}", file=sys.stderr)


def not_negative(option: str, value: int) -> None:
    """Raise UsageError for a negative number."""
    if value < 0:
        raise UsageError(f"{option} must be at least 0, got {value}.")
