"""Print the table of docs/pages/intervals.md: python -m tests.statistics [share of the samples, such as 0.1]"""

from __future__ import annotations

import sys

from tests.statistics.simulate import table

if __name__ == "__main__":
    part = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    for line in table(lambda case: max(5, round(part * case.times))):
        print(line, flush=True)
