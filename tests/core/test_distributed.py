"""Runs by torchrun on several processes: the same counts as one process, one result file, errors that end all."""

from __future__ import annotations

import functools
import json
import signal
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
from tests import processes

pytestmark = pytest.mark.timeout(900)  # a launch takes half a minute on a quiet machine, ten times that on a full one
FEW = ("--workers", "0", "--batch-size", "4")
MODEL = "timm:test_vit3?pretrained=false&seed=0"
TOGETHER = "shapes_ic,shapes_overcluster_50,shapes_correspondence"
MOVED = "shapes_vos,shapes_views"


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], ResultStore]:
    """The results of a number of processes for some tasks, of one launch for all the tests that ask for the same."""

    @functools.cache
    def launch(count: int, tasks: str) -> ResultStore:
        folder = tmp_path_factory.mktemp("launched")
        words = ["run", "--out", "many", *FEW, "--model", MODEL, "--task", tasks, "--limit", "22", "--json"]
        words += ["--set", "epochs=1"] if tasks == "shapes_linear" else []
        running = processes.launch(count, words, folder)
        for process in running:
            assert process.wait() == 0, process.err[-3000:]
        store = ResultStore(folder / "many")
        keys = [row["key"] for row in json.loads(running[0].out)]
        assert sorted(keys) == sorted(result.key for result in store.load_all())
        return store

    return launch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "tasks", "task"),
    [
        *((2, TOGETHER, task) for task in TOGETHER.split(",")),
        (2, "shapes_linear", "shapes_linear"),
        (3, "shapes_ic", "shapes_ic"),
        *((2, MOVED, task) for task in MOVED.split(",")),
    ],
)
def test_same_counts_as_one_process(
    count: int, tasks: str, task: str, launched: Callable[[int, str], ResultStore], tmp_path: Path
) -> None:
    changes = {"epochs": 1} if task == "shapes_linear" else {}
    job = plan(MODEL, find_tasks([task], changes)[0], RunOptions(workers=0, batch_size=4, limit=22, features="off"))
    alone = ResultStore(tmp_path / "alone")
    single = run_job(job, alone)
    assert single.status == "ok", single.error
    many = launched(count, tasks)
    (found,) = (result for result in many.load_all() if result.task == task)
    assert found.key == single.key
    assert found.provenance["processes"] == count
    first, second = alone.statistics(single), many.statistics(found)
    assert set(first) == set(second)
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)
    assert found.metrics == single.metrics


@pytest.mark.slow
def test_killed_processes_leave_what_they_encoded(tmp_path: Path, new_cache: Path) -> None:
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
    words = ["run", "--out", "many", *FEW, "--model", f"{encoder}:slow", "--task", "shapes_ic", "--limit", 24, "--json"]
    running = processes.launch(2, words, tmp_path)
    until = time.monotonic() + 60
    while (streams := stored_files()) == [] or min(row["done"] for row in streams) < 4 or len(streams) < 2:
        assert time.monotonic() < until, "nothing was kept"
        time.sleep(0.02)
    for process in running:
        process.signal(signal.SIGKILL)
    assert [process.wait() for process in running] == [-signal.SIGKILL] * 2
    kept = min(row["done"] for row in stored_files())
    assert not list((tmp_path / "many").rglob("*.json"))
    running = processes.launch(2, words, tmp_path)
    for process in running:
        assert process.wait() == 0, process.err[-3000:]
    (found,) = [Result.model_validate(row) for row in json.loads(running[0].out)]
    # The first process says what it took from the store; at most its last item was not whole.
    assert found.provenance["features_reused"] >= kept - 1


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(tmp_path: Path) -> None:
    """Under torchrun itself, which has the result of the job before; the others have what it sets for its workers."""
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
    words = ["run", "--out", "out", *FEW, "--model", f"{MODEL},{encoder}:bad", "--task", "shapes_ic"]
    words += ["--limit", "16"]
    done = processes.torchrun(2, words, tmp_path)
    assert done.returncode != 0
    assert "no more" in done.stderr
    (found,) = ResultStore(tmp_path / "out").load_all()
    assert (found.model, found.status, found.provenance["processes"]) == (MODEL, "ok", 2)


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
