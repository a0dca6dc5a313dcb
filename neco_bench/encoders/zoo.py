"""The model zoo, and how models are named: reading specs, listing, and the identity of what a spec asks for.

Importing this module imports no torch. `zoo.toml` beside it holds the facts.

    neco_dinov2                                     a zoo name, or a name that an installed package adds
    timm:NAME                                       any timm model with dense features
    hub:OWNER/REPO:ENTRY                            a torch.hub entry, or a local folder in place of OWNER/REPO
    hf:ID                                           a transformers model, or a local folder
    path/to/file.py:FACTORY                         a function of one's own
    path/to/run                                     what a training run left in its folder

Options follow a question mark, as in `timm:NAME?pretrained=false&seed=0`:

    pretrained=true|false    seed=N (for pretrained=false)    branch=student|teacher (where there are both)
    layers=3,6,9,11          final_norm=true|false            pos_interp=timm|scale_offset|size_antialias
    mean=R,G,B  std=R,G,B    statistics on [0, 1] of the weights in use       trust=true (hub: runs its code)
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from neco_bench.cache import cache_dir
from neco_bench.errors import BadInputError, MissingError, UsageError, did_you_mean
from neco_bench.registry import Registry
from neco_bench.toml import read_toml

Layers = int | str | Sequence[int] | None

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # option: torch's name
POS_INTERP = ("timm", "scale_offset", "size_antialias")
SPEC_OPTIONS = {
    "timm": ("pretrained", "seed", "branch", "layers", "final_norm", "pos_interp", "mean", "std"),
    "hub": ("trust", "pretrained", "branch", "layers", "final_norm", "mean", "std"),
    "hf": ("layers", "final_norm", "mean", "std"),
    "file": ("branch",),
    "code": ("branch",),
    "run": ("branch", "layers", "final_norm", "trust"),  # but for the first, where the architecture takes them
}
RUN_FILE = "encoder.json"  # in the folder of a training run; `encoders.run_folder` reads it
_FORMS = (
    "a zoo name (see `neco-bench models`), timm:NAME, hub:OWNER/REPO:ENTRY, hf:ID, path/to/file.py:FACTORY "
    "or the folder of a training run"
)
_FILE = Path(__file__).with_name("zoo.toml")


@dataclass(frozen=True)
class ZooEntry:
    """One named encoder. `zoo.toml` says what each field means."""

    id: str
    spec: str
    source: str
    licence: str
    citation: str
    training_data: str
    embed_dim: int
    stride: int
    params_m: float
    pos_interp: str
    weights: str | None = None
    drop_registers: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    aliases: tuple[str, ...] = ()
    notes: str = ""
    overlap: Mapping[str, str] = field(default_factory=dict)
    family: str = field(default="", repr=False)

    @property
    def weights_file(self) -> Path | None:
        """Where the weights file belongs, whether or not it is there; None for entries without one."""
        if self.weights is None:
            return None
        return _FILE.parent / self.weights if self.packaged else weights_folder(self.id) / Path(self.weights).name

    @property
    def packaged(self) -> bool:
        """Is the weights file part of this package, beside `zoo.toml`?"""
        return self.weights is not None and "://" not in self.weights


def weights_folder(model: str) -> Path:
    """The folder for weights files of one model: `<cache>/weights/<model>`."""
    return cache_dir() / "weights" / model


@cache
def zoo() -> dict[str, ZooEntry]:
    """All entries by id. Raises `BadInputError` where `zoo.toml` has an unknown or missing field."""
    document = read_toml(_FILE)
    known = {f.name for f in fields(ZooEntry)} | {"teacher"}
    entries: dict[str, ZooEntry] = {}
    for name, own in document["model"].items():
        facts: dict[str, Any] = {**document["family"].get(own.get("family"), {}), **own}
        if unknown := facts.keys() - known:
            raise BadInputError(f"{_FILE}: model {name!r} has unknown fields {sorted(unknown)}.")
        teacher = facts.pop("teacher", None)
        facts.update({key: tuple(facts[key]) for key in ("mean", "std", "aliases") if key in facts})
        try:
            entries[name] = ZooEntry(id=name, **facts)
        except TypeError as error:
            raise BadInputError(f"{_FILE}: model {name!r}: {error}.") from error
        if teacher:
            entries[f"{name}_teacher"] = replace(
                entries[name], id=f"{name}_teacher", weights=teacher, aliases=(), notes="The teacher (moving average)."
            )
    return entries


@cache
def aliases() -> dict[str, str]:
    """Other names of zoo entries, to their ids."""
    return {alias: entry.id for entry in zoo().values() for alias in entry.aliases}


@cache
def models() -> Registry[Any]:
    """All model names: the zoo's, their aliases, and those of third-party entry points."""
    specs = {entry.id: entry.spec for entry in zoo().values()}
    specs.update({alias: specs[name] for alias, name in aliases().items()})
    return Registry("model", "neco_bench.encoders", specs, listing="neco-bench models")


@dataclass(frozen=True)
class Request:
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
    base: Request | None = None
    takes: tuple[str, ...] = ()


def is_run_folder(body: str) -> bool:
    """Is the part of a spec before its options the folder of a training run with an encoder in it?"""
    return bool(body) and os.path.isfile(os.path.join(body, RUN_FILE))


