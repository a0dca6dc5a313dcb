"""The command line, run in this process: quick, and seen as a user sees it (exit code, stdout, stderr)."""

from __future__ import annotations

import contextlib
import io
from typing import NamedTuple

import pytest

from neco_bench.cli.app import main


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def neco(*arguments: object) -> Answer:
    """Exit code, stdout and stderr of `neco-bench ARGUMENTS`. An exception that leaves it would be a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    code = stop.value.code
    return Answer(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())
