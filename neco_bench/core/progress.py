"""Progress of long computations: a bar on a terminal, otherwise a line every half minute.

Both are printed on stderr and name the job, such as "[3 of 12] baseline_hog on shapes_ic@hbird-2".
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

EVERY = 30.0  # seconds between two lines


@dataclass
class Progress:
    """The progress of a job. As a context manager, it prints lines if stderr is not a terminal.

    title: title of the job. doing: its current phase. done, total: progress of its current iteration, if any.
    """

    title: str
    doing: str = "starts"
    done: int = 0
    total: int | None = None
    _end: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Progress:
        """Start a thread that prints lines."""
        self._start = time.monotonic()
        if not sys.stderr.isatty():
            threading.Thread(target=self._print_lines, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop printing."""
        self._end.set()

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Iterate over `items`, with a bar on a terminal."""
        total = len(items) if total is None and isinstance(items, Sized) else total
        before = self.doing, self.done, self.total
        self.doing, self.done, self.total = description, 0, total
        if sys.stderr.isatty():
            from tqdm import tqdm

            items = tqdm(items, desc=f"{self.title}: {description}", total=total, leave=False)
        try:
            for item in items:
                yield item
                self.done += 1
        finally:
            self.doing, self.done, self.total = before

    def enter(self, phase: str) -> None:
        """Set the current phase, unless the job is in an iteration."""
        if self.total is None and not self.done:
            self.doing = phase

    def line(self) -> str:
        """Return the current state of the job as text."""
        seconds = round(time.monotonic() - self._start)
        count = f" {self.done}" + (f" of {self.total}" if self.total else "") if self.done else ""
        return f"{self.title}: {self.doing}{count}, {seconds // 60}:{seconds % 60:02d}"

    def _print_lines(self) -> None:
        while not self._end.wait(EVERY):
            print(self.line(), file=sys.stderr, flush=True)
