"""The application object and the options that several commands share."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
import typer.core

from neco_bench.core.errors import UsageError

if TYPE_CHECKING:
    from neco_bench.results.store import ResultStore

F = TypeVar("F", bound=Callable[..., Any])


class _WithoutPydantic:
    """Avoid the import of pydantic by Typer, which takes 0.2 s of CPU time.

    Typer 0.29 uses pydantic to convert the value of `--help`, which is None by default. It does not convert a bool.
    """

    def get_help_option(self, ctx: Any) -> Any:
        """Return the help option with the default False instead of None."""
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.default = False
        return option


class _Command(_WithoutPydantic, typer.core.TyperCommand):
    pass


class _Group(_WithoutPydantic, typer.core.TyperGroup):
    def get_params(self, ctx: Any) -> Any:
        """Return the options; the completion options also have the default False instead of None."""
        options = super().get_params(ctx)
        for option in options:
            if option.name in ("install_completion", "show_completion") and getattr(option, "is_flag", False):
                option.default = False
        return options


class App(typer.Typer):
    """A Typer application whose commands start without pydantic."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=_Group, no_args_is_help=True, rich_markup_mode=None, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[F], F]:
        """Register a command."""
        return super().command(name, cls=_Command, **settings)


app = App(
    pretty_exceptions_enable=False,
    help="Evaluate dense visual encoders under named protocols.\n\n"
    "Example: neco-bench run --model baseline_hog --task 'shapes_*'",
)


data_app = App(
    help="List, check and prepare data sets.\n\nExample: neco-bench data list",
)

results_app = App(
    help="Check results, and copy them to and from a shared place.\n\nExample: neco-bench results push /shared/results",
)

DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root", envvar="NECO_BENCH_DATA", show_envvar=True, help="Folder with one sub-folder per data set."
    ),
]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]

Suites = Annotated[
    list[str] | None,
    typer.Option(
        help="Suite, or FILE.toml:NAME; repeatable and comma-separated. See `neco-bench suites`.",
        autocompletion=lambda incomplete: suite_names(incomplete),
    ),
]

Weights = Annotated[Path | None, typer.Option(help="Weights file (safetensors, .pth, .ckpt) for the model.")]

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the best available device.")]

Precision = Annotated[str | None, typer.Option(help="fp32 (default), bf16 or fp16 for the encoder.")]

RunPrecision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="fp32 (default), bf16 or fp16 for the encoder; auto: bf16 if it is fast and the protocol allows it.",
    ),
]

Layers = Annotated[str | None, typer.Option(help="Inner blocks of a ViT (8 or 2,5,8,11), or a stage of a CNN.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from neco_bench import __version__

        print(f"neco-bench {__version__}")
        raise typer.Exit


@app.callback()
def common_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print results and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print more messages on stderr.")] = False,
) -> None:
    """Handle the options of all commands, which may be given before or after the command's name."""
    if quiet and verbose:
        raise UsageError("--quiet and --verbose exclude each other. Give only one of them.")
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.getLogger("neco_bench").setLevel(level)


COMMON = ("--version", "--quiet", "--verbose")


def is_quiet() -> bool:
    """Return whether --quiet was given."""
    return not logging.getLogger("neco_bench").isEnabledFor(logging.WARNING)


def task_names(incomplete: str) -> list[str]:
    """Return the names of tasks that start with this text, for completion."""
    from neco_bench.core.protocol import all_cards

    return [name for name in all_cards()[0] if name.startswith(incomplete)]


def suite_names(incomplete: str) -> list[str]:
    """Return the names of suites that start with this text, for completion."""
    from neco_bench.core.suites import all_suites

    return [name for name in all_suites() if name.startswith(incomplete)]


def zoo_names(incomplete: str) -> list[str]:
    """Return the names of models that start with this text, for completion."""
    from neco_bench.encoders.zoo import models

    return [name for name in models() if name.startswith(incomplete)]


@contextlib.contextmanager
def _sigterm_as_interruption() -> Iterator[None]:
    """Make SIGTERM end a command like Ctrl-C: results are kept, temporary files and child processes are removed."""

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
    """Open results folders, and print a warning for each file that could not be used."""
    from neco_bench.results.store import ResultStore

    stores = [ResultStore(folder) for folder in folders or [Path("results")]]
    try:
        yield stores
    finally:
        for problem in dict.fromkeys(problem for store in stores for problem in store.problems):
            print(f"warning: {problem}", file=sys.stderr)


def not_negative(option: str, value: int) -> None:
    """Raise UsageError if the value of an option is negative."""
    if value < 0:
        raise UsageError(f"{option} must be at least 0, got {value}.")
