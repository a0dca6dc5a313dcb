"""Run folders as models: the folder of a training run can be used as a model spec. Imports no torch.

`encoder.json` in the folder names the architecture, the newest weights and the other settings of the features. The
weights are state dicts of `weights.inner_module`, which are loaded into the architecture; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from neco_bench.core.errors import BadInputError, MissingError, UsageError

RUN_FILE = "encoder.json"  # in the folder of a training run

_FIX = "Resume the training run, which writes it again with its next checkpoint."

_Number = Annotated[float, Field(allow_inf_nan=False)]

_Spread = Annotated[float, Field(gt=0, allow_inf_nan=False)]

_Name = Annotated[str, Field(min_length=1)]


class TrainedEncoder(BaseModel):
    """The content of `encoder.json`.

    base: spec of the architecture, see `architecture`. student, teacher: weights files, relative to the folder; null
    for no teacher. mean, std: RGB on [0, 1]. layers: the layers to read by default; null uses those of `base`.
    embed_dim: D of the features. stride: pixels. step: number of optimizer steps of the weights. training_data: their
    training data, as text. overlap: the same for contamination notes, as in `zoo.toml`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    base: _Name
    student: _Name
    teacher: _Name | None
    mean: tuple[_Number, _Number, _Number]
    std: tuple[_Spread, _Spread, _Spread]
    layers: tuple[int, ...] | None = Field(min_length=1)
    embed_dim: PositiveInt
    stride: PositiveInt
    step: NonNegativeInt
    training_data: str
    overlap: dict[_Name, Literal["seen", "near", "possible", "unknown"]] = {"*": "unknown"}

    def file_of(self, folder: Path, branch: str | None) -> Path:
        """Return the path of a branch's weights, the student's for None. Raises `UsageError` for an unknown branch."""
        if branch not in (None, "student", "teacher"):
            raise UsageError(f"Run folder {folder}: branch={branch!r} must be student or teacher.")
        name = self.teacher if branch == "teacher" else self.student
        if name is None:
            raise UsageError(f"Run folder {folder} has no teacher's weights; leave out branch=teacher.")
        return folder / name


def read_run(folder: Path) -> TrainedEncoder:
    """Read `encoder.json` of a run folder. Raises `MissingError` and `BadInputError`, whose messages name the file."""
    path = folder / RUN_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingError(f"{path} could not be read: {error.strerror or error}. {_FIX}") from error
    except ValueError as error:
        raise BadInputError(f"{path} is not a complete JSON document ({error}). {_FIX}") from error
    version = document.get("format") if isinstance(document, dict) else None
    if isinstance(version, int) and version > 1:
        raise BadInputError(f"{path} has format {version}; this neco-bench reads up to 1. Upgrade neco-bench.")
    try:
        return TrainedEncoder.model_validate(document)
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(map(str, item["loc"])) or "document"
        raise BadInputError(f"{path} does not describe a trained encoder ({where}: {item['msg']}). {_FIX}") from error


def weights_file(folder: Path, branch: str | None) -> Path:
    """Return the existing weights file of a branch. Raises `MissingError`, and the errors of `read_run`, `file_of`."""
    path = read_run(folder).file_of(folder, branch)
    if not path.is_file():
        raise MissingError(
            f"{path}, the weights that {folder / RUN_FILE} names, does not exist. Copy the whole run folder, or pass "
            f"--weights FILE."
        )
    return path


def is_run_folder(body: str) -> bool:
    """Return whether a path (a spec without its options) is the folder of a training run with an encoder."""
    return bool(body) and os.path.isfile(os.path.join(body, RUN_FILE))
