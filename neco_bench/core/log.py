"""Files that a run appends to: `log.csv` (one row per step), `eval.csv` (one row per score), TensorBoard events."""

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
    """A CSV file with one row per step, to which rows are appended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] | None = None  # columns of the file, known after the first append

    def rows(self) -> pd.DataFrame:
        """Read the rows, without a truncated last line; the step is an integer, other values are text.

        Raises BadInputError if the file is not such a table.
        """
        try:
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            lines = text[: text.rfind("\n") + 1] or "step\n"
            return pd.read_csv(io.StringIO(lines), dtype=str, keep_default_na=False).astype({"step": int})
        except (OSError, ValueError, LookupError) as error:
            raise BadInputError(
                f"{self.path} is damaged ({type(error).__name__}: {error}). Move it away to continue without its rows."
            ) from error

    def begin(self, step: int) -> None:
        """Remove the rows after `step`, which will be written again, and a truncated line."""
        rows = self.rows().query("step <= @step")
        if len(rows):
            write_whole(self.path, rows.to_csv(index=False, lineterminator="\n").encode())
        else:
            self.path.unlink(missing_ok=True)
        self.columns = None

    def _widen(self, names: Iterable[str]) -> list[str]:
        """Add missing columns (of a file of an older version) with "nan" in its rows; return all columns in order."""
        rows = self.rows()
        if not len(rows):
            return list(names)
        columns = list(dict.fromkeys([*rows.columns, *names]))
        if len(columns) > len(rows.columns):
            wider = rows.reindex(columns=columns, fill_value="nan")
            write_whole(self.path, wider.to_csv(index=False, lineterminator="\n").encode())
        return columns

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row, with a header first in an empty file; missing columns are added.

        Raises NecoBenchError if it cannot be written, BadInputError if the file is not such a table.
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
                f"writable; --resume continues from the last checkpoint."
            ) from error


class StepLog:
    """log.csv from step `first` on, and TensorBoard events if requested."""

    def __init__(self, out: Path, first: int, tensorboard: bool) -> None:
        """Raise MissingError if TensorBoard is requested but not installed."""
        self.table = Table(out / "log.csv")
        self.table.begin(first)
        self.events = _event_writer(out, first) if tensorboard else None

    def write(self, row: Mapping[str, float]) -> None:
        """Append the row of a step."""
        self.table.append(row)
        if self.events:
            for name, value in row.items():
                if math.isnan(value):  # values that are not computed at every step
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
