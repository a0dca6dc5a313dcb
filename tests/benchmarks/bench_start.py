"""What a command costs before it works: seconds of the processor, beside those of `import typer`.

    python tests/benchmarks/bench_start.py [--repeats 5]

Commands and `import typer` alternate, each in a process of its own; the figures are medians.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

COMMANDS = ("--help", "run --help", "models", "data list", "tasks")
MAIN = "import sys\nfrom neco_bench.cli.app import main\nmain(sys.argv[1:])"


def seconds(code: str, *arguments: str) -> float:
    """Seconds of the processor that Python code takes in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    taken: dict[str, list[float]] = {command: [] for command in ("import typer", *COMMANDS)}
    for _ in range(repeats):
        taken["import typer"].append(seconds("import typer"))
        for command in COMMANDS:
            taken[command].append(seconds(MAIN, *command.split()))
    base = statistics.median(taken["import typer"])
    for command, values in taken.items():
        print(f"{command:14} {statistics.median(values):.3f} s, {statistics.median(values) / base:.2f} of import typer")


if __name__ == "__main__":
    main()
