"""Grids through submitit's local executor: one result file each, resumable, errors with the place of the log."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from neco_bench.cli.app import main
from neco_bench.results.store import ResultStore
from tests.command import neco

GRID = ["--model", "baseline_rgb,baseline_hog", "--task", "shapes_ic@clean-1", "--limit", "6", "--workers", "0"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_result_each_and_none_twice_and_a_job_that_dies_is_named_with_its_log(tmp_path: Path) -> None:
    encoder = tmp_path / "dies.py"
    encoder.write_text("import os\ndef dies():\n    os._exit(7)\n")
    dies, folder = f"{encoder}:dies", tmp_path / "r"
    run = ["run", *GRID, "--set", "neighbours=5", "--out", folder, "--launcher", "local", "--json"]
    code, out, err = neco(*run, "--model", dies)
    assert code == 1
    assert "ended without a result" in err
    assert "_log.err" in err
    rows = {row["model"]: row for row in json.loads(out)}
    assert {model: row["status"] for model, row in rows.items()} == {
        "baseline_rgb": "ok",
        "baseline_hog": "ok",
        dies: "failed",  # no other job is lost
    }
    done = [rows["baseline_rgb"], rows["baseline_hog"]]
    assert {row["protocol"] for row in done} == {"clean-1*"}
    store = ResultStore(folder)
    assert {result.key for result in store.load_all() if result.status == "ok"} == {row["key"] for row in done}
    assert not store.problems
    jobs = sorted((folder / "jobs").glob("[0-9]*"))
    assert len(jobs) == 3
    code, out, _ = neco(*run)
    assert code == 0
    assert json.loads(out) == done
    assert sorted((folder / "jobs").glob("[0-9]*")) == jobs


def test_an_interruption_ends_the_jobs_that_are_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[int] = []

    class Submitted:
        def __init__(self, number: int) -> None:
            self.number = number

        def done(self) -> bool:
            return self.number == 0

        def cancel(self, check: bool) -> None:
            cancelled.append(self.number)

        def result(self) -> None:
            raise KeyboardInterrupt

    numbers = iter(range(2))
    monkeypatch.setattr("submitit.AutoExecutor.submit", lambda *_: Submitted(next(numbers)))
    with pytest.raises(SystemExit) as exit_:
        main(["run", *GRID, "--out", str(tmp_path), "--launcher", "local"])
    assert exit_.value.code == 130
    assert cancelled == [1]


def test_wrong_launchers(tmp_path: Path) -> None:
    run = ["run", *GRID, "--out", tmp_path, "--launcher"]
    code, _, err = neco(*run, "pbs")
    assert (code, "use slurm or local" in err) == (2, True)
    code, _, err = neco(*run, "local", "--launcher-set", "colour=red")
    assert code == 2, err
    assert "colour" in err
    code, _, err = neco("run", *GRID, "--out", tmp_path, "--launcher-set", "timeout_min=5")
    assert (code, "--launcher-set needs --launcher" in err) == (2, True)
    if shutil.which("srun") is None:
        code, _, err = neco(*run, "slurm")
        assert (code, "Use --launcher local" in err) == (2, True), err
