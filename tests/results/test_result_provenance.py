from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neco_bench.results.provenance import _git_state, environment, peak_memory_mb


def test_environment_is_json_and_names_what_matters() -> None:
    found = json.loads(json.dumps(environment()))
    assert found["packages"]["numpy"] == np.__version__
    assert {"neco-bench", "torch", "timm"} <= set(found["packages"])
    assert found["cpu_cores"] >= 1
    assert found["cpu"]
    assert (found["git_commit"] is None) == (found["git_dirty"] is None)


def test_environment_imports_no_torch() -> None:
    code = (
        "import sys; from neco_bench.results.provenance import environment; environment(); "
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.slow
def test_peak_memory_grows() -> None:
    before = peak_memory_mb()
    size = int(before + 100) * 2**20
    block = np.ones(size, np.uint8)
    assert peak_memory_mb() >= block.nbytes / 2**20
    assert peak_memory_mb() < 20 * before + 10_000


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_state_is_of_the_source_tree_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: Any) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    monkeypatch.setattr(os, "environ", env)
    package = tmp_path / "neco_bench"
    package.mkdir()
    assert _git_state(package) == (None, None)
    git("init")
    assert _git_state(package) == (None, None), "no commit yet"
    (package / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    commit, dirty = _git_state(package)
    assert commit is not None
    assert len(commit) == 40
    assert dirty is False
    (tmp_path / "results.json").write_text("{}")
    assert _git_state(package) == (commit, False), "files beside the sources do not matter"
    (package / "new.py").write_text("1")
    assert _git_state(package) == (commit, True)
    env["GIT_DIR"] = "/nowhere"
    assert _git_state(package) == (commit, True)
    installed = tmp_path / "venv/site-packages/neco_bench"
    installed.mkdir(parents=True)
    assert _git_state(installed) == (None, None), "a venv inside someone's repository"
