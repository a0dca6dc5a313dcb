"""Checkpoints: a kill at every point of their writing, the lock of a run folder, and names of late steps."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from neco_bench.core.errors import NecoBenchError, UsageError
from neco_bench.encoders import checkpoints
from neco_bench.encoders.run_folder import read_run
from tests.command import neco
from tests.typed import module

from .helpers import small_encoder


class Killed(BaseException):
    """The process ends here."""


class Run:
    """A run folder of one small layer, whose weights are its step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.encoder = folder, small_encoder()
        self.encoder.model = torch.nn.Linear(2, 2)
        self.part = torch.nn.Linear(2, 2)

    def save(self, step: int) -> None:
        for parameter in (*module(self.encoder).parameters(), *self.part.parameters()):
            torch.nn.init.constant_(parameter, step)
        facts = {
            "base": "timm:test_vit", "mean": (0.5,) * 3, "std": (0.5,) * 3, "layers": None, "embed_dim": 64,
            "stride": 16, "training_data": "",
        }  # fmt: skip
        state = {"part": self.part.state_dict(), "step": step, "unusable": {}}
        checkpoints.save(self.folder, step, {"student": self.encoder}, state, facts)

    def restore(self) -> int:
        _, state, unreadable = checkpoints.restore_newest(self.folder, {"student": self.encoder}, {"part": self.part})
        assert not unreadable
        for parameter in (*module(self.encoder).parameters(), *self.part.parameters()):
            assert (parameter == state["step"]).all()
        return state["step"]


@contextlib.contextmanager
def killed_at(point: int) -> Iterator[list[str]]:
    """Ends the process before, in the midst of, or after an operation on files, the one of that number."""
    reached: list[str] = []

    def kill(what: str) -> None:
        reached.append(what)
        if len(reached) == point:
            raise Killed

    def guarded(plain: Any, half: Any = None) -> Any:
        def work(*args: Any, **settings: Any) -> Any:
            kill(f"before {plain.__name__}")
            if half and len(reached) + 1 == point:
                half(*args)
            kill(f"in {plain.__name__}")
            plain(*args, **settings)
            kill(f"after {plain.__name__}")

        return work

    def half_removed(folder: Any, **settings: Any) -> None:
        for file in sorted(Path(folder).glob("*"))[:1]:
            file.unlink()

    def half_written(content: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", guarded(os.replace))
        patch.setattr(shutil, "rmtree", guarded(shutil.rmtree, half_removed))
        patch.setattr(checkpoints, "save_file", guarded(checkpoints.save_file, half_written))
        patch.setattr(torch, "save", guarded(torch.save, half_written))
        yield reached


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_a_kill_at_any_point_loses_nothing(step: int, tmp_path: Path) -> None:
    """In writing a checkpoint, and in writing again the one that a run goes on from."""
    points = 0
    for point in itertools.count(1):
        run = Run(tmp_path / str(point))
        run.folder.mkdir()
        run.save(0)
        run.save(2)
        with killed_at(point) as reached, contextlib.suppress(Killed):
            run.save(step)
        assert read_run(run.folder).step in (2, step)
        assert (load_file(run.folder / read_run(run.folder).student)["weight"] == read_run(run.folder).step).all()
        checkpoints.clear(run.folder)
        newest = run.restore()
        assert newest in (2, step)
        run.save(newest)
        run.save(6)
        assert run.restore() == 6
        remaining = {f"checkpoint-000000{newest}", "checkpoint-0000006", "encoder.json"}
        assert {path.name for path in run.folder.iterdir()} == remaining
        if len(reached) < point:
            break
        points += 1
    assert points >= (3 if step == 2 else 18)  # of a whole one, encoder.json alone is written


def test_a_whole_checkpoint_is_not_written_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-0000002").iterdir()}
    run.save(2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-0000002").iterdir()} == before


def test_steps_of_eight_digits_come_after_those_of_seven(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (9_999_998, 9_999_999, 10_000_000):
        run.save(step)
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(tmp_path)] == [9_999_999, 10_000_000]
    assert run.restore() == 10_000_000


def test_of_two_that_train_in_one_folder_the_second_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(checkpoints, "LOCK_SECONDS", 0.1)
    hold = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire();"
        "print(1, flush=True); time.sleep(600)"
    )
    out.mkdir()
    other = subprocess.Popen([sys.executable, "-c", hold, str(out / "lock")], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline()
    words = ("--base", "timm:test_vit?pretrained=false", "--recipe", "tiny_base", "--workers", 0, "--set", "steps=1",
             "--set", "warmup_steps=0",
             "--set", "batch_size=4", "--set", "global_size=64", "--set", "local_size=32")  # fmt: skip
    refused = neco("train", "--data", "shapes:4", "--out", out, *words)
    other.kill()
    other.communicate()
    assert refused.code == 2
    assert f"--out {out}: another process trains here. Wait until it has ended, or give another --out." in refused.err
    assert [path.name for path in out.iterdir()] == ["lock"]
    with pytest.raises(UsageError, match="trains here"), checkpoints.locked(out), checkpoints.locked(out):
        pass
    done = neco("train", "--data", "shapes:4", "--out", out, *words)  # the lock of a dead process
    assert done.code == 0, done.err


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """filelock then locks by the existence of a file, and takes over that of a process that was killed."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    hold = (
        "import errno, fcntl, sys, time\n"
        "def refuse(*_): raise OSError(errno.ENOSYS, 'Function not implemented')\n"
        "fcntl.flock = refuse\n"
        "from filelock import FileLock\n"
        "lock = FileLock(sys.argv[1])\n"
        "lock.acquire()\n"
        "print(1, flush=True)\n"
        "time.sleep(600)"
    )
    out = tmp_path / "run"
    out.mkdir()
    other = subprocess.Popen([sys.executable, "-c", hold, str(out / "lock")], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline()
    monkeypatch.setattr(checkpoints, "LOCK_SECONDS", 0.1)
    with pytest.raises(UsageError, match="trains here"), checkpoints.locked(out):
        pass
    other.kill()
    other.communicate()
    assert (out / "lock").exists()
    monkeypatch.undo()
    monkeypatch.setattr(fcntl, "flock", refuse)
    with checkpoints.locked(out):
        pass


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = "file/run: the folder could not be locked"
    with pytest.raises(NecoBenchError, match=message), checkpoints.locked(tmp_path / "file" / "run"):
        pass
