"""The example plug-in of tests/plugin, built and installed for real, beside one that is broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from neco_bench.results.store import ResultStore

pytestmark = pytest.mark.slow

PLUGIN = Path(__file__).parent / "plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the built plug-in, and the metadata of another one that points to nothing."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(PLUGIN, source)  # building leaves files behind
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    broken = target / "broken_plugin-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text(
        "[neco_bench.encoders]\nbroken_encoder = nowhere_e:make\n"
        "[neco_bench.datasets]\nbroken_data = nowhere_d:Data\n"
        "[neco_bench.tasks]\nbroken_family = nowhere_t\ncardless_family = email\n"
    )
    return target


def neco(installed: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`neco-bench ARGUMENTS` in a process of its own that sees the installed plug-ins."""
    paths = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "neco_bench", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=installed.parent,
    )


def test_listings_show_what_is_added_and_what_is_broken(installed: Path) -> None:
    listed = neco(installed, "models", "--json")
    models = {row["model"]: row for row in json.loads(listed.stdout)}
    assert models["plugin_grey"]["origin"] == "neco-bench-plugin-example"
    assert models["plugin_grey"]["problem"] == ""
    assert "nowhere_e" in models["broken_encoder"]["problem"]
    assert models["baseline_rgb"]["problem"] == ""

    listed = neco(installed, "tasks", "--json")
    tasks = {row["task"]: row for row in json.loads(listed.stdout)}
    assert tasks["shapes_foreground"]["family"] == "foreground"
    assert {"shapes_ic", "spair"} <= tasks.keys()
    assert "'broken_family' is broken" in listed.stderr
    assert "nowhere_t" in listed.stderr
    assert "'cardless_family' is broken" in listed.stderr
    assert "cards.toml" in listed.stderr

    listed = neco(installed, "data", "list", "--json")
    datasets = {row["name"]: row for row in json.loads(listed.stdout)}
    assert "nowhere_d" in datasets["broken_data"]["problem"]
    assert datasets["shapes"]["problem"] == ""


def test_the_task_runs(installed: Path, tmp_path: Path) -> None:
    """Only the subprocess knows the task; its result can be read without the plug-in."""
    run = ["run", "--model", "plugin_grey,baseline_hog,broken_encoder", "--task", "shapes_fore*", "--limit", 24]
    done = neco(installed, *run, "--workers", 0, "--out", tmp_path, "--json")
    assert done.returncode == 4  # of the broken encoder, which stops no other
    assert "Traceback" not in done.stderr
    assert "nowhere_e" in done.stderr
    grey, hog, broken = json.loads(done.stdout)
    assert broken["status"] == "failed"
    assert grey["metrics"] != hog["metrics"]
    store = ResultStore(tmp_path)
    for result in store.load_all():
        if result.status == "ok":
            low, high = result.ci95["within_tolerance"]
            errors = store.statistics(result)["error"]
            assert low <= result.metrics["within_tolerance"] == (errors <= 0.05).mean() <= high
            assert result.n_images == len(errors) == 24


def test_settings_of_a_plugin_are_validated(installed: Path, tmp_path: Path) -> None:
    wrong = ["--set", "tolerence=0.1", "--set", "penalty=-1"]
    done = neco(installed, "run", "--model", "plugin_grey", "--task", "shapes_foreground", "--out", tmp_path, *wrong)
    assert done.returncode == 2
    assert "tolerence: there is no such key. Did you mean 'tolerance'" in done.stderr
    assert "penalty: Input should be greater than 0" in done.stderr
    assert "Traceback" not in done.stderr
