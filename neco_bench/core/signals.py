"""Signals that end a long computation after its present step."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any


class StopSignals:
    """SIGINT and SIGTERM end the run after its present step, or at once while `at_once` says that the state is saved.

    A second Ctrl-C ends it at once, anywhere. torchrun passes each signal on to workers that the terminal or the
    cluster has signalled already: there a Ctrl-C counts when it comes twice.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.at_once = False
        self._interrupts = 0

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals inside; then put the handlers before back."""
        before: dict[signal.Signals, Any] = {}
        with contextlib.suppress(ValueError):  # only the main thread may
            for number in (signal.SIGINT, signal.SIGTERM):
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


def leave_signals_to_the_parent(worker: int) -> None:
    """Ignore signals in a loading process: they reach all processes, and the step that goes on needs its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
