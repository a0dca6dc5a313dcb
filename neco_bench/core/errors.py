"""Errors that a user can cause, each with the exit code of the command line.

Every message names the file or option at fault and the fix. Any other exception is a bug in this package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class NecoBenchError(Exception):
    """Base class of all errors with a message for the user."""

    exit_code = 1


class UsageError(NecoBenchError, ValueError):
    """Wrong usage: unknown model, task, protocol, device or setting; an input size the stride does not divide."""

    exit_code = 2


class MissingError(NecoBenchError):
    """Data or weights are not on this machine."""

    exit_code = 3


class BadInputError(NecoBenchError):
    """Wrong content: a truncated image, weights that do not fit, an encoder that violates the interface."""

    exit_code = 4


class NumericalError(NecoBenchError):
    """NaN or infinite values."""

    exit_code = 5


NOTHING_LABELLED = (
    "The training masks contain only void, so nothing can be learned. Check them: neco-bench data check; or raise "
    "--limit, or use another --split-file."
)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the most similar known names, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def problem_text(error: Any, known: Iterable[str]) -> str:
    """Return the errors of pydantic's ValidationError as sentences, each with its key and value. known: all keys."""
    sentences = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"] if "[" not in str(part))  # without the kinds of a union
        message = problem["msg"].removeprefix("Value error, ").partition(", unable to parse")[0]
        if problem["type"] == "extra_forbidden":
            message = f"there is no such key.{did_you_mean(key, known)}"
        elif problem["type"] == "missing":
            message = "this value is missing."
        else:
            message += "." if problem["type"] == "value_error" else f", got {problem['input']!r}."
        sentences.append(f"{key}: {message}" if key else message)
    return " ".join(sentences)


def plural(unit: str, count: int) -> str:
    """Return the name of a unit, in the plural if needed."""
    first, _, rest = unit.partition(" ")
    return unit if count == 1 else f"{first}s {rest}".rstrip()


def first_names(names: Iterable[str]) -> str:
    """Return the first eight names, and the number of further ones, as text."""
    known = list(names)
    return ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")


def error_of_code(code: int | None, message: str) -> NecoBenchError:
    """Return the error for the exit code of a stored failure."""
    kinds = {kind.exit_code: kind for kind in (UsageError, MissingError, BadInputError, NumericalError)}
    return kinds.get(code or 1, NecoBenchError)(message)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether this exception, or one that caused it, means that the machine or its GPU is out of memory."""
    seen: set[int] = set()  # an exception may be a cause of itself
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, RuntimeError) and (  # torch.OutOfMemoryError, or one without its type
            type(error).__name__ == "OutOfMemoryError"
            or any(sign in str(error) for sign in ("DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED"))
        ):
            return True
        error = error.__cause__
    return False


def user_error(error: BaseException) -> NecoBenchError | None:
    """Return the error to report for an exception, with the fix; None for a bug. `NecoBenchError`s are returned as is.

    Running out of memory, unreadable files, dying loading processes and `sys.exit()` in user code can happen anywhere
    in a run.
    """
    text = f"{error}".strip().partition("\n")[0]
    if is_out_of_memory(error):
        return NecoBenchError(
            f"Out of memory ({text or type(error).__name__}). Lower --batch-size or --workers, give a smaller input "
            f"with --set input_size=N, or use --precision bf16, --limit or a larger machine."
        )
    if "DataLoader worker (pid" in text:  # raised at any place in the main process
        reason = text[text.index("DataLoader worker") :]
        return NecoBenchError(f"A loading process died ({reason}). Memory may have run out: use --workers 0, or fewer.")
    if isinstance(error, NecoBenchError):
        return error
    if isinstance(error, SystemExit):
        return BadInputError(
            f"The code of the encoder, or of a plug-in, called sys.exit({error.code!r}). Raise an exception there "
            f"that describes the problem."
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return NecoBenchError(f"{where}{error.strerror or text or type(error).__name__}. Check the disk and the files.")
    return None