def parse_spec(spec: str) -> Request:
    """Read a spec. Raises `UsageError` for an unknown name or option, with the nearest known ones.

    Of run folders it reads `encoder.json`: `MissingError` for a folder without, `BadInputError` for a broken one.
    """
    body, _, query = str(spec).strip().partition("?")
    scheme, _, rest = body.partition(":")
    entry, origin, base = None, "", None
    if is_run_folder(body):
        from neco_bench.encoders.run_folder import base_of

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
    return Request(
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
        "branch": ("student", "teacher"),
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


def describe_models() -> list[dict[str, Any]]:
    """One row for each model name, without loading any: the zoo's entries, then those of installed packages."""
    rows = []
    for entry in models().entries().values():
        facts = zoo().get(entry.name)
        if entry.name in aliases():
            continue
        file = facts.weights_file if facts else None
        absent = "missing" if facts and facts.packaged else "to fetch"
        rows.append(
            {
                "model": entry.name,
                "spec": entry.value,
                "origin": entry.origin,
                "embed_dim": facts.embed_dim if facts else "",
                "stride": facts.stride if facts else "",
                "params_m": facts.params_m if facts else "",
                "weights": "" if file is None else "here" if file.is_file() else absent,
                "training_data": facts.training_data if facts else "",
                "licence": facts.licence if facts else "",
                "problem": "" if facts else entry.problem,
            }
        )
    return rows


def contamination(spec: str, weights: object, images_from: str) -> str:
    """What is known of an encoder's training images against a source of evaluation images: "none known", "seen",
    "near", "possible", or "unknown" for anything that is not an encoder of the zoo with its own weights."""
    own = weights or is_run_folder(spec.partition("?")[0])
    entry = None if own else zoo().get(aliases().get(spec, spec))
    return "unknown" if entry is None else entry.overlap.get(images_from, entry.overlap.get("*", "none known"))


def functions_in(path: Path) -> str:
    """A sentence with the functions and classes at the top level of a Python file, or an empty string."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ""
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    return f" It defines: {', '.join(names)}." if names else " It defines no function."


def describe(spec: str) -> dict[str, Any]:
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


def request_id(spec: str, weights: str | Path | None = None) -> str:
    """The sha256 of what is asked for, without loading it: the resume key's share of the model.

    It covers the spec with its options, and as content: the zoo entry, the weights file (given, or the zoo's own once
    it is in place), the Python file with those beside it, the local folder, or the version of the package that defines
    the model; of a run folder `encoder.json`, the weights of the branch, and the same of its architecture, but not its
    place. A zoo file that is first fetched by `load_encoder` changes the id, so store the id taken after loading.
    Raises `UsageError` (unknown name or option) and `MissingError` (a file that is not there).
    """
    request = parse_spec(spec)
    facts: dict[str, Any] = {
        "kind": request.kind,
        "target": request.target,
        "options": sorted(request.options.items()),
        "entry": asdict(request.entry) if request.entry else None,
    }
    if request.base is not None:
        from neco_bench.encoders.run_folder import weights_file

        folder = Path(request.target)
        used = weights_file(folder, request.branch) if weights is None else Path(weights)
        facts |= {"target": "", "run": file_sha256(folder / RUN_FILE), "base": request_id(request.base.name, used)}
    elif weights is not None:
        facts["weights"] = file_sha256(Path(weights))
    elif request.entry and request.pretrained and (file := request.entry.weights_file):
        if file.is_file():
            facts["weights"] = file_sha256(file)
    elif request.kind == "timm" and request.pretrained:  # timm's own, in a folder of the name with its tag
        places = [weights_folder(request.target), *weights_folder(request.target).parent.glob(f"{request.target}.*")]
        facts["weights"] = [file_sha256(file) for place in places for file in sorted(place.glob("*")) if file.is_file()]
    if request.kind == "file":
        facts |= {
            "target": request.target.rpartition(":")[2],
            "code": _sources(Path(request.target.rpartition(":")[0])),
        }
    elif request.kind == "code":
        facts["code"] = _code_identity(request)
    elif request.kind != "run":
        folder = Path(request.target.rpartition(":")[0] if request.kind == "hub" else request.target).expanduser()
        package = {"timm": "timm", "hub": "torch", "hf": "transformers"}[request.kind]
        if request.kind != "timm" and folder.is_dir():
            facts["folder"] = {
                str(file.relative_to(folder)): file_sha256(file)
                for file in sorted(folder.rglob("*"))
                if _MODEL_FILES.fullmatch(file.name)
            }
        facts["version"] = _version(package)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


_MODEL_FILES = re.compile(r".+\.(py|json|ya?ml|toml|safetensors|bin|pth|pt|ckpt|npz|npy)")


def _code_identity(request: Request) -> dict[str, Any]:
    """Package and version of a plug-in, and its source files (found without importing its module)."""
    top = importlib.util.find_spec(request.target.partition(":")[0].partition(".")[0])
    sources: dict[str, str] = {}
    origin = Path(top.origin) if top and top.origin else None
    if origin and origin.name != "__init__.py":
        sources = {origin.name: file_sha256(origin)}
    else:
        for folder in [origin.parent] if origin else map(Path, (top and top.submodule_search_locations) or []):
            sources |= {str(file.relative_to(folder)): file_sha256(file) for file in sorted(folder.rglob("*.py"))}
    return {"package": request.origin, "version": _version(request.origin), "sources": sources}


def _sources(file: Path) -> dict[str, str]:
    """What a Python file and all that it may import from beside it hold: files, and packages with all below."""
    packages = (package.parent.rglob("*.py") for package in file.parent.glob("*/__init__.py"))
    files = {file, *file.parent.glob("*.py"), *(below for package in packages for below in package)}
    return {str(found.relative_to(file.parent)): file_sha256(found) for found in sorted(files)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal. Raises `MissingError`."""
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise MissingError(f"{path} could not be read: {error.strerror or error}.") from error
    return digest.hexdigest()
