"""Entry point of the command line. Slow imports are inside the commands, so that help and listings are fast.

For the same reason, modules with commands do without `from __future__ import annotations`: Typer would evaluate every
annotation of every command as text, which is 10 % of the time of `--help`.

Results are printed on stdout (with --json, exactly one JSON document); progress, logs and errors are printed on stderr.
Exit codes: 0 done, 2 wrong usage, 3 missing data or weights, 4 bad input file, 5 numerical failure, 130 interrupted (by
Ctrl-C or SIGTERM), 1 other.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from neco_bench.cli import data, models, posttrain, results, run, share, train
from neco_bench.cli.common import COMMON, _sigterm_as_interruption, app, data_app, results_app
from neco_bench.core.errors import user_error

app.add_typer(data_app, name="data")
app.add_typer(results_app, name="results")


COMMANDS = (run, models, data, train, results, posttrain, share)  # importing these modules registers their commands


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `neco-bench` with these arguments, and exit with the documented code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
    given = list(sys.argv[1:] if arguments is None else arguments)
    common = [word for word in given if word in COMMON]
    try:
        with _sigterm_as_interruption():
            app(args=[*common, *(word for word in given if word not in COMMON)], prog_name="neco-bench")
    except Exception as caught:
        error = user_error(caught)
        if error is None or isinstance(caught, BrokenPipeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
