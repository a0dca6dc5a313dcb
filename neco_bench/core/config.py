"""Read TOML on Python 3.10 and newer, with errors that name the file; split lists of names."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from neco_bench.core.errors import BadInputError, MissingError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def split_names(values: Iterable[str]) -> list[str]:
    """Return the names in values, each of which may have several, separated by commas; spaces around are removed."""
    return [name for value in values for part in value.split(",") if (name := part.strip())]


def read_toml(path: Path) -> dict[str, Any]:
    """Read the TOML document in `path`, with or without a byte order mark.

    Raises MissingError (no such file) and BadInputError (not UTF-8, not TOML, nested too deeply, integers of more than
    64 bits, not a readable file); messages name the file.
    """
    try:
        document = tomllib.loads(path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n"))
        _check_integers(document)
    except FileNotFoundError as error:
        raise MissingError(f"{path} does not exist.") from error
    except OSError as error:
        raise BadInputError(f"{path} could not be read ({error.strerror or error}). Give a TOML file.") from error
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from None
    except RecursionError:
        raise BadInputError(f"{path} is nested too deeply. Write fewer brackets or shorter dotted keys.") from None
    except ValueError as error:  # TOMLDecodeError, or Python's errors for numbers and dates
        raise BadInputError(f"{path} is not valid TOML: {error}.") from error
    return document


def parse_value(text: str) -> Any:
    """Parse a single TOML value; return the text unchanged if it is not one."""
    try:
        document = tomllib.loads(f"value = {text}")
        _check_integers(document)
    except (ValueError, RecursionError):
        return text
    return document["value"] if len(document) == 1 else text


def _check_integers(value: Any) -> None:
    """Raise ValueError for an integer of more than 64 bits, which TOML does not have."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _check_integers(part)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("an integer has more than 64 bits")


def parse_changes(assignments: Iterable[str]) -> dict[str, Any]:
    """Return {key: value} of "KEY=VALUE" strings; values are parsed as TOML if possible, else they are strings."""

    changed = {}
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign or not key.strip():
            raise UsageError(f"--set takes KEY=VALUE, got {assignment!r}.")
        changed[key.strip()] = parse_value(value.strip())
    return changed
