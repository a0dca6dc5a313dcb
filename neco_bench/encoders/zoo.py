"""The model zoo: named encoders, which `zoo.toml` in this folder describes, and their listing. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from neco_bench.core.config import read_toml
from neco_bench.core.errors import BadInputError
from neco_bench.core.paths import cache_dir
from neco_bench.core.registry import Registry

_FILE = Path(__file__).with_name("zoo.toml")


@dataclass(frozen=True)
class ZooEntry:
    """One named encoder. `zoo.toml` describes each field."""

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
    sha256: str | None = None
    drop_registers: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    aliases: tuple[str, ...] = ()
    notes: str = ""
    overlap: Mapping[str, str] = field(default_factory=dict)
    family: str = field(default="", repr=False)

    @property
    def weights_file(self) -> Path | None:
        """Expected path of the weights file, which may not exist; None for entries without one."""
        if self.weights is None:
            return None
        if self.packaged:
            return _FILE.parent / self.weights
        return weights_folder(self.id) / PurePosixPath(urlsplit(self.weights).path).name

    @property
    def packaged(self) -> bool:
        """Whether the weights file is part of this package, next to `zoo.toml`."""
        return self.weights is not None and "://" not in self.weights

    @property
    def has_official_weights(self) -> bool:
        """Whether the name has published weights. False for code and for random weights."""
        return self.spec.startswith(("timm:", "hub:")) and "pretrained=false" not in self.spec


def weights_folder(model: str) -> Path:
    """Return the folder for weights files of one model: `<cache>/weights/<model>`."""
    return cache_dir() / "weights" / model


@cache
def zoo() -> dict[str, ZooEntry]:
    """Read all entries, by id. Raises `BadInputError` if `zoo.toml` has an unknown or missing field."""
    document = read_toml(_FILE)
    known = {f.name for f in fields(ZooEntry)} | {"teacher", "teacher_sha256"}
    entries: dict[str, ZooEntry] = {}
    for name, own in document["model"].items():
        facts: dict[str, Any] = {**document["family"].get(own.get("family"), {}), **own}
        if unknown := facts.keys() - known:
            raise BadInputError(f"{_FILE}: model {name!r} has unknown fields {sorted(unknown)}.")
        teacher, teacher_sha256 = facts.pop("teacher", None), facts.pop("teacher_sha256", None)
        facts.update({key: tuple(facts[key]) for key in ("mean", "std", "aliases") if key in facts})
        try:
            entries[name] = ZooEntry(id=name, **facts)
        except TypeError as error:
            raise BadInputError(f"{_FILE}: model {name!r}: {error}.") from error
        if teacher:
            entries[f"{name}_teacher"] = replace(
                entries[name],
                id=f"{name}_teacher",
                weights=teacher,
                sha256=teacher_sha256,
                aliases=(),
                notes="The teacher (moving average).",
            )
    return entries


@cache
def aliases() -> dict[str, str]:
    """Map other names of zoo entries to their ids."""
    return {alias: entry.id for entry in zoo().values() for alias in entry.aliases}


@cache
def models() -> Registry[Any]:
    """Return all model names: the zoo's, their aliases, and those of third-party entry points."""
    specs = {entry.id: entry.spec for entry in zoo().values()}
    specs.update({alias: specs[name] for alias, name in aliases().items()})
    return Registry("model", "neco_bench.encoders", specs, listing="neco-bench models")


def describe_models() -> list[dict[str, Any]]:
    """Return one row for each model name without loading models: zoo entries, then those of installed packages."""
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


UNKNOWN: Mapping[str, str] = {"*": "unknown"}  # the overlap of weights whose training images are not known


def declared_overlap(training_data: str) -> Mapping[str, str]:
    """Return the overlap of an encoder that declares its training data by names of data sets: "imagenet, coco"."""
    names = [part.strip().lower() for part in training_data.split(",") if part.strip()]
    return dict.fromkeys(names, "seen") if names else UNKNOWN


def contamination(overlap: Mapping[str, str], names: Iterable[str]) -> str:
    """Say what is known of an encoder's training images and a data set of these names.

    Returns "none known", "seen", "near", "possible" or "unknown", as in `zoo.toml`.
    """
    return next((overlap[name] for name in names if name in overlap), overlap.get("*", "none known"))
