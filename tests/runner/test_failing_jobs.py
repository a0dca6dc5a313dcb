"""One job that fails in any way becomes a failed result, and the next one runs; interruptions leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neco_bench.core.errors import NecoBenchError, is_out_of_memory, user_error
from neco_bench.data.shapes import Shapes
from neco_bench.results.store import ResultStore
from neco_bench.runner import execute
from tests import processes
from tests.command import Answer, neco

ENCODERS = """
import ctypes, os, shutil, sys, time
import torch
from torch import nn

class Cells(nn.Module):
    embed_dim, stride = 3, 8
    def forward(self, images):
        return nn.functional.avg_pool2d(images, 8)

def of(call):
    module = Cells()
    module.forward = lambda images: (call(), Cells.forward(module, images))[1]
    return module

def full(): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

def exits(): sys.exit("no licence")
def exits_later(): return of(lambda: sys.exit(0))
def out_of_gpu(): return of(full)
def out_of_cpu(): return of(lambda: torch.empty(10**17))
def reads(): return of(lambda: open("/proc/self/mem", "rb").read(1))
def deletes():
    shutil.rmtree(os.environ["GONE"])
    return Cells()
def prints():
    print("hello from Python")
    def speak():
        print("hello from Python", file=sys.__stdout__)
        os.write(1, b"hello from the system\\n")
        ctypes.CDLL(None).puts(b"hello from C")
    return of(speak)
def sleeps():
    return of(lambda: (print("begins to sleep", flush=True), time.sleep(600)))
def dies(): return of(lambda: os.kill(os.getpid(), 9))
"""
QUICK = ("--task", "shapes_ic", "--limit", 4, "--workers", 0, "--set", "input_size=56", "--features", "off")


@pytest.fixture
def encoders(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(ENCODERS)
    return tmp_path / "mine.py"


def run(tmp_path: Path, models: str, *arguments: object) -> tuple[Answer, dict[str, dict[str, Any]]]:
    """The answer of `run`, and its results by the end of the model's name."""
    answer = neco("run", "--model", models, *QUICK, "--out", tmp_path / "results", "--json", *arguments)
    return answer, {row["model"].rpartition(":")[2]: row for row in json.loads(answer.out)}


