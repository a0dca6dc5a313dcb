"""A few of the faults of `python -m tests.faults`, which has long runs of the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults import commands, inputs
from tests.faults.commands import COMMANDS, Command, Fault, Server

QUICK = ("run", "leaderboard", "prepare")
NAMES = [
    command.name if command.name in QUICK else pytest.param(command.name, marks=pytest.mark.slow)
    for command in COMMANDS
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_kills_full_and_read_only_disks_and_deleted_folders(name: str, tmp_path: Path) -> None:
    """Nothing is lost or torn, the next run ends as an undisturbed one, and leaves nothing over."""
    assert commands.many(tmp_path, 5, 0, ("kill", "full", "kill", "readonly", "deleted"), (name,)) == []


def prepared(name: str, tmp_path: Path) -> tuple[Server, Command, dict[str, object]]:
    """A command, its folder `start` to begin with, and the contents of one in which it has ended."""
    (command,) = (command for command in COMMANDS if command.name == name)
    server, start, done = Server(), tmp_path / "start", tmp_path / "done"
    commands.begin(server, command, start)
    shutil.copytree(start, done)
    assert server.run(done, command.words).code == 0
    return server, command, commands.contents(done)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "leaderboard"])
def test_files_that_cannot_grow(name: str, tmp_path: Path) -> None:
    """As on a disk that fills while a file is written: half of it is there then."""
    server, command, whole = prepared(name, tmp_path)
    for size in (100, 2000):
        fault = Fault("full", size=size)
        assert commands.trial(server, command, tmp_path / "start", tmp_path / "fault", fault, whole) == ""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "codes"), [("run", {0}), ("leaderboard", {0}), ("prepare", {0, 2})])
def test_eight_processes_on_one_folder(name: str, codes: set[int], tmp_path: Path) -> None:
    """All end as documented, and the folder is as after one."""
    server, command, whole = prepared(name, tmp_path)
    folder = tmp_path / "shared"
    shutil.copytree(tmp_path / "start", folder)
    logs = [tmp_path / f"{i}.log" for i in range(8)]
    children = [server.start(folder, command.words, commands.NONE, "", log) for log in logs]
    ended = [server.end(child, log) for child, log in zip(children, logs, strict=True)]
    assert {end.code for end in ended} <= codes, ended
    assert 0 in {end.code for end in ended}
    assert not any("Traceback" in end.err for end in ended)
    assert commands.check_after(server, command, folder, {}, whole) == ""


@pytest.mark.slow
def test_changed_files(tmp_path: Path) -> None:
    """Every reader reads them or refuses them with an error of ours, in time, and writes nothing elsewhere."""
    assert inputs.many(tmp_path, 200, 0) == []
