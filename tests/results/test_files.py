"""Files are written whole, and what killed processes leave behind is cleared by the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from neco_bench.core import files
from neco_bench.core.errors import NecoBenchError
from neco_bench.core.files import clear_leftovers, write_whole

WRITER = """
import os, sys, time
from pathlib import Path
from neco_bench.core import files
os.fsync = lambda number: (print("writing", flush=True), time.sleep(60))
files.write_whole(Path(sys.argv[1]), b"content")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A folder in which a process is writing `a`; it is killed in the end."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / "a"], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    yield tmp_path, writer
    writer.kill()
    writer.wait()
    writer.stdout.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_killed_process_leaves_nothing_behind_the_next_write(folder: tuple[Path, subprocess.Popen[bytes]]) -> None:
    place, writer = folder
    (place / ".notes.tmp").touch()  # of somebody else
    write_whole(place / "b", b"1")
    (temporary,) = [name for name in names(place) if name not in (".notes.tmp", "b")]  # its process runs
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    write_whole(place / "c", b"2")  # this process has looked there before
    assert temporary in names(place)
    files._cleared.clear()
    write_whole(place / "c", b"3")
    assert names(place) == [".notes.tmp", "b", "c"]


def test_without_locks_only_old_files_are_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    new, old = (tmp_path / f".{letter * 32}.tmp" for letter in "ab")
    new.touch()
    old.touch()
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [new.name]
    write_whole(tmp_path / "c", b"1")
    assert (tmp_path / "c").read_bytes() == b"1"


def test_clearing_disturbs_no_writer(tmp_path: Path) -> None:
    done = threading.Event()

    def clear() -> None:
        while not done.is_set():
            clear_leftovers(tmp_path)

    thread = threading.Thread(target=clear)
    thread.start()
    try:
        for i in range(200):
            write_whole(tmp_path / f"{i % 5}", str(i).encode())
            assert (tmp_path / f"{i % 5}").read_bytes() == str(i).encode()
    finally:
        done.set()
        thread.join()
    assert names(tmp_path) == list("01234")


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", b"old")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(NecoBenchError, match=r"a: could not be written \(No space left on device\)"):
        write_whole(tmp_path / "a", b"new")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"
