"""Content ids of models: what stands for a model in the keys of results and features. Imports no torch."""

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

# What the zoo says of an entry that moves a number; its notes, licence and the like do not.
_NUMERIC_FACTS = ("spec", "weights", "pos_interp", "drop_registers", "mean", "std")


def content_id(spec: SpecLike, weights: str | Path | None = None) -> str:
    """Compute the sha256 of what a model consists of, without loading it: its share of the keys of results.

    It covers the spec with its options, and as content: what the zoo says of the model, the weights file (given, or the
    zoo's own once it is in place), the Python file by its name and with those beside it, the local folder, the commit
    of a Hugging Face repository in the cache, or the version of the package that defines the model; of a run folder
    `encoder.json`, the weights of the branch, and the same of its architecture, but not its place.

    What `load_encoder` fetches changes the id, so store the one taken after loading. Where `needs_loading` holds it
    stands for the code, which may load other weights: `loaded_id` tells those apart.

    Raises:
        UsageError: an unknown name or option.
        MissingError: a file that is not there.
    """
    model = parse_spec(spec, weights)
    facts: dict[str, Any] = {
        "kind": model.kind,
        "target": model.target,
        "options": sorted(model.options.items()),
        "entry": [getattr(model.entry, fact) for fact in _NUMERIC_FACTS] if model.entry else None,
    }
    facts |= _weights_facts(model) | _code_facts(model)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def loaded_id(spec: SpecLike, weights: Path | None, encoder: Encoder) -> str:
    """Compute the content id of a model once its encoder is loaded, with files that were fetched for it.

    Where `needs_loading` holds it covers the encoder's weights and the code of its modules. Raises as `content_id`.
    """
    model = parse_spec(spec, weights)
    identity = content_id(model)
    if not needs_loading(model):
        return identity
    facts = [encoder.weights_id, encoder.embed_dim, encoder.stride, encoder.mean, encoder.std, encoder.pos_interp]
    return digest([identity, facts, _module_sources(encoder, unreadable="")])


def object_id(encoder: Encoder) -> str:
    """Compute the content id of an Encoder object: weights, code, and how features are read from it."""
    # These import torch, which whoever has an Encoder has imported already.
    from neco_bench.encoders.adapters.user_code import check_has_values
    from neco_bench.encoders.weights import state_sha256

    check_has_values(encoder, f"The encoder {encoder.name!r}")
    names = ("weights_id", "embed_dim", "stride", "mean", "std", "layer", "final_norm", "pos_interp", "precision")
    facts = {name: getattr(encoder, name) for name in names}
    state = state_sha256(encoder, whole=True)  # an author's own weights_id may be the same for several
    return digest({"device": encoder.device.type, "code": _module_sources(encoder), "state": state} | facts)


def version_of(package: str) -> str:
    """Return the version of an installed distribution, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _weights_facts(model: ModelSpec) -> dict[str, Any]:
    """The weights' share of a content id, of files that are in place; of a run folder its architecture's too."""
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
    if model.kind == "timm":  # timm's own, in a folder of the name with its tag
        folder = weights_folder(model.target)
        folders = [folder, *folder.parent.glob(f"{model.target}.*")]
        return {
            "weights": [file_sha256(file) for place in folders for file in sorted(place.glob("*")) if file.is_file()],
            "commits": _cached_commits(f"timm--{model.target}", f"timm--{model.target}.*"),
        }
    return {}


def _code_facts(model: ModelSpec) -> dict[str, Any]:
    """The share of the code that builds a model in its content id: files, a folder, a commit or a version."""
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
    """Code, configuration and weights in a folder: sha256 by path."""
    files = sorted(file for file in folder.rglob("*") if MODEL_FILES.fullmatch(file.name))
    return {str(file.relative_to(folder)): file_sha256(file) for file in files}


def _cached_commits(*patterns: str) -> list[str]:
    """The commits of the Hugging Face repositories OWNER--NAME that its cache has as their main branch."""
    from huggingface_hub.constants import HF_HUB_CACHE  # slow to import

    files = {file for pattern in patterns for file in Path(HF_HUB_CACHE).glob(f"models--{pattern}/refs/main")}
    return [f"{file.parents[1].name} {file.read_text(encoding='utf-8').strip()}" for file in sorted(files)]


def _package_facts(model: ModelSpec) -> dict[str, Any]:
    """Package and version of a registered function, and its source files, located without importing its module."""
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
    """A Python file and all that it may import from beside it (files, and packages with all below): sha256 by path."""
    packages = (package.parent.rglob("*.py") for package in path.parent.glob("*/__init__.py"))
    files = {path, *path.parent.glob("*.py"), *(file for package in packages for file in package)}
    return {str(file.relative_to(path.parent)): file_sha256(file) for file in sorted(files)}


def _module_sources(encoder: Encoder, unreadable: str | None = None) -> dict[str, str]:
    """The source of each class of modules in an encoder, but for those of `PACKAGES`, whose versions are known.

    unreadable: what stands for code that cannot be read (it was typed in); None: it is never the same.
    """
    sources = {}
    for kind in {type(module) for module in encoder.modules()}:
        if kind.__module__.partition(".")[0] not in PACKAGES:
            module = "" if kind.__module__.startswith("neco_bench_user_") else kind.__module__  # which names the place
            name = f"{module}.{kind.__qualname__}"
            try:
                sources[name] = inspect.getsource(kind)
            except (OSError, TypeError):
                sources[name] = uuid.uuid4().hex if unreadable is None else unreadable
    return sources
