"""Errors that a user can cause, each with the exit code that the command line returns for it.

Every message names the file or option at fault and the fix. Anything that is not a `NecoBenchError` is a bug of ours.
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


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, of this machine or of its GPU, in this exception or in one that caused it."""
    seen: set[int] = set()  # an exception may be a cause of itself
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, RuntimeError) and (  # torch.OutOfMemoryError is one; the others have no type of their own
            type(error).__name__ == "OutOfMemoryError"
            or any(sign in str(error) for sign in ("DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED"))
        ):
            return True
        error = error.__cause__
    return False


def user_error(error: BaseException) -> NecoBenchError | None:
    """What an exception means to the user, with the fix; None for a bug. Ours are returned as they are.

    Memory that runs out, files that cannot be read, loading processes that die and `sys.exit()` in foreign code can
    happen anywhere in a run.
    """
    text = f"{error}".strip().partition("\n")[0]
    if is_out_of_memory(error):
        return NecoBenchError(
            f"Out of memory ({text or type(error).__name__}). Lower --batch-size or --workers, give a smaller input "
            f"with --set input_size=N, or use --precision bf16, --limit or a larger machine."
        )
    if "DataLoader worker (pid" in text:  # raised wherever the main process is at that moment
        reason = text[text.index("DataLoader worker") :]
        return NecoBenchError(f"A loading process died ({reason}). Memory may have run out: use --workers 0, or fewer.")
    if isinstance(error, NecoBenchError):
        return error
    if isinstance(error, SystemExit):
        return BadInputError(
            f"The code of the encoder, or of a plug-in, called sys.exit({error.code!r}). Raise an exception there "
            f"that says what is wrong."
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return NecoBenchError(f"{where}{error.strerror or text or type(error).__name__}. Check the disk and the files.")
    return None
