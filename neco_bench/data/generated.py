"""Folders of the embedded data sets: generated at first use in the cache folder, with a digest of every file."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from neco_bench.core.errors import MissingError, UsageError
from neco_bench.core.files import file_sha256
from neco_bench.core.paths import cache_dir

_MANIFEST = "manifest.json"

_logger = logging.getLogger(__name__)


def generated_folder(name: str, generate: Callable[[Path], None]) -> Path:
    """Return the folder of generated files; generate it first if files are missing or damaged.

    generate: writes the files into an empty folder, and `write_manifest` last. Safe for several processes at once.
    Raises UsageError if the cache folder cannot be written.
    """
    folder = cache_dir() / name
    if _intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if not _intact(folder):
                if folder.exists():
                    _logger.warning("%s is incomplete or damaged and is generated again.", folder)
                    shutil.rmtree(folder)
                for rest in [path for path in folder.parent.glob(f"{folder.name}.*") if path.is_dir()]:
                    shutil.rmtree(rest)  # of a killed process, because this process has the lock
                made = folder.with_name(f"{folder.name}.partial")
                made.mkdir()
                generate(made)
                made.replace(folder)
    except OSError as error:
        raise UsageError(
            f"Cannot write the embedded data set to {folder}: {error}. Set NECO_BENCH_CACHE to a folder with 100 MB of "
            f"free space and write permission."
        ) from error
    return folder


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`, the sha256 of each file of a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    digests = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    (folder / _MANIFEST).write_text(json.dumps(digests, indent=0, sort_keys=True))


def _intact(folder: Path) -> bool:
    try:
        digests = json.loads((folder / _MANIFEST).read_bytes())
        return all(file_sha256(folder / name) == digest for name, digest in digests.items())
    except (MissingError, OSError, ValueError, AttributeError):
        return False
