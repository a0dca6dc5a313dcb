"""Model specs: text such as `timm:NAME?layers=8`, parsed once into a `ModelSpec`. Imports no torch.

    neco_dinov2                                     a zoo name, or a name that an installed package adds
    timm:NAME                                       any timm model with dense features
    hub:OWNER/REPO:ENTRY                            a torch.hub entry, or a local folder in place of OWNER/REPO
    hf:ID                                           a transformers model, or a local folder
    path/to/file.py:FACTORY                         a user's function
    path/to/run                                     the folder of a training run

Options follow a question mark, as in `timm:NAME?pretrained=false&seed=0`:

    pretrained=true|false    seed=N (for pretrained=false)    branch=NAME (one copy of several in a file)
    layers=3,6,9,11          final_norm=true|false            pos_interp=timm|scale_offset|size_antialias
    mean=R,G,B  std=R,G,B    statistics of the weights on [0, 1]
    trust=true               for hub: models, because the repository's code is run
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, UsageError, did_you_mean
from neco_bench.core.files import file_sha256
from neco_bench.core.registry import BUILTIN
from neco_bench.encoders.options import POS_INTERP, Layers
from neco_bench.encoders.run_folder import RUN_FILE, is_run_folder, read_run
from neco_bench.encoders.zoo import UNKNOWN, ZooEntry, aliases, models, zoo

_OPTIONS = {
    "timm": ("pretrained", "seed", "branch", "layers", "final_norm", "pos_interp", "mean", "std"),
    "hub": ("trust", "pretrained", "branch", "layers", "final_norm", "mean", "std"),
    "hf": ("branch", "layers", "final_norm", "mean", "std"),
    "file": ("branch",),
    "code": ("branch",),
    "run": ("branch", "layers", "final_norm", "trust"),  # all but the first only if the architecture supports them
}

_FORMS = (
    "a zoo name (see `neco-bench models`), timm:NAME, hub:OWNER/REPO:ENTRY, hf:ID, path/to/file.py:FACTORY "
    "or the folder of a training run"
)


@dataclass(frozen=True)
class ModelSpec:
    """A parsed spec, with optional weights.

    name: the spec in its standard form: options in alphabetical order, without those of the zoo entry.
    kind: the adapter: "timm", "hub", "hf", "file" (a Python file), "code" (a function of a package) or "run".
    target: what the adapter builds, such as the name in timm, or "module:function".
    origin: for names, the package that registered it.
    options: the options as written, including those of the zoo entry; the fields after it are their values.
    base: for a run folder, its architecture; its layers, final norm and positions are the defaults.
    takes: the options that this kind of model accepts.
    weights: a file, an index of shards or a folder with one of them, which replaces the model's own weights.
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
    weights: Path | None = None


SpecLike = str | os.PathLike[str] | ModelSpec


def parse_spec(spec: SpecLike, weights: str | Path | None = None) -> ModelSpec:
    """Parse a spec; a parsed spec is returned unchanged, with `weights` if they are given.

    Raises:
        UsageError: for an invalid spec, an unknown name or option (the message suggests similar ones), a wrong value.
        MissingError, BadInputError: if `encoder.json` of a run folder is missing or broken.
    """
    if isinstance(spec, ModelSpec):
        return spec if weights is None else replace(spec, weights=Path(weights))
    if not isinstance(spec, str | os.PathLike):
        raise UsageError(
            f"A model is named by a spec, not by a {type(spec).__name__}. Write {_FORMS}. For a module, name a "
            f"function that returns it."
        )
    spec = os.fspath(spec).strip()
    text, _, query = spec.partition("?")
    body = next((parsed for parser in _PARSERS if (parsed := parser(text, spec))), None)
    if body is None:
        raise _unknown_form(text, spec)
    entry, base = body.entry, body.base
    takes = tuple(o for o in _OPTIONS[body.kind] if base is None or o in (*_OPTIONS[base.kind], "branch"))
    options = _split_options("&".join(filter(None, (body.options, query))), takes, spec)
    if "seed" in options and options.get("pretrained") != "false":
        raise UsageError(f"Model spec {spec!r}: seed is for random weights; add pretrained=false.")
    own = {key: text for key, text in sorted(options.items()) if entry is None or f"{key}={text}" not in entry.spec}
    fields: dict[str, Any] = {"pos_interp": entry.pos_interp} if entry else {}
    if base:
        fields = {name: getattr(base, name) for name in ("layers", "final_norm", "pos_interp")}
    fields |= {key: _READERS[key](key, text, spec) for key, text in options.items()}
    return ModelSpec(
        name=body.name + ("?" + "&".join(f"{key}={text}" for key, text in own.items()) if own else ""),
        kind=body.kind,
        target=body.target,
        entry=entry,
        origin=body.origin,
        options=options,
        base=base,
        takes=takes,
        weights=None if weights is None else Path(weights),
        **fields,
    )


@dataclass(frozen=True)
class _Body:
    """The parsed text before the question mark. options: those of the zoo entry."""

    name: str
    kind: str
    target: str
    entry: ZooEntry | None = None
    origin: str = ""
    options: str = ""
    base: ModelSpec | None = None


