"""Run folders as models: what a training run leaves behind is a model spec by itself. Imports no torch.

`encoder.json` in the folder names the architecture, the newest weights and what else the features depend on. The
weights are state dicts of `weights.inner_module`: they load into the bare architecture, and nothing is ever fetched.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from neco_bench.encoders.zoo import POS_INTERP, RUN_FILE, Request, is_run_folder, parse_spec
from neco_bench.errors import BadInputError, MissingError, NecoBenchError, UsageError

if TYPE_CHECKING:
    from neco_bench.encoders.base import Encoder

FORMAT = 1
_MEND = "Go on with the training run, which writes it anew with its next checkpoint."

_Number = Annotated[float, Field(allow_inf_nan=False)]
_Spread = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Name = Annotated[str, Field(min_length=1)]


class TrainedEncoder(BaseModel):
    """The content of `encoder.json`.

    base: spec of the architecture, as `architecture` gives it. student, teacher: weights files, relative to the folder;
    null for no teacher. mean, std: of RGB on [0, 1]. layers: what is read where the spec says nothing; null leaves it
    to `base`. embed_dim: D of the features. stride: pixels. step: optimizer steps behind the weights. training_data:
    what they have seen, for people. overlap: the same for contamination notes, as in `zoo.toml`.
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
        """The weights file of a branch, the student's for None. Raises `UsageError` where there is no such branch."""
        if branch not in (None, "student", "teacher"):
            raise UsageError(f"Run folder {folder}: branch={branch!r} must be student or teacher.")
        name = self.teacher if branch == "teacher" else self.student
        if name is None:
            raise UsageError(f"Run folder {folder} has no teacher's weights; leave out branch=teacher.")
        return folder / name


def read(folder: Path) -> TrainedEncoder:
    """What `encoder.json` of a run folder says. Raises `MissingError` and `BadInputError`, naming the file."""
    path = folder / RUN_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingError(f"{path} could not be read: {error.strerror or error}. {_MEND}") from error
    except ValueError as error:
        raise BadInputError(f"{path} is not a whole JSON document ({error}). {_MEND}") from error
    version = document.get("format") if isinstance(document, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise BadInputError(f"{path} has format {version}; this neco-bench reads up to {FORMAT}. Upgrade neco-bench.")
    try:
        return TrainedEncoder.model_validate(document)
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(map(str, item["loc"])) or "document"
        raise BadInputError(f"{path} does not describe a trained encoder ({where}: {item['msg']}). {_MEND}") from error


def weights_file(folder: Path, branch: str | None) -> Path:
    """The weights file of a branch, which is there. Raises `MissingError`, and as `read` and `file_of`."""
    path = read(folder).file_of(folder, branch)
    if not path.is_file():
        raise MissingError(
            f"{path}, the weights that {folder / RUN_FILE} names, is not there. Copy the run folder whole, or pass "
            f"--weights FILE."
        )
    return path


def branch_of(spec: str) -> str | None:
    """Which of a run's two encoders a spec means, "student" or "teacher"; None for other models, or a single encoder.

    Raises as `parse_spec`.
    """
    request = parse_spec(spec)
    if request.kind != "run" or read(Path(request.target)).teacher is None:
        return None
    return request.branch or "student"


def base_of(folder: Path) -> Request:
    """The architecture of a run folder, with the layers that the run read.

    Raises `MissingError` and `BadInputError`, naming `encoder.json`.
    """
    run, path = read(folder), folder / RUN_FILE
    if is_run_folder(run.base.partition("?")[0]):
        raise BadInputError(f"{path}: base {run.base!r} is itself a run folder; it must be an architecture.")
    try:
        base = parse_spec(run.base)
    except NecoBenchError as error:
        raise BadInputError(f"{path}: base: {error}") from error
    if base.kind == "file" and not Path(base.target.rpartition(":")[0]).is_file():
        raise MissingError(
            f"{path}: base {run.base!r} names a file that is not there. Work in the folder in which the encoder was "
            f"trained, or write where the file is."
        )
    return replace(base, layers=run.layers or base.layers)


def architecture(spec: str) -> str:
    """The spec of a model's bare architecture: what `encoder.json` records as `base`.

    Layers, final norm and position interpolation are kept where they are not the default, and what chooses weights
    (pretrained, seed, branch) is not. A zoo name becomes its `timm:` spec, so that later changes of the zoo cannot
    change it; a run folder becomes its own base. Raises as `parse_spec`.
    """
    request = parse_spec(spec)
    base = request.base or request
    if base.kind in ("timm", "hub", "hf"):
        body = f"{base.kind}:{base.target}"
    else:
        body = base.target if base.kind == "file" else base.name.partition("?")[0]
    options = {
        "final_norm": "" if request.final_norm else "false",
        "layers": ",".join(map(str, request.layers or ())),
        "pos_interp": request.pos_interp if request.pos_interp in POS_INTERP[1:] else "",
    }
    query = "&".join(f"{key}={value}" for key, value in options.items() if value)
    return body + (f"?{query}" if query else "")


def build(request: Request, file: Path | None) -> Encoder:
    """The encoder of a run folder, or of its architecture with the weights in `file`.

    Raises as `weights_file` and as the adapter of the architecture.
    """
    from neco_bench.encoders import specs

    assert request.base is not None
    folder = Path(request.target)
    options: dict[str, Any] = {
        "layers": request.layers,
        "final_norm": request.final_norm,
        "trust": request.trust,
    }
    if file is None:
        file = weights_file(folder, request.branch)
    else:
        options["branch"] = request.branch
    run, encoder = read(folder), specs.build(replace(request.base, **options), file)
    encoder.mean, encoder.std = run.mean, run.std
    encoder.statistics = "the run folder's"
    return encoder
