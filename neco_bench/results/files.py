"""Writing files whole, and file names made of any text."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from pathlib import Path

from neco_bench.errors import NecoBenchError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never half of it. Creates the folder.

    Raises NecoBenchError where the folder cannot be written or the disk is full; nothing is left behind then.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise NecoBenchError(
            f"{path}: could not be written ({error.strerror or error}). Free disk space, make the folder writable, "
            f"or choose another one with --out."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def slug(text: str) -> str:
    """`text` as part of a file name on any platform, at most 100 characters. Different texts may share a slug."""
    text = text.replace("*", "-changed")
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-.")[:100] or "unnamed"
