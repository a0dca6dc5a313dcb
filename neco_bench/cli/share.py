"""`neco-bench results`: push, pull and check."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neco_bench.cli.common import Json, results_app
from neco_bench.core.errors import UsageError

if TYPE_CHECKING:
    from neco_bench.results.share import Copied

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files with other content.")]

Models = Annotated[list[str] | None, typer.Option("--model", help="Only results of these models; globs; repeatable.")]


@results_app.command()
def push(
    place: Annotated[str, typer.Argument(help="Folder, or hf://datasets/ORG/NAME.")],
    results: Annotated[Path, typer.Option(help="Results folder to copy from.")] = Path("results"),
    model: Models = None,
    overwrite: Overwrite = False,
    yes: Annotated[bool, typer.Option("--yes", help="Confirm the upload to a Hugging Face repository.")] = False,
    as_json: Json = False,
) -> None:
    """Check results, and copy them to a folder or to a Hugging Face data set repository.

    Example: neco-bench results push hf://datasets/ORG/NAME --yes
    """
    from neco_bench.results import share

    if "://" in place and not yes:
        raise UsageError(f"This uploads the results in {results} to {place}. Give --yes to confirm.")
    _print_copied(share.push(results, place, models=model or (), overwrite=overwrite), as_json)


@results_app.command()
def pull(
    place: Annotated[str, typer.Argument(help="Folder, or hf://datasets/ORG/NAME.")],
    results: Annotated[Path, typer.Option(help="Results folder to copy to.")] = Path("results"),
    model: Models = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Check results, and copy them from a folder or a Hugging Face data set repository.

    Example: neco-bench results pull hf://datasets/ORG/NAME --results results
    """
    from neco_bench.results import share

    _print_copied(share.pull(place, results, models=model or (), overwrite=overwrite), as_json)


@results_app.command()
def check(
    folder: Annotated[list[Path] | None, typer.Argument(help="Results folders. Default: results")] = None,
) -> None:
    """Check every result of a folder in the same way as when it is loaded: schema, ranges, statistics, digests.

    Example: neco-bench results check leaderboards/contributed
    """
    from neco_bench.results import share

    for place in folder or [Path("results")]:
        print(f"{place}: {len(share.check_folder(place))} results, all can be used")


def _print_copied(done: "Copied", as_json: bool) -> None:
    if as_json:
        print(json.dumps({"copied": done.copied, "same": done.same}))
        return
    print(f"{len(done.copied)} files copied, {len(done.same)} already existed")