def _parse_run_folder(text: str, spec: str) -> _Body | None:
    if not is_run_folder(text):
        return None
    folder = text.rstrip("/") or text
    return _Body(folder, "run", folder, base=base_of(Path(folder)))


_TARGETS = {"timm": ".+", "hub": ".+:[^:]+", "hf": ".+"}  # by scheme, a pattern for the text after it


def _parse_scheme(text: str, spec: str) -> _Body | None:
    scheme, _, target = text.partition(":")
    if scheme not in _TARGETS:
        return None
    if not re.fullmatch(_TARGETS[scheme], target):
        raise UsageError(f"Model spec {spec!r} is incomplete: write {_FORMS}.")
    return _Body(text, scheme, target)


def _parse_python_file(text: str, spec: str) -> _Body | None:
    file, _, factory = text.partition(":")
    if not file.endswith(".py"):
        return None
    if not factory:
        raise UsageError(f"Model spec {spec!r} names no factory: write {text}:FACTORY.{functions_in(Path(text))}")
    return _Body(text, "file", text)


def _parse_registered_name(text: str, spec: str) -> _Body | None:
    if "/" in text or ":" in text or (os.path.isdir(text) and text not in models()):
        return None
    name = aliases().get(text, text)
    if name not in models() and _is_in_timm(name):
        raise UsageError(f"Unknown model {text!r}, but timm has a model with this name: write timm:{spec}.")
    registered = models().entry(name)
    entry = zoo().get(name)
    target, _, options = registered.value.partition("?")
    kind, _, named = target.partition(":")
    if kind in _TARGETS:
        return _Body(name, kind, named, entry, registered.origin, options)
    return _Body(name, "code", registered.value, entry, registered.origin)


def _is_in_timm(name: str) -> bool:
    try:
        import timm  # slow, but only used before an error
    except ImportError:
        return False
    return bool(timm.is_model(name.partition(".")[0]))


# Tried in this order. Each returns None for text of another form.
_PARSERS: Sequence[Callable[[str, str], _Body | None]] = (
    _parse_run_folder,
    _parse_scheme,
    _parse_python_file,
    _parse_registered_name,
)


def _unknown_form(text: str, spec: str) -> NecoBenchError:
    if os.path.isdir(text):
        return MissingError(
            f"Folder {text} contains no trained encoder (no {RUN_FILE}). If a training run writes there, it has not "
            f"saved a checkpoint yet. Use hf:{text} for a folder of transformers, hub:{text}:ENTRY for torch.hub."
        )
    return UsageError(f"Model spec {spec!r} has none of the known forms: {_FORMS}.")


