"""Model specs: text such as `timm:NAME?layers=8` parsed once into a `ModelSpec`. Imports no torch."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, UsageError, did_you_mean
from neco_bench.core.files import file_sha256
from neco_bench.core.registry import BUILTIN
from neco_bench.encoders.options import POS_INTERP, SPEC_OPTIONS, Layers
from neco_bench.encoders.run_folder import RUN_FILE, is_run_folder, read
from neco_bench.encoders.zoo import UNKNOWN, ZooEntry, aliases, models, zoo


def branch_of(spec: str) -> str | None:
    """Which of a run's two encoders a spec means, "student" or "teacher"; None for other models, or a single encoder.

    Raises as `parse_spec`.
    """
    request = parse_spec(spec)
    if request.kind != "run" or read(Path(request.target)).teacher is None:
        return None
    return request.branch or "student"


def base_of(folder: Path) -> ModelSpec:
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


_FORMS = (
    "a zoo name (see `neco-bench models`), timm:NAME, hub:OWNER/REPO:ENTRY, hf:ID, path/to/file.py:FACTORY "
    "or the folder of a training run"
)


@dataclass(frozen=True)
class ModelSpec:
    """A parsed spec. `kind` is the adapter ("code" is "module:factory"), `target` what it is to build.

    base: the architecture of a run folder, whose layers, final norm and positions hold where the spec says nothing.
    takes: the options that such a model has.
    """

    name: str
    kind: str
    target: str
    entry: ZooEntry | None = None
    origin: str = ""
    options: dict[str, str] = field(default_factory=dict)
    pretrained: bool = True
    seed: int = 0
    branch: str | None = None
    layers: tuple[int, ...] | None = None
    final_norm: bool = True
    pos_interp: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    trust: bool = False
    base: ModelSpec | None = None
    takes: tuple[str, ...] = ()


def parse_spec(spec: str | os.PathLike[str]) -> ModelSpec:
    """Read a spec. Raises `UsageError` for what is none, an unknown name or option, with the nearest known ones.

    Of run folders it reads `encoder.json`: `MissingError` for a folder without, `BadInputError` for a broken one.
    """
    if not isinstance(spec, str | os.PathLike):
        raise UsageError(
            f"A model is named by a spec, not given as {type(spec).__name__}. Write {_FORMS}. Of a module, name a "
            f"function that returns it."
        )
    spec = os.fspath(spec).strip()
    body, _, query = spec.partition("?")
    scheme, _, rest = body.partition(":")
    entry, origin, base = None, "", None
    if is_run_folder(body):
        body = body.rstrip("/") or body
        kind, target, base = "run", body, base_of(Path(body))
    elif scheme in ("timm", "hub", "hf"):
        kind, target = scheme, rest
        if not rest or (kind == "hub" and not all(rest.rpartition(":"))):
            raise UsageError(f"Model spec {spec!r} is incomplete: write {_FORMS}.")
    elif scheme.endswith(".py"):
        kind, target = "file", body
        if not rest:
            raise UsageError(f"Model spec {spec!r} names no factory: write {body}:FACTORY.{functions_in(Path(body))}")
    elif os.path.isdir(body) and body not in models():
        raise MissingError(
            f"Folder {body} holds no trained encoder (no {RUN_FILE}): if a training run writes there, it has not saved "
            f"a checkpoint yet. A folder of transformers is hf:{body}, one of torch.hub hub:{body}:ENTRY."
        )
    elif "/" in body or ":" in body:
        raise UsageError(f"Model spec {spec!r} is none of the known forms: {_FORMS}.")
    else:
        body = aliases().get(body, body)
        registered = models().entry(body)
        entry, origin = zoo().get(body), registered.origin
        if registered.value.startswith("timm:"):
            inner = parse_spec(registered.value)
            kind, target = inner.kind, inner.target
            query = "&".join(filter(None, ["&".join(f"{k}={v}" for k, v in inner.options.items()), query]))
        else:
            kind, target = "code", registered.value
    takes = tuple(o for o in SPEC_OPTIONS[kind] if base is None or o in (*SPEC_OPTIONS[base.kind], "branch"))
    options = _parse_query(query, takes, spec)
    own = {k: v for k, v in options.items() if entry is None or f"{k}={v}" not in entry.spec}
    name = body + ("?" + "&".join(f"{k}={own[k]}" for k in sorted(own)) if own else "")
    if "seed" in options and options.get("pretrained") != "false":
        raise UsageError(f"Model spec {spec!r}: seed is for random weights; add pretrained=false.")
    defaults = entry or base
    return ModelSpec(
        name=name,
        kind=kind,
        target=target,
        entry=entry,
        origin=origin,
        options=options,
        pretrained=options.get("pretrained") != "false",
        seed=_seed(options.get("seed", "0"), spec),
        branch=options.get("branch"),
        layers=parse_layers(options.get("layers")) or (base.layers if base else None),
        final_norm=base.final_norm if base and "final_norm" not in options else options.get("final_norm") != "false",
        pos_interp=options.get("pos_interp") or (defaults.pos_interp if defaults else None),
        mean=_statistic("mean", options.get("mean"), spec),
        std=_statistic("std", options.get("std"), spec),
        trust=options.get("trust") == "true",
        base=base,
        takes=takes,
    )


def _parse_query(query: str, takes: tuple[str, ...], spec: str) -> dict[str, str]:
    allowed = {
        "pretrained": ("true", "false"),
        "final_norm": ("true", "false"),
        "trust": ("true", "false"),
        "pos_interp": POS_INTERP,
    }
    options: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in takes:
            raise UsageError(
                f"Model spec {spec!r}: unknown option {key!r} for this kind of model; "
                f"it takes {', '.join(takes)}.{did_you_mean(key, takes)}"
            )
        if key in allowed and value not in allowed[key]:
            raise UsageError(f"Model spec {spec!r}: {key}={value!r} must be one of {', '.join(allowed[key])}.")
        options[key] = value
    return options


def _statistic(key: str, text: str | None, spec: str) -> tuple[float, float, float] | None:
    """Three numbers for RGB on [0, 1]; those of `std` above 0."""
    if text is None:
        return None
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError:
        red = green = blue = -1.0
    if not all((0 <= value <= 1) and (value or key == "mean") for value in (red, green, blue)):
        raise UsageError(
            f"Model spec {spec!r}: {key}={text!r} must be three numbers for red, green, blue on the scale of 0 to 1, "
            f"such as {'0.485,0.456,0.406' if key == 'mean' else '0.229,0.224,0.225'}."
        )
    return red, green, blue


def _seed(text: str, spec: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < 2**63:
        raise UsageError(f"Model spec {spec!r}: seed={text!r} must be a whole number from 0 to 2^63 - 1.")
    return number


def parse_layers(layers: Layers) -> tuple[int, ...] | None:
    """Layer indices from None, 11, [3, 6, 9, 11] or "3,6,9,11". Raises `UsageError`."""
    if layers is None:
        return None
    parts = layers.split(",") if isinstance(layers, str) else [layers] if isinstance(layers, int) else layers
    try:
        indices = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        indices = ()
    if not indices:
        raise UsageError(f"layers={layers!r} must be whole numbers such as 11, -1 or 3,6,9,11.")
    return indices


def training_of(request: ModelSpec, weights: Path | None) -> tuple[str, Mapping[str, str]]:
    """What the weights of a spec were trained on, for people, and its overlap with data sets as in `ZooEntry.overlap`.

    weights: the file given in their place, which is known where it is the official file of an entry of the zoo. Not
    known is what one's own code loads, unless its encoder declares `training_data`. Raises `MissingError`.
    """
    if weights is None and request.kind == "run":
        from neco_bench.encoders.run_folder import read

        run = read(Path(request.target))
        return run.training_data, run.overlap
    if weights is None and request.kind == "timm" and not request.pretrained:
        return "none", {}
    if weights is None and request.entry and request.entry.sha256:
        place = request.entry.weights_file
        weights = place if place and place.is_file() else None
    if weights is not None:
        known = file_sha256(weights) if weights.is_file() else ""
        found = next((entry for entry in zoo().values() if entry.sha256 == known), None)
        return (found.training_data, found.overlap) if found else ("", UNKNOWN)
    return (request.entry.training_data, request.entry.overlap) if request.entry else ("", UNKNOWN)


def is_official(request: ModelSpec, weights: Path | None, source: str) -> bool | None:
    """Are the weights those of the official file of the zoo's entry? False too where its sha256 is not known yet.

    weights: the file given in their place. source: the file that was loaded, where no entry says which. None where the
    name stands for no official weights.
    """
    entry = request.entry
    if entry is None or (weights is None and not (request.pretrained and entry.has_official_weights)):
        return None
    file = weights or entry.weights_file or Path(source)
    return entry.sha256 is not None and file.is_file() and file_sha256(file) == entry.sha256


def needs_loading(request: ModelSpec) -> bool:
    """Can only loading show what the weights are? So it is where code runs that may read any file."""
    if request.base is not None:
        return needs_loading(request.base)
    return request.kind in ("file", "hub") or (request.kind == "code" and request.origin != BUILTIN)


def functions_in(path: Path) -> str:
    """A sentence with the functions and classes at the top level of a Python file, or an empty string."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ""
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    return f" It defines: {', '.join(names)}." if names else " It defines no function."


def model_info(spec: str) -> dict[str, Any]:
    """Facts about a spec without loading it: name, kind, target, origin, options; for zoo entries all their facts,
    for run folders all that `encoder.json` says.

    `weights_file` is where the file belongs and `weights_in_place` whether it is there. Raises as `parse_spec`.
    """
    request = parse_spec(spec)
    facts: dict[str, Any] = {
        "name": request.name,
        "kind": request.kind,
        "target": request.target,
        "origin": request.origin,
        "options": dict(request.options),
    }
    file = None
    if request.kind == "run":
        from neco_bench.encoders.run_folder import read

        run = read(Path(request.target))
        file = run.file_of(Path(request.target), request.branch)
        facts |= run.model_dump()
    elif request.entry is not None:
        file = request.entry.weights_file
        facts |= asdict(request.entry)
    if request.entry or file:
        facts |= {"weights_file": file and str(file), "weights_in_place": bool(file and file.is_file())}
    return facts