@pytest.mark.slow
def test_no_failure_of_an_encoder_stops_the_next_job(tmp_path: Path, encoders: Path) -> None:
    names = ("exits", "exits_later", "out_of_gpu", "out_of_cpu", "reads")
    answer, rows = run(tmp_path, ",".join([*(f"{encoders}:{name}" for name in names), "baseline_rgb"]))
    assert {name: (row["status"], row["error_code"]) for name, row in rows.items()} == {
        "exits": ("failed", 4),
        "exits_later": ("failed", 4),
        "out_of_gpu": ("failed", 1),
        "out_of_cpu": ("failed", 1),
        "reads": ("failed", 4),
        "baseline_rgb": ("ok", None),
    }
    assert answer.code == 4  # that of the first failure
    assert "Traceback" not in answer.err
    assert "failed: SystemExit: no licence" in rows["exits"]["error"]
    for name in ("out_of_gpu", "out_of_cpu"):
        assert "Out of memory" in rows[name]["error"]
        assert "--batch-size" in rows[name]["error"]
    assert len(ResultStore(tmp_path / "results").load_all()) == len(names) + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(5, "Input/output error", "/data/a.jpg"), 1, "/data/a.jpg: Input/output error"),
        (MemoryError(), 1, "Out of memory"),
        (KeyError("hue"), 4, "Item '000' of data set 'shapes' could not be read: KeyError: 'hue'"),
        (SystemExit(3), 4, "called sys.exit(3)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_failure_of_a_data_set_stops_the_next_job(
    error: BaseException, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, left = Shapes.__getitem__, [False, True]  # the first job fails

    def fails(self: Shapes, index: int) -> Any:
        if not left[0]:
            raise error
        return read(self, index)

    original = execute.execute

    def counted(*arguments: Any) -> Any:
        try:
            return original(*arguments)
        finally:
            left.pop(0)

    monkeypatch.setattr(Shapes, "__getitem__", fails)
    monkeypatch.setattr(execute, "_check_masks", lambda job: None)
    monkeypatch.setattr(execute, "execute", counted)
    answer, rows = run(tmp_path, "baseline_rgb,baseline_hog")
    assert (answer.code, rows["baseline_rgb"]["status"], rows["baseline_hog"]["status"]) == (code, "failed", "ok")
    assert message in rows["baseline_rgb"]["error"]
    assert "Traceback" not in answer.err


def test_a_loading_process_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, read = os.getpid(), Shapes.__getitem__

    def dies(self: Shapes, index: int) -> Any:
        if os.getpid() != main and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    monkeypatch.setattr(Shapes, "__getitem__", dies)
    answer, rows = run(tmp_path, "baseline_rgb,baseline_hog", "--workers", 1)
    assert (answer.code, rows["baseline_rgb"]["status"], rows["baseline_hog"]["status"]) == (1, "failed", "ok")
    assert "A loading process died" in rows["baseline_rgb"]["error"]
    assert "--workers 0" in rows["baseline_rgb"]["error"]


@pytest.mark.slow
def test_data_that_disappear_after_planning(tmp_path: Path, encoders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from neco_bench.data.load import load_dataset

    load_dataset("shapes", "val")  # generates it
    cache = Path(os.environ["NECO_BENCH_CACHE"])
    monkeypatch.setenv("NECO_BENCH_CACHE", str(tmp_path / "cache"))
    (folder,) = (path for path in cache.glob("shapes-*") if path.is_dir())
    shutil.copytree(folder, tmp_path / "cache" / folder.name)
    monkeypatch.setenv("GONE", str(tmp_path / "cache" / folder.name))
    answer, rows = run(tmp_path, f"baseline_rgb,{encoders}:deletes,baseline_hog")
    assert {name: row["status"] for name, row in rows.items()} == {
        "baseline_rgb": "ok",
        "deletes": "failed",
        "baseline_hog": "failed",
    }
    assert answer.code in (1, 3, 4)
    assert "Traceback" not in answer.err


def test_metrics_that_are_no_fractions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a plug-in's family, say: percents, or an interval of NaN."""
    made = execute._outcome

    def wrong(*arguments: Any) -> Any:
        outcome = made(*arguments)
        if arguments[0].model == "baseline_rgb":
            return replace(outcome, metrics={"mIoU": 37.5})
        return replace(outcome, ci95={"mIoU": (float("nan"), 1.0)})

    monkeypatch.setattr(execute, "_outcome", wrong)
    answer, rows = run(tmp_path, "baseline_rgb,baseline_hog")
    assert answer.code == 5
    assert "metrics.mIoU: Input should be less than or equal to 1, not 37.5" in rows["baseline_rgb"]["error"]
    assert "ci95.mIoU.0 = nan" in rows["baseline_hog"]["error"]


def test_a_result_that_cannot_be_stored_is_still_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, left = ResultStore.save, [OSError(28, "No space left on device")]

    def full(self: ResultStore, *arguments: Any) -> Path:
        if left:
            raise left.pop()
        return save(self, *arguments)

    monkeypatch.setattr(ResultStore, "save", full)
    answer, rows = run(tmp_path, "baseline_rgb,baseline_hog")
    assert (answer.code, rows["baseline_rgb"]["status"], rows["baseline_hog"]["status"]) == (1, "failed", "ok")
    assert "No space left on device" in answer.err
    assert rows["baseline_rgb"]["metrics"]["mIoU"] > 0


def test_a_command_that_is_not_run(tmp_path: Path, encoders: Path) -> None:
    answer = neco("check", f"{encoders}:exits", "--json")
    assert (answer.code, answer.out) == (4, "")
    assert "failed: SystemExit: no licence" in answer.err


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_job_that_hangs(tmp_path: Path, encoders: Path) -> None:
    answer, rows = run(tmp_path, f"{encoders}:sleeps", "--job-timeout", 3)
    assert (answer.code, rows["sleeps"]["status"], rows["sleeps"]["error_code"]) == (1, "failed", 1)
    assert "did not end within --job-timeout 3 seconds" in rows["sleeps"]["error"]
    assert "Traceback" not in answer.err
    (stored,) = ResultStore(tmp_path / "results").load_all()
    assert stored.status == "failed"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_that_kills_its_process(tmp_path: Path, encoders: Path) -> None:
    answer, rows = run(tmp_path, f"{encoders}:dies,baseline_rgb", "--job-timeout", 250)
    assert (answer.code, rows["dies"]["status"], rows["baseline_rgb"]["status"]) == (1, "failed", "ok")
    assert "was killed by SIGKILL" in rows["dies"]["error"]
    assert {r.model: r.status for r in ResultStore(tmp_path / "results").load_all()}["baseline_rgb"] == "ok"


def test_job_timeouts_that_make_no_sense(tmp_path: Path) -> None:
    for more, message in ((("0",), "seconds above 0"), (("5", "--launcher", "local"), "timeout_min")):
        answer = neco("run", "--model", "baseline_rgb", *QUICK, "--out", tmp_path, "--job-timeout", *more)
        assert (answer.code, message in answer.err) == (2, True), answer.err


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--job-timeout", "600"]], ids=["", "a process per job"])
def test_sigterm_ends_a_run_as_ctrl_c_does(more: list[str], tmp_path: Path, encoders: Path) -> None:
    """Finished results stay, processes and temporary files do not; what encoders print never reaches stdout."""
    models = f"{encoders}:prints,{encoders}:sleeps"
    words = ["run", "--model", models, *QUICK, "--out", tmp_path / "r", "--json", *more]
    process = processes.Running(words, tmp_path, session=True)
    process.wait_for(lambda: "begins to sleep" in process.err, 120)
    process.signal(signal.SIGTERM)
    code, message = process.wait(120), process.err
    assert code == 130, message
    assert "interrupted; finished results are in" in message
    assert "Traceback" not in message
    assert process.out == ""
    for source in ("Python", "the system", "C"):
        assert f"hello from {source}" in message
    (stored,) = ResultStore(tmp_path / "r").load_all()
    assert (stored.model, stored.status) == (f"{encoders}:prints", "ok")
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    assert subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True).stdout == ""


@pytest.mark.slow
def test_what_an_encoder_prints_is_not_in_the_json(tmp_path: Path, encoders: Path) -> None:
    done = processes.run(["run", "--model", f"{encoders}:prints", *QUICK, "--out", "r", "--json"], tmp_path)
    assert done.poll() == 0, done.err
    (row,) = json.loads(done.out)
    assert (row["model"], row["status"]) == (f"{encoders}:prints", "ok")
    for source in ("Python", "the system", "C"):
        assert f"hello from {source}" in done.err


def test_which_exceptions_are_bugs() -> None:
    assert user_error(ZeroDivisionError()) is None
    assert user_error(RuntimeError("no such memory format")) is None
    ours = NecoBenchError("message")
    assert user_error(ours) is ours
    wrapped = NecoBenchError("failed")
    with contextlib.suppress(NecoBenchError):
        raise wrapped from MemoryError()
    assert is_out_of_memory(wrapped)


def test_an_exception_that_is_its_own_cause_has_an_end() -> None:
    error = ValueError("x")
    error.__cause__ = error
    assert user_error(error) is None
