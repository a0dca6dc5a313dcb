"""Runs by torchrun on several processes: the same counts as one process, one result file, errors that end all."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from neco_bench.core.protocol import find_tasks
from neco_bench.features.store import stored_files
from neco_bench.metrics.segmentation import ImageConfusions
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from neco_bench.runner.execute import run_job
from neco_bench.runner.job import plan
from neco_bench.runner.options import RunOptions

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)  # a launch takes half a minute on a quiet machine, ten times that on a full one
MODEL = "timm:test_vit3?pretrained=false&seed=0"
TOGETHER = "shapes_ic,shapes_overcluster_50,shapes_correspondence"


def torchrun(processes: int, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = ["-m", "neco_bench", "run", "--out", str(out), "--workers", "0", "--batch-size", "4", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *command], capture_output=True, text=True, env=environment, cwd=out.parent, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], ResultStore]:
    """The results of a number of processes for some tasks, of one launch for all the tests that ask for the same."""

    @functools.cache
    def launch(processes: int, tasks: str) -> ResultStore:
        out = tmp_path_factory.mktemp("launched") / "many"
        linear = ["--set", "epochs=1"] if tasks == "shapes_linear" else []
        done = torchrun(processes, out, "--model", MODEL, "--task", tasks, "--limit", "22", "--json", *linear)
        assert done.returncode == 0, done.stderr[-3000:]
        store = ResultStore(out)
        assert sorted(row["key"] for row in json.loads(done.stdout)) == sorted(
            result.key for result in store.load_all()
        )
        return store

    return launch


@pytest.mark.parametrize(
    ("processes", "tasks", "task"),
    [
        *((2, TOGETHER, task) for task in TOGETHER.split(",")),
        pytest.param(2, "shapes_linear", "shapes_linear", marks=pytest.mark.slow),
        pytest.param(3, "shapes_ic", "shapes_ic", marks=pytest.mark.slow),
    ],
)
def test_same_counts_as_one_process(
    processes: int, tasks: str, task: str, launched: Callable[[int, str], ResultStore], tmp_path: Path
) -> None:
    changes = {"epochs": 1} if task == "shapes_linear" else {}
    job = plan(MODEL, find_tasks([task], changes)[0], RunOptions(workers=0, batch_size=4, limit=22, features="off"))
    alone = ResultStore(tmp_path / "alone")
    single = run_job(job, alone)
    assert single.status == "ok", single.error
    many = launched(processes, tasks)
    (found,) = (result for result in many.load_all() if result.task == task)
    assert found.key == single.key
    assert found.provenance["processes"] == processes
    first, second = alone.statistics(single), many.statistics(found)
    assert set(first) == set(second)
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)
    assert found.metrics == single.metrics


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pkill") is None, reason="no pkill is installed")
def test_killed_processes_leave_what_they_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NECO_BENCH_CACHE", str(tmp_path / "cache"))
    encoder = tmp_path / "slow.py"
    encoder.write_text(
        "import time, torch\n"
        "def slow():\n"
        "    class Slow(torch.nn.Module):\n"
        "        embed_dim, stride = 3, 16\n"
        "        def forward(self, x):\n"
        "            time.sleep(0.3)\n"
        "            return torch.nn.functional.avg_pool2d(x, 16)\n"
        "    return Slow()\n"
    )
    arguments = ["--model", f"{encoder}:slow", "--task", "shapes_ic", "--limit", "24", "--json"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "neco_bench",
    ]
    command += ["run", "--out", str(tmp_path / "many"), "--workers", "0", "--batch-size", "4", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(
        command,
        env=environment,
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    while (streams := stored_files()) == [] or min(row["done"] for row in streams) < 4 or len(streams) < 2:
        assert time.monotonic() < until, "nothing was kept"
        time.sleep(0.05)
    subprocess.run(
        ["pkill", "-KILL", "-f", str(encoder)], check=True
    )  # torchrun's processes are in groups of their own
    killed.wait()
    kept = min(row["done"] for row in stored_files())
    assert not list((tmp_path / "many").rglob("*.json"))
    done = torchrun(2, tmp_path / "many", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = [Result.model_validate(row) for row in json.loads(done.stdout)]
    # The first process says what it took from the store; at most its last item was not whole.
    assert found.provenance["features_reused"] >= kept - 1


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(tmp_path: Path) -> None:
    encoder = tmp_path / "bad.py"
    encoder.write_text(
        "import os, torch\n"
        "def bad():\n"
        "    class Bad(torch.nn.Module):\n"
        "        embed_dim, stride = 8, 16\n"
        "        def forward(self, x):\n"
        "            if os.environ['RANK'] == '1':\n"
        "                raise ValueError('no more')\n"
        "            return torch.nn.functional.avg_pool2d(x, 16).repeat(1, 3, 1, 1)[:, :8]\n"
        "    return Bad()\n"
    )
    done = torchrun(2, tmp_path / "out", "--model", f"{encoder}:bad", "--task", "shapes_ic", "--limit", "16")
    assert done.returncode != 0
    assert "no more" in done.stderr
    assert not list((tmp_path / "out").rglob("*.json"))


def test_confusions_are_joined_in_the_order_of_images() -> None:
    rng = np.random.default_rng(0)
    masks = [(rng.integers(0, 3, (4, 4)), rng.integers(0, 5, (4, 4))) for _ in range(7)]
    whole, parts = ImageConfusions(3, 5), [ImageConfusions(3, 5) for _ in range(3)]
    positions: list[list[int]] = [[], [], []]
    for number, (truth, found) in enumerate(masks):
        whole.add(truth, found)
        parts[number % 2].add(truth, found)  # the third has none
        positions[number % 2].append(number)
    joined = ImageConfusions.joined(parts, positions)
    mapping = np.array([0, 1, 2, 0, 1])
    np.testing.assert_array_equal(joined.per_image(mapping), whole.per_image(mapping))
    np.testing.assert_array_equal(joined.total(), whole.total())
