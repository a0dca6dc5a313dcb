"""Published numbers (`leaderboards/published.csv`)."""

from __future__ import annotations

import csv
from decimal import Decimal
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from neco_bench.core.errors import BadInputError, MissingError
from neco_bench.core.metric import Unit, metric_named


class Published(BaseModel):
    """One row of `leaderboards/published.csv`; the README there describes the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    arch: str
    task: str
    protocol: str
    metric: str
    unit: Unit | None = None  # unit of the value; None: the metric's unit
    direction: Literal["higher", "lower"] | None = None  # which values are better; None: the metric's direction
    value: Decimal  # in its unit, with the printed digits
    setting: str
    source: str
    quality: Literal["printed", "digitised"]

    @model_validator(mode="after")
    def _as_the_metric_has_it(self) -> Published:
        metric = metric_named(self.metric)
        for name, stated, known in (("unit", self.unit, metric.unit), ("direction", self.direction, metric.direction)):
            if stated is not None and stated != known:
                raise ValueError(f"{name} is {stated!r}, but that of {self.metric!r} is {known!r}")
        return self


def read_published(path: Path | str) -> list[Published]:
    """Return the rows of a published.csv. Raises MissingError if it does not exist, BadInputError for a bad row."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restkey="cells beyond the columns")
            try:
                return [Published.model_validate(row) for row in reader]
            except ValidationError as error:
                item = error.errors()[0]
                place = ".".join(map(str, item["loc"])) or "row"
                where = f"{path}, line {reader.line_num}: {place}: {item['msg']}"
                raise BadInputError(f"{where}. See leaderboards/README.md for the columns.") from error
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such file of published numbers.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInputError(f"{path}: not a readable CSV file in UTF-8 ({error}).") from error
