"""Reading TOML on Python 3.10 and newer, with the file named in every error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from neco_bench.errors import BadInputError, MissingError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path) -> dict[str, Any]:
    """The document in `path`. Raises MissingError or BadInputError, naming the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingError(f"{path} does not exist.") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInputError(f"{path} is not valid TOML: {error}.") from error


def parse_value(text: str) -> Any:
    """A single TOML value, or the text itself where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
