"""Long runs: `python -m tests.faults --kills 200`, `python -m tests.faults --inputs 10000`; exits with 1 on a fault."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults import commands


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="Kill commands so many times.")
    parser.add_argument(
        "--full",
        type=int,
        default=0,
        help="Let the disk become full or read-only, or the output be deleted, so many times.",
    )
    parser.add_argument("--inputs", type=int, default=0, help="Give readers so many changed files.")
    parser.add_argument("--only", default="", help="Names of commands or readers, comma-separated.")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    names = [name for name in given.only.split(",") if name]
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        if given.kills:
            wrong += commands.many(Path(folder) / "kills", given.kills, given.seed, ("kill",), names, verbose=True)
        if given.full:
            kinds = ("full", "readonly", "deleted")
            wrong += commands.many(Path(folder) / "full", given.full, given.seed, kinds, names, verbose=True)
        if given.inputs:
            from tests.faults import inputs

            wrong += inputs.many(Path(folder) / "inputs", given.inputs, given.seed, names, verbose=True)
    print(f"{len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
