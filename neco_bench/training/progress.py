"""Progress of training: a bar on a terminal, else a line at the first and last step and every half minute."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from neco_bench.core.progress import EVERY


class StepProgress:
    """Show finished steps, from `first` to `total`, on stderr."""

    def __init__(self, title: str, first: int, total: int) -> None:
        self.title, self.first, self.total = title, first, total
        self.start = self.shown = time.monotonic()
        self.rank = math.nan  # the last computed value
        self.bar = tqdm(total=total, initial=first, desc=title, unit="step") if sys.stderr.isatty() else None

    def update(self, row: Mapping[str, float]) -> None:
        """Show the row of log.csv of the last step."""
        if not math.isnan(row["effective_rank"]):
            self.rank = row["effective_rank"]
        if self.bar is not None:
            self.bar.set_postfix_str(self._facts(row), False)
            self.bar.update()
            return
        now, done = time.monotonic(), int(row["step"])
        if done in (self.first + 1, self.total) or now - self.shown >= EVERY:
            self.shown = now
            print(f"{self.title}: {self._place(done, now)}, {self._facts(row)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the bar and leave it visible."""
        if self.bar is not None:
            self.bar.close()

    def _place(self, done: int, now: float) -> str:
        """Return the position of the run; the remaining time is estimated from all steps and pauses of this process."""
        left = round((now - self.start) / (done - self.first) * (self.total - done))
        return f"step {done} of {self.total}, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"

    def _facts(self, row: Mapping[str, float]) -> str:
        rank = "" if math.isnan(self.rank) else f", effective rank {self.rank:.1f}"
        skipped = f", {row['skipped_steps']:.0f} steps skipped" if row["skipped_steps"] else ""
        return (
            f"loss {row['loss']:.4f}, {row['images_per_second']:.1f} images/s, "
            f"{100 * row['data_seconds'] / row['seconds']:.0f} % waiting for data, "
            f"gradient norm {row['grad_norm']:.3g}{skipped}{rank}, {row['peak_memory_mb']:.0f} MB"
        )
