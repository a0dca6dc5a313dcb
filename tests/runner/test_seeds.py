"""`run --seeds N`: a result per seed, resumed where a process was killed, and one row in tables."""

from __future__ import annotations

import json
import signal
import statistics
from pathlib import Path

import pytest

from neco_bench.core.protocol import find_tasks
from neco_bench.results.store import ResultStore
from neco_bench.runner.job import plan, seeded
from neco_bench.runner.options import RunOptions
from tests import processes
from tests.command import neco

QUICK = ("--limit", 6, "--workers", 0, "--set", "input_size=56", "--features", "off", "--task", "shapes_cluster_gt")

# Kills its process in the second run of the task, while a file is there.
ENCODER = """
import os, signal
from pathlib import Path
from torch import nn

class Cells(nn.Module):
    embed_dim, stride = 3, 8
    def forward(self, images):
        return nn.functional.avg_pool2d(images, 8)

def cells():
    os.environ["RUNS"] = os.environ.get("RUNS", "") + "x"  # this file is run for each job
    if os.environ["RUNS"] == "xx" and Path("kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return Cells()
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ENCODER)
    (tmp_path / "kill").touch()
    words = ["run", "--model", "mine.py:cells", "--seeds", "3", *QUICK]
    assert processes.run(words, tmp_path).poll() == -signal.SIGKILL
    store = ResultStore(tmp_path / "results")
    (first,) = store.load_all()
    assert first.seed == 0
    (tmp_path / "kill").unlink()
    done = processes.run(words, tmp_path)
    assert done.poll() == 0, done.err
    assert "[3 of 3] mine.py:cells on shapes_cluster_gt@neco-1*, seed 2: done" in done.err
    results = sorted(store.load_all(), key=lambda result: result.seed)
    assert [result.seed for result in results] == [0, 1, 2]
    assert results[0] == first  # was not run again
    values = [100 * result.metrics["mIoU"] for result in results]
    mean, deviation = f"{statistics.mean(values):.1f}", f"{statistics.stdev(values):.1f}"
    _, row = done.out.splitlines()
    assert f"{mean} ± {deviation} (3 seeds)" in row

    answer = neco("leaderboard", "--results", tmp_path / "results", "--out", tmp_path / "board")
    assert answer.code == 0
    table = (tmp_path / "board" / "overclustering.unranked.csv").read_text().splitlines()
    assert len(table) == 2
    assert f"{mean} ± {deviation}" in table[1]


def test_a_seed_has_the_key_of_a_run_with_that_seed() -> None:
    (task,) = find_tasks(["shapes_ic"])
    job = plan("baseline_rgb", task, RunOptions(limit=2))
    for seed, of_many in enumerate(seeded(job, 3)):
        alone = plan("baseline_rgb", task, RunOptions(limit=2, seed=seed))
        assert (of_many.key, of_many.options) == (alone.key, alone.options)


def test_wrong_numbers(tmp_path: Path) -> None:
    run = ("run", "--model", "baseline_rgb", *QUICK, "--out", tmp_path / "results")
    for number, said in ((0, "--seeds must be at least 1"), (2 * 10**9, "--seed must be at most")):
        answer = neco(*run, "--seeds", number)
        assert (answer.code, said in answer.err) == (2, True)


def test_a_dry_run_has_a_row_per_seed(tmp_path: Path) -> None:
    run = ("run", "--model", "baseline_rgb", *QUICK, "--out", tmp_path / "results")
    rows = json.loads(neco(*run, "--seed", 4, "--seeds", 2, "--dry-run", "--json").out)
    assert [row["seed"] for row in rows] == [4, 5]
