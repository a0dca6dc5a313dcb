"""Processes of `neco-bench` without their start-up: forked from a server that has imported the slow libraries.

Importing torch, torchvision, timm and faiss takes a process 8 to 10 s of CPU, several times what most of these tests
compute. The child is a process of its own in all else: environment, folder, signals, exit code, stdout and stderr.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch", "torchvision.transforms.v2", "timm", "faiss", "scipy.io", "sklearn.linear_model", "pandas",
    "neco_bench.cli.app", "neco_bench.runner.execute", "neco_bench.training.loop", "neco_bench.viz.show",
    "neco_bench.reports.leaderboard", "neco_bench.data.prepare",
)  # fmt: skip


def forking() -> Any:
    """The multiprocessing context whose server has imported what a command needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, __name__])
    return context


def _run(words: Sequence[str], folder: str, environment: Mapping[str, str], new_session: bool, files: str) -> None:
    if new_session:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # that of a command's own process
    for number, name in ((1, "out"), (2, "err")):
        with open(f"{files}/{name}", "w") as file:
            os.dup2(file.fileno(), number)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "2")))
    from neco_bench.cli.app import main

    main(list(words))


class Running:
    """A process of `neco-bench`, with what is used of `subprocess.Popen`; stdout and stderr go to files."""

    def __init__(
        self,
        words: Sequence[object],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        *,
        session: bool = False,
    ) -> None:
        self._files = tempfile.TemporaryDirectory()
        self._process = forking().Process(
            target=_run,
            args=(list(map(str, words)), str(folder), dict(environment or os.environ), session, self._files.name),
        )
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def out(self) -> str:
        """What it has written to stdout so far."""
        return self._read("out")

    @property
    def err(self) -> str:
        """What it has written to stderr so far."""
        return self._read("err")

    def _read(self, name: str) -> str:
        path = Path(self._files.name) / name
        return path.read_text(errors="replace") if path.exists() else ""

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def wait(self, seconds: float = 120) -> int:
        """Wait for the exit code; a process that takes longer is killed, and the test fails."""
        self._process.join(seconds)
        code = self.poll()
        if code is None:
            self._process.kill()
            raise AssertionError(f"no end after {seconds} s: {self.err}")
        return code

    def wait_for(self, found: Any, seconds: float = 60) -> None:
        """Wait until `found()`, or until the process ends."""
        until = time.monotonic() + seconds
        while not found() and self.poll() is None and time.monotonic() < until:
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process alone."""
        os.kill(self.pid, number)


def run(words: Sequence[object], folder: Path, environment: Mapping[str, str] | None = None) -> Running:
    """Run a command to its end."""
    running = Running(words, folder, environment)
    running.wait()
    return running


def launch(processes: int, words: Sequence[object], folder: Path) -> list[Running]:
    """Start a command in several processes with what torchrun sets for its workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    shared |= {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    return [
        Running(words, folder, {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]


def torchrun(processes: int, words: Sequence[object], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command by torchrun itself."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, "-m", "neco_bench", *map(str, words)],
        capture_output=True, text=True, env=environment, cwd=folder, timeout=600, check=False,
    )  # fmt: skip
