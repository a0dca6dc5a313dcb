"""What encoders that are loaded are known by in content keys; `zoo.request_id` says it of specs. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neco_bench.core.files import _MODEL_FILES, content_sha256, digest, file_sha256
from neco_bench.encoders.run_folder import RUN_FILE
from neco_bench.encoders.spec import ModelSpec, needs_loading, parse_spec
from neco_bench.encoders.zoo import weights_folder

if TYPE_CHECKING:
    from neco_bench.encoders.base import Encoder

PACKAGES = ("neco_bench", "torch", "torchvision", "timm", "transformers")


def object_id(encoder: Encoder) -> str:
    """The content id of an Encoder object: weights, code, and how features are read from it."""
    from neco_bench.encoders.adapters.user_code import check_has_values
    from neco_bench.encoders.weights import state_sha256

    check_has_values(encoder, f"The encoder {encoder.name!r}")
    facts = ("weights_id", "embed_dim", "stride", "mean", "std", "layer", "final_norm", "pos_interp", "precision")
    known = {fact: getattr(encoder, fact) for fact in facts}
    state = state_sha256(encoder, whole=True)  # an author's own weights_id may be the same for several
    return digest({"device": encoder.device.type, "code": _code(encoder), "state": state} | known)


def loaded_id(spec: str, weights: Path | None, encoder: Encoder) -> str:
    """The content id of a spec once its encoder is loaded: with files that were fetched for it, and, where
    `needs_loading` holds, with its weights and the code of its modules. Raises as `content_id`."""
    identity = content_id(spec, weights)
    if not needs_loading(parse_spec(spec)):
        return identity
    facts = [encoder.weights_id, encoder.embed_dim, encoder.stride, encoder.mean, encoder.std, encoder.pos_interp]
    return digest([identity, facts, _code(encoder, unread="")])


def _code(encoder: Encoder, unread: str | None = None) -> dict[str, str]:
    """Source of each class of modules in it, but for packages, whose versions are known. unread: what stands for code
    that cannot be read (it was typed in); None: it is never the same."""
    sources = {}
    for kind in {type(module) for module in encoder.modules()}:
        if kind.__module__.partition(".")[0] not in PACKAGES:
            module = "" if kind.__module__.startswith("neco_bench_user_") else kind.__module__  # which names the place
            name = f"{module}.{kind.__qualname__}"
            try:
                sources[name] = inspect.getsource(kind)
            except (OSError, TypeError):
                sources[name] = uuid.uuid4().hex if unread is None else unread
    return sources


def content_id(spec: str, weights: str | Path | None = None) -> str:
    """The sha256 of what is asked for, without loading it: the resume key's share of the model.

    It covers the spec with its options, and as content: what the zoo says of the model, the weights file (given, or the
    zoo's own once it is in place), the Python file by its name and with those beside it, the local folder, the commit
    of a Hugging Face repository in the cache, or the version of the package that defines the model; of a run folder
    `encoder.json`, the weights of the branch, and the same of its architecture, but not its place. What is first
    fetched by `load_encoder` changes the id, so store the id taken after loading. Where `needs_loading` holds it stands
    for the code, which may load other weights: `identity.loaded_id` tells those apart.
    Raises `UsageError` (unknown name or option) and `MissingError` (a file that is not there).
    """
    request = parse_spec(spec)
    facts: dict[str, Any] = {
        "kind": request.kind,
        "target": request.target,
        "options": sorted(request.options.items()),
        "entry": [getattr(request.entry, fact) for fact in _MOVING] if request.entry else None,
    }
    if request.base is not None:
        from neco_bench.encoders.run_folder import weights_file

        folder = Path(request.target)
        used = weights_file(folder, request.branch) if weights is None else Path(weights)
        facts |= {"target": "", "run": file_sha256(folder / RUN_FILE), "base": content_id(request.base.name, used)}
    elif weights is not None:
        facts["weights"] = content_sha256(Path(weights))
    elif request.entry and request.pretrained and (file := request.entry.weights_file):
        if file.is_file():
            facts["weights"] = file_sha256(file)
    elif request.kind == "timm" and request.pretrained:  # timm's own, in a folder of the name with its tag
        places = [weights_folder(request.target), *weights_folder(request.target).parent.glob(f"{request.target}.*")]
        facts["weights"] = [file_sha256(file) for place in places for file in sorted(place.glob("*")) if file.is_file()]
        facts["commits"] = _cached_commits(f"timm--{request.target}", f"timm--{request.target}.*")
    if request.kind == "file":
        path, _, attribute = request.target.rpartition(":")
        facts |= {"target": f"{Path(path).name}:{attribute}", "code": _sources(Path(path))}
    elif request.kind == "code":
        facts["code"] = _code_identity(request)
    elif request.kind != "run":
        folder = Path(request.target.rpartition(":")[0] if request.kind == "hub" else request.target).expanduser()
        package = {"timm": "timm", "hub": "torch", "hf": "transformers"}[request.kind]
        if request.kind == "hf" and not folder.is_dir():
            facts["commits"] = _cached_commits(request.target.replace("/", "--"))
        elif request.kind != "timm" and folder.is_dir():
            facts["folder"] = {
                str(file.relative_to(folder)): file_sha256(file)
                for file in sorted(folder.rglob("*"))
                if _MODEL_FILES.fullmatch(file.name)
            }
        facts["version"] = version_of(package)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# What the zoo says of an entry that moves a number; its notes, licence and the like do not.
_MOVING = ("spec", "weights", "pos_interp", "drop_registers", "mean", "std")


def _cached_commits(*patterns: str) -> list[str]:
    """The commits of the Hugging Face repositories OWNER--NAME that its cache has as their main branch."""
    from huggingface_hub.constants import HF_HUB_CACHE  # no torch, but slow to import

    found = {file for pattern in patterns for file in Path(HF_HUB_CACHE).glob(f"models--{pattern}/refs/main")}
    return [f"{file.parents[1].name} {file.read_text(encoding='utf-8').strip()}" for file in sorted(found)]


def _code_identity(request: ModelSpec) -> dict[str, Any]:
    """Package and version of a plug-in, and its source files (found without importing its module)."""
    top = importlib.util.find_spec(request.target.partition(":")[0].partition(".")[0])
    sources: dict[str, str] = {}
    origin = Path(top.origin) if top and top.origin else None
    if origin and origin.name != "__init__.py":
        sources = {origin.name: file_sha256(origin)}
    else:
        for folder in [origin.parent] if origin else map(Path, (top and top.submodule_search_locations) or []):
            sources |= {str(file.relative_to(folder)): file_sha256(file) for file in sorted(folder.rglob("*.py"))}
    return {"package": request.origin, "version": version_of(request.origin), "sources": sources}


def _sources(file: Path) -> dict[str, str]:
    """What a Python file and all that it may import from beside it hold: files, and packages with all below."""
    packages = (package.parent.rglob("*.py") for package in file.parent.glob("*/__init__.py"))
    files = {file, *file.parent.glob("*.py"), *(below for package in packages for below in package)}
    return {str(found.relative_to(file.parent)): file_sha256(found) for found in sorted(files)}


def version_of(package: str) -> str:
    """The version of an installed distribution, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
