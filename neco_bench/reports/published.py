"""Published numbers (`leaderboards/published.csv`)."""

from __future__ import annotations

import csv
from decimal import Decimal
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from neco_bench.core.errors import BadInputError, MissingError


class Published(BaseModel):
    """One row of `leaderboards/published.csv`; the README there says what the fields hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    arch: str
    task: str
    protocol: str
    metric: str
    value: Decimal  # in percent, with the digits that were printed
    setting: str
    source: str
    quality: Literal["printed", "digitised"]


def read_published(path: Path | str) -> list[Published]:
    """The rows of a published.csv. Raises MissingError where there is none, BadInputError for a bad row."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restkey="cells beyond the columns")
            try:
                return [Published.model_validate(row) for row in reader]
            except ValidationError as error:
                item = error.errors()[0]
                where = f"{path}, line {reader.line_num}: {'.'.join(map(str, item['loc']))}: {item['msg']}"
                raise BadInputError(f"{where}. See leaderboards/README.md for the columns.") from error
    except FileNotFoundError as error:
        raise MissingError(f"{path}: there is no such file of published numbers.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInputError(f"{path}: is not a readable CSV file in UTF-8 ({error}).") from error
