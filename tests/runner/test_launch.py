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
def test_one_result_each_and_none_twice(tmp_path: Path) -> None:
    run = ["run", *GRID, "--set", "neighbours=5", "--out", tmp_path, "--launcher", "local", "--json"]
    code, out, err = neco(*run)
    assert code == 0, err
    rows = json.loads(out)
    assert [(row["model"], row["status"]) for row in rows] == [("baseline_rgb", "ok"), ("baseline_hog", "ok")]
    assert {row["protocol"] for row in rows} == {"clean-1*"}
    store = ResultStore(tmp_path)
    assert {result.key for result in store.load_all()} == {row["key"] for row in rows}
    assert not store.problems
    jobs = sorted((tmp_path / "jobs").glob("[0-9]*"))
    assert len(jobs) == 2
    code, out, _ = neco(*run)
    assert code == 0
    assert json.loads(out) == rows
    assert sorted((tmp_path / "jobs").glob("[0-9]*")) == jobs


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_that_dies_is_named_with_its_log(tmp_path: Path) -> None:
    encoder = tmp_path / "dies.py"
    encoder.write_text("import os\ndef dies():\n    os._exit(7)\n")
    model = f"{encoder}:dies"
    options = ["--limit", "6", "--workers", "0", "--out", tmp_path / "r", "--launcher", "local", "--json"]
    code, out, err = neco("run", "--model", f"{model},baseline_rgb", "--task", "shapes_ic", *options)
    assert code == 1
    rows = [(row["model"], row["status"]) for row in json.loads(out)]
    assert rows == [(model, "failed"), ("baseline_rgb", "ok")]  # the other job is not lost
    assert "ended without a result" in err
    assert "_log.err" in err


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
