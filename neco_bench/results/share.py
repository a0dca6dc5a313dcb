"""Results sent to and fetched from a folder or a data set repository of Hugging Face, checked as they are loaded.

Nothing is sent unless a command names the place. What does not load is refused by name, and nothing is copied then.
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

_DIGESTS = "digests.txt"  # "<sha256>  <path>" of every file, as `sha256sum --check` reads it


@dataclass(frozen=True)
class Copied:
    """Paths, relative to the two folders, that were copied, and those that were there already."""

    copied: list[str]
    same: list[str]


def check_folder(folder: Path) -> list[tuple[Path, Result]]:
    """Load every result of a folder with its statistics, and compare digests; returns the results with their paths.

    Raises:
        MissingError: no such folder, or no result in it.
        BadInputError: names every file that cannot be used or was changed, with the reason.
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
        raise MissingError(f"{folder}: no results there.")
    return placed


def _changed(folder: Path) -> list[str]:
    """What differs from the digests that were written when the folder was filled."""
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
            problems.append(f"{path}: is missing, {file} names it.")
        elif file_sha256(path) != known:
            problems.append(f"{path}: was changed after it was pushed: its sha256 is not that of {file}.")
    return problems


def copy_results(
    source: Path, target: Path, *, models: Sequence[str] = (), overwrite: bool = False, digests: bool = False
) -> Copied:
    """Copy checked results and their statistics between folders; every file is checked before the first is written.

    Args:
        source: results folder.
        target: the folder they are copied into, under the same relative paths.
        models: names or globs; none means all.
        overwrite: replace files that differ.
        digests: write the digests of all files of the target beside them.

    Raises:
        BadInputError: a file of either folder cannot be used, or one of the target differs.
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
            f"{target}: {', '.join(differing)} {'is' if len(differing) == 1 else 'are'} there already and not the "
            f"same. Nothing was copied; --overwrite replaces them."
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
    """Copy results to a folder, or to `hf://datasets/ORG/NAME`. Raises as `copy_results`, and `_hub`."""
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
    """Copy results from a folder, or from `hf://datasets/ORG/NAME`. Raises as `copy_results`, and `_hub`."""
    if "://" not in place:
        return copy_results(Path(place), target, **options)
    api, name = _hub(place)
    with tempfile.TemporaryDirectory() as scratch:
        with _hub_errors(place):
            api.snapshot_download(name, repo_type="dataset", local_dir=scratch, allow_patterns=_PATTERNS)
        return copy_results(Path(scratch), target, **options)


_PATTERNS = ["**.json", "**.npz", "*.json", "*.npz", _DIGESTS]


def _hub(place: str) -> tuple[Any, str]:
    """The API, and the repository's name.

    Raises:
        UsageError: a place of another form.
        MissingError: with NECO_BENCH_OFFLINE=1.
    """
    name = place.removeprefix(HUB).strip("/")
    if not place.startswith(HUB) or name.count("/") != 1:
        raise UsageError(f"{place!r} is no place for results: name a folder, or {HUB}ORG/NAME.")
    if os.environ.get("NECO_BENCH_OFFLINE") == "1":
        raise MissingError(f"{place} is not reached while NECO_BENCH_OFFLINE=1. Unset it, or name a folder.")
    from huggingface_hub import HfApi  # slow to import

    return HfApi(), name


@contextlib.contextmanager
def _hub_errors(place: str) -> Iterator[None]:
    """Report what goes wrong on the way to a repository as MissingError."""
    try:
        yield
    except Exception as error:  # of many kinds: of HTTP, of the file system, of the hub itself
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingError(f"{place} could not be reached ({reason}). Check its name, and `hf auth login`.") from error
