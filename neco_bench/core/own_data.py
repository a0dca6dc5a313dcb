"""User-defined data sets: folders below the data root with a `dataset.toml`, whose schema is in `dataset_file`.

The name of the folder is the name of the data set, and the prefix of its task names: `plants_ic`, `plants_linear`.
Imports no numpy, and imports pydantic only if there is such a data set.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neco_bench.core.config import read_toml
from neco_bench.core.errors import NecoBenchError, problem_text
from neco_bench.core.paths import data_root

if TYPE_CHECKING:
    from neco_bench.core.dataset_file import DatasetFile

FILE = "dataset.toml"


@dataclass(frozen=True)
class OwnDataset:
    """A folder with a `dataset.toml`: its content, or the problem with it."""

    name: str
    folder: Path
    file: DatasetFile | None
    problem: str = ""


def own_datasets(root: str | os.PathLike[str] | None = None) -> dict[str, OwnDataset]:
    """Return the user-defined data sets below the data root (the argument, else NECO_BENCH_DATA), by name."""
    base = data_root(root)
    if base is None or not base.is_dir():
        return {}
    folders = sorted(path.parent for path in base.glob(f"*/{FILE}"))
    return {folder.name: read_own(folder) for folder in folders}


def read_own(folder: Path) -> OwnDataset:
    """Read the `dataset.toml` of a folder; errors are stored in `problem`, with the file's name."""
    from pydantic import ValidationError  # both are slow to import

    from neco_bench.core.dataset_file import NAME, DatasetFile

    path = folder / FILE
    try:
        if not NAME.fullmatch(folder.name):
            raise ValueError(f"rename the folder {folder.name!r}: names of tasks have letters, digits, _ and - only")
        return OwnDataset(folder.name, folder, DatasetFile.model_validate(read_toml(path)))
    except NecoBenchError as error:
        return OwnDataset(folder.name, folder, None, str(error))
    except ValidationError as error:
        return OwnDataset(folder.name, folder, None, f"{path}: {problem_text(error, DatasetFile.model_fields)}")
    except ValueError as error:
        return OwnDataset(folder.name, folder, None, f"{path}: {error}.")
