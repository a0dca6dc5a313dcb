"""How fast a report of 200 models by 40 tasks opens, and what it weighs.

    python tests/benchmarks/bench_report.py [--chromium chromium]

The median of three loads in headless Chromium, from the start of navigation until the tables stand; 40 classes a task.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import tempfile
from pathlib import Path

from neco_bench.reports.report import report_page
from neco_bench.results.schema import Result


def board(models: int, tasks: int, classes: int) -> list[Result]:
    def result(m: int, t: int) -> Result:
        value = ((m * 37 + t * 11) % 97) / 100
        return Result(
            key=f"{m:08x}{t:08x}",
            model=f"model-{m}",
            task=f"data{t}_ic",
            family=f"family_{t % 5}",
            protocol="clean-1",
            primary_metric="mIoU",
            metrics={"mIoU": value},
            per_class={"IoU": {f"class {c}": (value + c / 100) % 1 for c in range(classes)}},
            ci95={"mIoU": (value - 0.01, value + 0.01)},
            n_images=100,
            seed=0,
            status="ok",
            provenance={"weights_id": f"{m:064x}", "cpu": "one", "encoder": {"parameters": 10**6 * (m + 1)}},
            timing={"total": 1.0 + m},
            peak_memory_mb=1.0,
        )

    return [result(m, t) for m in range(models) for t in range(tasks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", default="chromium")
    options = parser.parse_args()
    page = report_page(board(200, 40, 40))
    timed = "<script>document.title = 'ms ' + performance.now()</script></body>"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(page.replace("</body>", timed), encoding="utf-8")
        command = [options.chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/user"]
        times = []
        for _ in range(3):
            done = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, check=False)
            found = re.search(r"<title>ms ([0-9.]+)", done.stdout)
            if not found:
                raise SystemExit(done.stderr)
            times.append(float(found[1]))
    print(f"{len(page.encode()) / 1e6:.2f} MB, {statistics.median(times) / 1000:.2f} s until the tables stand")


if __name__ == "__main__":
    main()
