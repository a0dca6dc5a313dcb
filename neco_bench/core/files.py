"""Atomic writing of files, digests, and file names made from any text."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import uuid
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from neco_bench.core.errors import MissingError, NecoBenchError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")

_cleared: set[Path] = set()  # folders cleared by this process


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: readers see either the old or the new content. Creates the folder.

    The first call for a folder deletes temporary files of killed processes (`clear_leftovers`).
    Raises NecoBenchError if the folder cannot be written or the disk is full; no temporary file remains then.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent not in _cleared:
            clear_leftovers(path.parent)
            _cleared.add(path.parent)
        temporary, file = _open_temporary(path.parent)
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:  # on Windows, an open file cannot be renamed
                file.close()
            os.replace(temporary, path)
    except OSError as error:
        raise NecoBenchError(
            f"{path}: could not be written ({error.strerror or error}). Free disk space, make the folder writable, "
            f"or choose another one with --out."
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def clear_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed processes in a folder, but not those of running processes.

    A process locks its temporary file. If the file system has no locks, files of the last day are kept.
    """
    with contextlib.suppress(OSError):
        for path in [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]:
            with contextlib.suppress(OSError), path.open("r+b") as file:
                locked = _lock(file)
                if locked or (locked is None and time.time() - path.stat().st_mtime > 24 * 3600):
                    path.unlink()


def _open_temporary(folder: Path) -> tuple[Path, BinaryIO]:
    """Create a new file, locked until it is closed."""
    while True:
        path = folder / f".{uuid.uuid4().hex}.tmp"
        file = path.open("xb")
        if _lock(file) is not False and path.exists():  # else another process has just deleted it as a leftover
            return path, file
        file.close()


def _lock(file: BinaryIO) -> bool | None:
    """Lock an open file; return whether this succeeded, or None if there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def slug(text: str) -> str:
    """Return `text` as part of a file name for any platform, at most 100 characters. Texts may share a slug."""
    text = text.replace("*", "-changed")
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-.")[:100] or "unnamed"


MODEL_FILES = re.compile(r".+\.(py|json|ya?ml|toml|safetensors|bin|pth|pt|ckpt|npz|npy)")


def content_sha256(path: Path) -> str:
    """Return the sha256 of a weights file, including the shards of an index, or of a folder. Raises `MissingError`."""
    if not (path.is_dir() or path.name.endswith(".index.json")):
        return file_sha256(path)
    folder = path if path.is_dir() else path.parent
    files = [file for file in sorted(folder.rglob("*")) if MODEL_FILES.fullmatch(file.name)]
    contents = [f"{file.relative_to(folder).as_posix()} {file_sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(contents).encode("utf-8", "surrogateescape")).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal. Raises `MissingError`."""
    try:
        facts = path.stat()
        if facts.st_size < 1 << 24:  # a small file may change within the resolution of its time stamp
            return _digest(path)
        return _known_digest(path.absolute(), facts.st_size, facts.st_mtime_ns, facts.st_ino)
    except OSError as error:
        raise MissingError(f"{path} could not be read: {error.strerror or error}.") from error


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@cache
def _known_digest(path: Path, size: int, modified: int, inode: int) -> str:
    return _digest(path)


def digest(document: Any) -> str:
    """Return the hex sha256 of a JSON-like document, independent of key order."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()