def _split_options(query: str, takes: tuple[str, ...], spec: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, _, text = part.partition("=")
        if key not in takes:
            raise UsageError(
                f"Model spec {spec!r}: unknown option {key!r} for this kind of model; "
                f"it takes {', '.join(takes)}.{did_you_mean(key, takes)}"
            )
        options[key] = text.lower() if _READERS[key] is _read_flag else text  # Python writes True and False
    return options


def _read_choice(key: str, text: str, spec: str, choices: Sequence[str] = POS_INTERP) -> str:
    if text not in choices:
        raise UsageError(f"Model spec {spec!r}: {key}={text!r} must be one of {', '.join(choices)}.")
    return text


def _read_flag(key: str, text: str, spec: str) -> bool:
    return _read_choice(key, text, spec, ("true", "false")) == "true"


def _read_statistic(key: str, text: str, spec: str) -> tuple[float, float, float]:
    """Read three numbers for RGB on [0, 1]; those of `std` must be above 0."""
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError:
        red = green = blue = -1.0
    if not all((0 <= value <= 1) and (value or key == "mean") for value in (red, green, blue)):
        raise UsageError(
            f"Model spec {spec!r}: {key}={text!r} must be three numbers for red, green and blue on the scale of 0 to "
            f"1, such as {'0.485,0.456,0.406' if key == 'mean' else '0.229,0.224,0.225'}."
        )
    return red, green, blue


def _read_seed(key: str, text: str, spec: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < 2**63:
        raise UsageError(f"Model spec {spec!r}: {key}={text!r} must be a whole number from 0 to 2^63 - 1.")
    return number


_READERS: Mapping[str, Callable[[str, str, str], Any]] = {
    "pretrained": _read_flag,
    "seed": _read_seed,
    "branch": lambda _key, text, _spec: text,
    "layers": lambda _key, text, _spec: parse_layers(text),
    "final_norm": _read_flag,
    "pos_interp": _read_choice,
    "mean": _read_statistic,
    "std": _read_statistic,
    "trust": _read_flag,
}


def parse_layers(layers: Layers) -> tuple[int, ...] | None:
    """Read layer indices from None, 11, [3, 6, 9, 11] or "3,6,9,11". Raises `UsageError`."""
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


def functions_in(path: Path) -> str:
    """Return a sentence that lists the functions and classes of a Python file; "" if it cannot be read."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ""
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    return f" It defines: {', '.join(names)}." if names else " It defines no function."


def base_of(folder: Path) -> ModelSpec:
    """Parse the architecture of a run folder, with the layers that the run read.

    Raises `MissingError` and `BadInputError`, whose messages name `encoder.json`.
    """
    run, path = read_run(folder), folder / RUN_FILE
    if is_run_folder(run.base.partition("?")[0]):
        raise BadInputError(f"{path}: base {run.base!r} is itself a run folder; it must be an architecture.")
    try:
        base = parse_spec(run.base)
    except NecoBenchError as error:
        raise BadInputError(f"{path}: base: {error}") from error
    if base.kind == "file" and not Path(base.target.rpartition(":")[0]).is_file():
        raise MissingError(
            f"{path}: base {run.base!r} names a file that does not exist. Run the command in the folder in which the "
            f"encoder was trained, or correct the path."
        )
    return replace(base, layers=run.layers or base.layers)


def branch_of(spec: SpecLike) -> str | None:
    """Return which of a run's two encoders a spec selects, "student" or "teacher"; None if there are not two.

    Raises the errors of `parse_spec`.
    """
    model = parse_spec(spec)
    if model.kind != "run" or read_run(Path(model.target)).teacher is None:
        return None
    return model.branch or "student"


def architecture(spec: SpecLike) -> str:
    """Return the spec of a model's architecture without weights, which `encoder.json` records as `base`.

    It contains layers, final norm and position interpolation if they are not the default, but no options that select
    weights (pretrained, seed, branch). A zoo name becomes its `timm:` or `hub:` spec, so that later changes to the zoo
    do not affect it; a run folder becomes its base. Raises the errors of `parse_spec`.
    """
    model = parse_spec(spec)
    base = model.base or model
    if base.kind in _TARGETS:
        body = f"{base.kind}:{base.target}"
    else:
        body = base.target if base.kind == "file" else base.name.partition("?")[0]
    options = {
        "final_norm": "" if model.final_norm else "false",
        "layers": ",".join(map(str, model.layers or ())),
        "pos_interp": model.pos_interp if model.pos_interp in POS_INTERP[1:] else "",
    }
    query = "&".join(f"{key}={text}" for key, text in options.items() if text)
    return body + (f"?{query}" if query else "")


def training_of(model: ModelSpec) -> tuple[str, Mapping[str, str]]:
    """Return the training data of a model's weights as text, and their overlap with data sets (`ZooEntry.overlap`).

    The training data of given weights is known only if they are the official file of a zoo entry; that of user code
    only if its encoder declares `training_data`. Raises `MissingError`.
    """
    file, entry = model.weights, model.entry
    if file is None:
        if model.kind == "run":
            run = read_run(Path(model.target))
            return run.training_data, run.overlap
        if model.kind == "timm" and not model.pretrained:
            return "none", {}
        if entry and entry.sha256 and entry.weights_file and entry.weights_file.is_file():
            file = entry.weights_file
    if file is not None:
        sha256 = file_sha256(file) if file.is_file() else ""
        entry = next((entry for entry in zoo().values() if entry.sha256 == sha256), None)
    return (entry.training_data, entry.overlap) if entry else ("", UNKNOWN)


def is_official(model: ModelSpec, source: str) -> bool | None:
    """Return whether a model's weights are the official file of the zoo entry.

    False if the sha256 of that file is not known yet; None if the name has no official weights.

    Args:
        source: the file that was loaded, if no zoo entry names it.
    """
    entry = model.entry
    if entry is None or (model.weights is None and not (model.pretrained and entry.has_official_weights)):
        return None
    file = model.weights or entry.weights_file or Path(source)
    return entry.sha256 is not None and file.is_file() and file_sha256(file) == entry.sha256


def needs_loading(model: ModelSpec) -> bool:
    """Return whether the weights are only known after loading, because code runs that may read any file."""
    if model.base is not None:
        return needs_loading(model.base)
    return model.kind in ("file", "hub") or (model.kind == "code" and model.origin != BUILTIN)


def model_info(spec: SpecLike) -> dict[str, Any]:
    """Return facts about a spec without loading it: name, kind, target, origin and options.

    Zoo entries have all their fields, run folders all fields of `encoder.json`. `weights_file` is the expected path of
    the file, and `weights_in_place` whether it exists. Raises the errors of `parse_spec`.
    """
    model = parse_spec(spec)
    facts: dict[str, Any] = {
        "name": model.name,
        "kind": model.kind,
        "target": model.target,
        "origin": model.origin,
        "options": dict(model.options),
    }
    file = None
    if model.kind == "run":
        run = read_run(Path(model.target))
        file = run.file_of(Path(model.target), model.branch)
        facts |= run.model_dump()
    elif model.entry is not None:
        file = model.entry.weights_file
        facts |= asdict(model.entry)
    if model.entry or file:
        facts |= {"weights_file": file and str(file), "weights_in_place": bool(file and file.is_file())}
    return facts
