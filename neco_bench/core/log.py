"""What a run writes line by line: `log.csv` (one row per step), `eval.csv` (one per score), TensorBoard's events."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError
from neco_bench.core.files import write_whole


class Table:
    """A CSV file of rows that have a step, which grows line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] | None = None  # of the file, once a row is to be added

    def rows(self) -> pd.DataFrame:
        """Read the rows, without a last line that was cut off; the step is an integer, all else the text of the file.

        Raises BadInputError where the file is no such table.
        """
        try:
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            lines = text[: text.rfind("\n") + 1] or "step\n"
            return pd.read_csv(io.StringIO(lines), dtype=str, keep_default_na=False).astype({"step": int})
        except (OSError, ValueError, LookupError) as error:
            raise BadInputError(
                f"{self.path} is damaged ({type(error).__name__}: {error}). Move it away to go on without its rows."
            ) from error

    def begin(self, step: int) -> None:
        """Drop the rows after `step`, which will be written again, and a line that was cut off."""
        rows = self.rows().query("step <= @step")
        if len(rows):
            write_whole(self.path, rows.to_csv(index=False, lineterminator="\n").encode())
        else:
            self.path.unlink(missing_ok=True)
        self.columns = None

    def _widen(self, names: Iterable[str]) -> list[str]:
        """Add columns that the file of an older version lacks, "nan" in its rows; return all, in their order."""
        rows = self.rows()
        if not len(rows):
            return list(names)
        columns = list(dict.fromkeys([*rows.columns, *names]))
        if len(columns) > len(rows.columns):
            wider = rows.reindex(columns=columns, fill_value="nan")
            write_whole(self.path, wider.to_csv(index=False, lineterminator="\n").encode())
        return columns

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, after a header in an empty file; what the file has no column for gets one.

        Raises NecoBenchError where it cannot be written, BadInputError where the file is no such table.
        """
        try:
            if self.columns is None and self.path.is_file():
                self.columns = self._widen(row)
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                pd.DataFrame([row], columns=self.columns).to_csv(
                    file, header=file.tell() == 0, index=False, na_rep="nan", lineterminator="\n"
                )
        except OSError as error:
            raise NecoBenchError(
                f"{self.path}: could not be written ({error.strerror or error}). Free disk space or make the folder "
                f"writable; --resume goes on from the last checkpoint."
            ) from error


class StepLog:
    """log.csv from step `first` on, and TensorBoard's events where they are requested."""

    def __init__(self, out: Path, first: int, tensorboard: bool) -> None:
        """Raises MissingError where TensorBoard is requested and not installed."""
        self.table = Table(out / "log.csv")
        self.table.begin(first)
        self.events = _event_writer(out, first) if tensorboard else None

    def write(self, row: Mapping[str, float]) -> None:
        """Add the row of a step."""
        self.table.append(row)
        if self.events:
            for name, value in row.items():
                if math.isnan(value):  # what is not computed at every step
                    continue
                self.events.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self.events:
            self.events.close()


def _event_writer(out: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingError("--tensorboard needs a package: pip install 'neco-bench[tensorboard]'.") from error
    return SummaryWriter(str(out / "tensorboard"), purge_step=first + 1)
