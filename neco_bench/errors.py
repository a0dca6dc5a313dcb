"""Errors that a user can cause, each with the exit code that the command line returns for it.

Every message names the file or option at fault and the mend. Anything that is not a `NecoBenchError` is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NecoBenchError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = 1


class UsageError(NecoBenchError, ValueError):
    """Wrong usage: unknown model, task, protocol, device or setting; an input size the stride does not divide."""

    exit_code = 2


class MissingError(NecoBenchError):
    """Data or weights that are not on this machine."""

    exit_code = 3


class BadInputError(NecoBenchError):
    """A file whose content is wrong: a truncated image, weights that do not fit, an encoder breaking its contract."""

    exit_code = 4


class NumericalError(NecoBenchError):
    """NaN or infinite values where numbers are needed."""

    exit_code = 5


NOTHING_LABELLED = (
    "The training masks are all void, so there is nothing to learn from. Check them: neco-bench data check; or raise "
    "--limit, or use another --split-file."
)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the nearest known names, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def error_of_code(code: int | None, message: str) -> NecoBenchError:
    """The error that a stored failure stands for."""
    kinds = {kind.exit_code: kind for kind in (UsageError, MissingError, BadInputError, NumericalError)}
    return kinds.get(code or 1, NecoBenchError)(message)
