"""Content ids of models, which are part of the keys of results and features. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neco_bench.core.files import MODEL_FILES, content_sha256, digest, file_sha256
from neco_bench.encoders.run_folder import RUN_FILE, weights_file
from neco_bench.encoders.spec import ModelSpec, SpecLike, needs_loading, parse_spec
from neco_bench.encoders.zoo import weights_folder

if TYPE_CHECKING:
    from neco_bench.encoders.base import Encoder

PACKAGES = ("neco_bench", "torch", "torchvision", "timm", "transformers")


def content_id(spec: SpecLike, weights: str | Path | None = None) -> str:
    """Compute the sha256 of a model's parts, without loading it.

    It covers the spec with its options, the settings of the zoo entry, and the contents of files: the weights file
    (given, or the zoo's if it exists), the Python file with the files next to it, or the local folder. For models from
    elsewhere, it covers the commit of the Hugging Face repository in the cache, or the version of the package that
    defines the model. For a run folder, it covers `encoder.json`, the weights of the branch, and the content id of its
    architecture, but not its path.

    The id changes when `load_encoder` downloads files, so store the id computed after loading. If `needs_loading` is
    true, the id covers only the code, which may load other weights; `loaded_id` distinguishes those.

    Raises:
        UsageError: for an unknown name or option.
        MissingError: if a file does not exist.
    """
    model = parse_spec(spec, weights)
    # The settings of a zoo entry that affect features; its notes, licence and so on do not.
    settings = ("spec", "weights", "pos_interp", "drop_registers", "mean", "std")
    facts: dict[str, Any] = {
        "kind": model.kind,
        "target": model.target,
        "options": sorted(model.options.items()),
        "entry": [getattr(model.entry, name) for name in settings] if model.entry else None,
    }
    facts |= _weights_facts(model) | _code_facts(model)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def loaded_id(spec: SpecLike, weights: Path | None, encoder: Encoder) -> str:
    """Compute the content id of a model after its encoder was loaded, including files downloaded for it.

    If `needs_loading` is true, it covers the encoder's weights and the code of its modules. Raises the errors of
    `content_id`.
    """
    model = parse_spec(spec, weights)
    identity = content_id(model)
    if not needs_loading(model):
        return identity
    facts = [encoder.weights_id, encoder.embed_dim, encoder.stride, encoder.mean, encoder.std, encoder.pos_interp]
    return digest([identity, facts, _module_sources(encoder, unreadable="")])


def object_id(encoder: Encoder) -> str:
    """Compute the content id of an Encoder object from its weights, code and settings of the features."""
    # These import torch, which is already imported if there is an Encoder.
    from neco_bench.encoders.adapters.user_code import check_has_values
    from neco_bench.encoders.weights import state_sha256

    check_has_values(encoder, f"The encoder {encoder.name!r}")
    names = ("weights_id", "embed_dim", "stride", "mean", "std", "layer", "final_norm", "pos_interp", "precision")
    facts = {name: getattr(encoder, name) for name in names}
    state = state_sha256(encoder, whole=True)  # because user code may give several encoders the same weights_id
    return digest({"device": encoder.device.type, "code": _module_sources(encoder), "state": state} | facts)


def version_of(package: str) -> str:
    """Return the version of an installed distribution, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _weights_facts(model: ModelSpec) -> dict[str, Any]:
    """Return the part of a content id for existing weights files; for a run folder, also for its architecture."""
    if model.base is not None:
        folder = Path(model.target)
        base = replace(model.base, weights=model.weights or weights_file(folder, model.branch))
        return {"target": "", "run": file_sha256(folder / RUN_FILE), "base": content_id(base)}
    if model.weights is not None:
        return {"weights": content_sha256(model.weights)}
    if not model.pretrained:
        return {}
    if model.entry and (file := model.entry.weights_file):
        return {"weights": file_sha256(file)} if file.is_file() else {}
    if model.kind == "timm":  # timm's own weights, in a folder with the model's name and tag
        folder = weights_folder(model.target)
        folders = [folder, *folder.parent.glob(f"{model.target}.*")]
        return {
            "weights": [file_sha256(file) for place in folders for file in sorted(place.glob("*")) if file.is_file()],
            "commits": _cached_commits(f"timm--{model.target}", f"timm--{model.target}.*"),
        }
    return {}


def _code_facts(model: ModelSpec) -> dict[str, Any]:
    """Return the part of a content id for the code that builds the model: files, a folder, a commit or a version."""
    if model.kind == "file":
        path, _, attribute = model.target.rpartition(":")
        return {"target": f"{Path(path).name}:{attribute}", "code": _sources_beside(Path(path))}
    if model.kind == "code":
        return {"code": _package_facts(model)}
    if model.kind == "timm":
        return {"version": version_of("timm")}
    if model.kind == "hub":
        folder = Path(model.target.rpartition(":")[0]).expanduser()
        return {"version": version_of("torch")} | ({"folder": _model_files(folder)} if folder.is_dir() else {})
    if model.kind == "hf":
        folder = Path(model.target).expanduser()
        if folder.is_dir():
            return {"version": version_of("transformers"), "folder": _model_files(folder)}
        return {"version": version_of("transformers"), "commits": _cached_commits(model.target.replace("/", "--"))}
    return {}


def _model_files(folder: Path) -> dict[str, str]:
    """Return the sha256, by path, of code, configuration and weights in a folder."""
    files = sorted(file for file in folder.rglob("*") if MODEL_FILES.fullmatch(file.name))
    return {str(file.relative_to(folder)): file_sha256(file) for file in files}


def _cached_commits(*patterns: str) -> list[str]:
    """Return the cached commits of the main branches of Hugging Face repositories (patterns of OWNER--NAME)."""
    from huggingface_hub.constants import HF_HUB_CACHE  # slow to import

    files = {file for pattern in patterns for file in Path(HF_HUB_CACHE).glob(f"models--{pattern}/refs/main")}
    return [f"{file.parents[1].name} {file.read_text(encoding='utf-8').strip()}" for file in sorted(files)]


def _package_facts(model: ModelSpec) -> dict[str, Any]:
    """Return package, version and source files of a registered function, without importing its module."""
    top = importlib.util.find_spec(model.target.partition(":")[0].partition(".")[0])
    sources: dict[str, str] = {}
    origin = Path(top.origin) if top and top.origin else None
    if origin and origin.name != "__init__.py":
        sources = {origin.name: file_sha256(origin)}
    else:
        for folder in [origin.parent] if origin else map(Path, (top and top.submodule_search_locations) or []):
            sources |= {str(file.relative_to(folder)): file_sha256(file) for file in sorted(folder.rglob("*.py"))}
    return {"package": model.origin, "version": version_of(model.origin), "sources": sources}


def _sources_beside(path: Path) -> dict[str, str]:
    """Return the sha256, by path, of a Python file and of the files and packages next to it, which it may import."""
    packages = (package.parent.rglob("*.py") for package in path.parent.glob("*/__init__.py"))
    files = {path, *path.parent.glob("*.py"), *(file for package in packages for file in package)}
    return {str(file.relative_to(path.parent)): file_sha256(file) for file in sorted(files)}


def _module_sources(encoder: Encoder, unreadable: str | None = None) -> dict[str, str]:
    """Return the source code of each module class in an encoder, except those of `PACKAGES`, whose versions are known.

    unreadable: replaces code that cannot be read, such as code typed in a console; None: a new random text each time.
    """
    sources = {}
    for kind in {type(module) for module in encoder.modules()}:
        if kind.__module__.partition(".")[0] not in PACKAGES:
            # The module name of a user's file depends on its path.
            module = "" if kind.__module__.startswith("neco_bench_user_") else kind.__module__
            name = f"{module}.{kind.__qualname__}"
            try:
                sources[name] = inspect.getsource(kind)
            except (OSError, TypeError):
                sources[name] = uuid.uuid4().hex if unreadable is None else unreadable
    return sources
