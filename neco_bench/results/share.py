"""Copy results to and from a folder or a Hugging Face data set repository, with the same checks as when loading them.

Nothing is uploaded unless a command names the repository. If a file cannot be loaded, the error names it, and nothing
is copied.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, UsageError
from neco_bench.core.files import file_sha256, write_whole
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore

HUB = "hf://datasets/"

_DIGESTS = "digests.txt"  # "<sha256>  <path>" of every file, in the format of `sha256sum --check`


@dataclass(frozen=True)
class Copied:
    """Paths of copied and of already existing files, relative to both folders."""

    copied: list[str]
    same: list[str]


def check_folder(folder: Path) -> list[tuple[Path, Result]]:
    """Load every result of a folder with its statistics, compare digests, and return the results with their paths.

    Raises:
        MissingError: if the folder does not exist or has no results.
        BadInputError: if files cannot be used or were changed; the message names each file and the reason.
    """
    store = ResultStore(folder)
    results = store.load_all()
    problems = [*store.problems, *_changed(folder)]
    placed = []
    for result in results:
        path = store.path(result)
        placed.append((path, result))
        if path.with_suffix(".npz").exists():
            try:
                store.statistics(result)
            except NecoBenchError as error:
                problems.append(str(error))
    if problems:
        raise BadInputError("\n".join(dict.fromkeys(problems)))
    if not placed:
        raise MissingError(f"{folder}: contains no results.")
    return placed


def _changed(folder: Path) -> list[str]:
    """Return messages on files that differ from the digests that `push` wrote."""
    file = folder / _DIGESTS
    if not file.is_file():
        return []
    problems = []
    for line in file.read_text(encoding="utf-8").splitlines():
        known, _, name = line.partition("  ")
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{file}: names a file outside of its folder, {name!r}.")
        elif not path.is_file():
            problems.append(f"{path}: is missing, but {file} lists it.")
        elif file_sha256(path) != known:
            problems.append(f"{path}: was changed after it was pushed: its sha256 differs from that in {file}.")
    return problems


def copy_results(
    source: Path, target: Path, *, models: Sequence[str] = (), overwrite: bool = False, digests: bool = False
) -> Copied:
    """Check all results and their statistics in a folder, then copy them to another folder.

    Args:
        source: results folder to copy from.
        target: folder to copy to; relative paths stay the same.
        models: names or globs of models; all if empty.
        overwrite: replace existing files with other content.
        digests: write a file with the digests of all files in the target.

    Raises:
        BadInputError: if a file of either folder cannot be used, or a file of the target has other content.
    """
    chosen = [
        (path, result)
        for path, result in check_folder(source)
        if not models or any(fnmatchcase(result.model, pattern) for pattern in models)
    ]
    if not chosen:
        raise MissingError(f"{source}: no results of {', '.join(models)}.")
    if target.is_dir() and any(target.rglob("*.json")):
        check_folder(target)
    files = [file for path, _ in chosen for file in (path.with_suffix(".npz"), path) if file.is_file()]
    copied: list[str] = []
    same: list[str] = []
    differing: list[str] = []
    for file in files:
        name = file.relative_to(source).as_posix()
        there = target / name
        if not there.exists():
            copied.append(name)
        elif file_sha256(there) == file_sha256(file):
            same.append(name)
        else:
            (copied if overwrite else differing).append(name)
    if differing:
        raise BadInputError(
            f"{target}: {', '.join(differing)} already {'exists' if len(differing) == 1 else 'exist'} with other "
            f"content. Nothing was copied; --overwrite replaces existing files."
        )
    for name in copied:
        write_whole(target / name, (source / name).read_bytes())
    if digests:
        _write_digests(target)
    return Copied(copied, same)


def _write_digests(folder: Path) -> None:
    files = sorted(path for ending in ("json", "npz") for path in folder.rglob(f"*.{ending}"))
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    write_whole(folder / _DIGESTS, "".join(lines).encode())


def push(source: Path, place: str, **options: Any) -> Copied:
    """Copy results to a folder, or to `hf://datasets/ORG/NAME`. Raises the errors of `copy_results` and `_hub`."""
    if "://" not in place:
        return copy_results(source, Path(place), digests=True, **options)
    api, name = _hub(place)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch)
        with _hub_errors(place):
            if api.repo_exists(name, repo_type="dataset"):
                api.snapshot_download(name, repo_type="dataset", local_dir=target, allow_patterns=_PATTERNS)
        done = copy_results(source, target, digests=True, **options)
        if done.copied:
            with _hub_errors(place):
                api.create_repo(name, repo_type="dataset", exist_ok=True)
                api.upload_folder(
                    repo_id=name,
                    repo_type="dataset",
                    folder_path=target,
                    allow_patterns=_PATTERNS,
                    commit_message=f"{len(done.copied)} files of neco-bench results",
                )
    return done


def pull(place: str, target: Path, **options: Any) -> Copied:
    """Copy results from a folder, or from `hf://datasets/ORG/NAME`. Raises the errors of `copy_results` and `_hub`."""
    if "://" not in place:
        return copy_results(Path(place), target, **options)
    api, name = _hub(place)
    with tempfile.TemporaryDirectory() as scratch:
        with _hub_errors(place):
            api.snapshot_download(name, repo_type="dataset", local_dir=scratch, allow_patterns=_PATTERNS)
        return copy_results(Path(scratch), target, **options)


_PATTERNS = ["**.json", "**.npz", "*.json", "*.npz", _DIGESTS]


def _hub(place: str) -> tuple[Any, str]:
    """Return the API of the Hugging Face hub, and the name of the repository.

    Raises:
        UsageError: if the place has another form.
        MissingError: if NECO_BENCH_OFFLINE=1.
    """
    name = place.removeprefix(HUB).strip("/")
    if not place.startswith(HUB) or name.count("/") != 1:
        raise UsageError(f"{place!r} is not a valid place for results. Give a folder, or {HUB}ORG/NAME.")
    if os.environ.get("NECO_BENCH_OFFLINE") == "1":
        raise MissingError(f"{place} cannot be reached with NECO_BENCH_OFFLINE=1. Unset it, or give a folder.")
    from huggingface_hub import HfApi  # slow to import

    return HfApi(), name


@contextlib.contextmanager
def _hub_errors(place: str) -> Iterator[None]:
    """Convert errors of the connection to a repository to MissingError."""
    try:
        yield
    except Exception as error:  # many kinds: HTTP, file system, hub
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingError(f"{place} could not be reached ({reason}). Check its name and `hf auth login`.") from error
