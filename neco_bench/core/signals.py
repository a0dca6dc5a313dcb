"""Signals that end a long computation after its current step."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

SIGNALS = {signal.SIGINT, signal.SIGTERM}


class StopSignals:
    """SIGINT and SIGTERM end the run after its current step, or at once while `at_once` is set (the state is saved).

    A second Ctrl-C always ends it at once. torchrun forwards each signal to workers that have already received it from
    the terminal or the cluster, so with torchrun a Ctrl-C counts when it is received twice.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.at_once = False
        self._interrupts = 0

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals in this context, and restore the previous handlers afterwards."""
        before: dict[signal.Signals, Any] = {}
        with contextlib.suppress(ValueError):  # only the main thread can set handlers
            for number in SIGNALS:
                before[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        self._interrupts += number == signal.SIGINT
        repeated, self.received = self.received is not None, int(number)
        allowed = 2 if "TORCHELASTIC_RUN_ID" in os.environ else 1
        if self._interrupts > allowed or (self.at_once and not repeated):
            raise KeyboardInterrupt


def start_loading(loader: Iterable[Any]) -> Iterator[Any]:
    """Iterate over a DataLoader whose `worker_init_fn` is `leave_signals_to_the_parent`.

    Signals are blocked in each process until that function runs, because an earlier signal would end the process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_the_parent(worker: int) -> None:
    """Ignore signals in a loading process: they reach all processes, but the current step still needs its workers.

    SIGTERM of the parent itself still ends it: a parent that exits after an error waits for its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_exit_for_the_parent, daemon=True).start()


def _exit_for_the_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)
