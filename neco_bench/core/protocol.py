"""Cards (concrete tasks) and protocols (named, versioned constants), read from the `cards.toml` of each family.

A protocol is a frozen object: an id, all its constants, and their hash. A card names a data set and contains the
constants that belong to the data set (input size, memory size, K). Together with the changes of `--set`, they fill the
family's frozen `Settings` object, which rejects unknown keys. Nothing here imports torch.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import importlib.util
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from neco_bench.core.config import read_toml, split_names
from neco_bench.core.errors import BadInputError, NecoBenchError, UsageError, did_you_mean, problem_text
from neco_bench.core.files import digest
from neco_bench.core.own_data import FILE, OwnDataset, own_datasets
from neco_bench.core.registry import Registry

FAMILIES: Registry = Registry(
    "task family",
    "neco_bench.tasks",
    {
        name: f"neco_bench.tasks.{name}"
        for name in (
            "in_context",
            "linear_segmentation",
            "finetuning",
            "overclustering",
            "unsupervised_segmentation",
            "object_discovery",
            "attention_maps",
            "patch_probe",
            "correspondence",
            "video_propagation",
            "geometric_correspondence",
            "dense_regression",
        )
    },
    listing="neco-bench tasks",
)

MOST = 10**12  # limit of numbers in settings, so that the product of two fits integers and single precision


class Settings(BaseModel):
    """Base class of each family's settings: all constants of the protocol and the card, validated and frozen.

    input_size: side of the input in pixels. mean, std: RGB on [0, 1]; they replace the encoder's own statistics if the
    reference uses the same for every encoder.
    tokens_per_side: equal tokens instead of equal pixels: every encoder gets an input with this many strides per side.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    input_size: PositiveInt
    tokens_per_side: PositiveInt | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None

    @field_validator("*")
    @classmethod
    def _within_range(cls, value: Any) -> Any:
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, (int, float)) and abs(number) > MOST for number in numbers):
            raise ValueError(f"must be at most {MOST:,}")
        return value

    def input_size_for(self, stride: int) -> int:
        """Return the side of the input: the multiple of `stride` nearest to `input_size`, or `tokens_per_side` strides.

        In a tie, the larger multiple is used; the minimum is one stride.
        """
        return stride * (self.tokens_per_side or max(1, math.floor(self.input_size / stride + 0.5)))


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("give the smaller limit first")
    return limits


Rounds = Annotated[int, Field(gt=0, lt=2**31)]  # FAISS uses 32-bit integers

Share = Annotated[float, Field(ge=0, le=1)]

Temperature = Annotated[float, Field(ge=1e-6)]  # of a softmax: division by a smaller value overflows

Range = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ascending)]


@dataclass(frozen=True)
class Protocol:
    """id, all constants, and the hash over both. A changed constant needs a new id (a test checks the hashes).

    module: the module of the family's package with the `run` of this protocol; its `Settings` are in the module with
    the suffix "_settings" ("settings" for "task"), which imports no torch. citation: that of the family if empty.
    allows_bf16: scores in bf16 agree with those in fp32 (docs/pages/precision.md), so `--precision auto` may use bf16.
    """

    id: str
    family: str
    constants: Mapping[str, Any]
    module: str = "task"
    citation: str = ""
    allows_bf16: bool = False

    @property
    def hash(self) -> str:
        """Hex digest of the id and all constants."""
        return digest({"id": self.id, "family": self.family, "constants": dict(self.constants)})


@dataclass(frozen=True)
class Card:
    """A concrete task. `protocols`: protocol id -> constants of this card under it; the first is the default.

    Such a table may name another `dataset`. A split that ends in "_*" means all draws of a fraction: the task is run on
    each, and the result is their mean.
    """

    name: str
    family: str
    dataset: str
    splits: Mapping[str, str]
    metric: str
    constants: Mapping[str, Any]
    protocols: Mapping[str, Mapping[str, Any]]
    origin: str
    citation: str = ""

    def on_split(self, split: str) -> Card:
        """Return the task `NAME[SPLIT]`, scored on `split` instead of this card's own split.

        Raises UsageError if the task is trained on that split. `load_dataset` checks whether the data set has it.
        """
        roles = [role for role in self.splits if role != "train"]
        if [self.splits[role] for role in roles] == [split]:
            return self
        trained, scored = (re.sub(r"_1of\d+_(\d+|\*)$", "", name) for name in (self.splits.get("train", ""), split))
        if trained == scored or {trained, scored} <= {"train", "trainaug", "trainval"}:  # VOC's share images
            raise UsageError(
                f"Task {self.name!r} is trained on the split {self.splits['train']!r}: {split!r} has images of it and "
                f"cannot be scored. Name another split, or only {self.name!r}."
            )
        return replace(self, name=f"{self.name}[{split}]", splits={**self.splits, **dict.fromkeys(roles, split)})

    @property
    def default_protocol(self) -> str:
        """Id of the first protocol."""
        return next(iter(self.protocols))

    def hash(self, protocol: str) -> str:
        """Return the digest of the card and the named protocol."""
        return digest(
            [
                self.name,
                self.family,
                self.dataset,
                dict(self.splits),
                dict(self.constants),
                dict(self.protocols[protocol]),
            ]
        )


@dataclass(frozen=True)
class Task:
    """A card under one protocol, with the changes of `--set`. `label` is used in results and tables."""

    card: Card
    protocol: Protocol
    changed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The protocol id, with `*` if constants were changed."""
        return self.protocol.id + ("*" if self.changed else "")

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of the protocol, then the card, then `--set`; later ones have priority."""
        own = {key: value for key, value in self.card.protocols[self.protocol.id].items() if key != "dataset"}
        return {**self.protocol.constants, **self.card.constants, **own, **self.changed}

    @property
    def dataset(self) -> str:
        """Name of the data set: that of the card, unless it has another one for this protocol."""
        return self.card.protocols[self.protocol.id].get("dataset", self.card.dataset)

    @property
    def citation(self) -> str:
        """The paper behind the number."""
        return self.protocol.citation or self.card.citation

    @property
    def module(self) -> Any:
        """Import and return the module with `run`. Raises BadInputError if a plug-in is broken."""
        return family_module(self.card.family, self.protocol.module, "run")

    @property
    def hash(self) -> str:
        """Hash of the protocol in use; differs from the protocol's own if a constant was changed."""
        return self.protocol.hash if not self.changed else digest([self.protocol.hash, dict(self.changed)])

    def settings(self) -> Settings:
        """Check all constants and return the family's frozen settings. Imports no torch for built-in families.

        Raises UsageError for an unknown key or a value of the wrong type.
        """
        schema = settings_schema(self.card.family, self.protocol.module)
        try:
            return schema(**self.constants)
        except ValidationError as error:
            where = "--set" if self.changed else f"cards.toml of family {self.card.family!r}"
            unknown = any(problem["type"] == "extra_forbidden" for problem in error.errors())
            known = f" Settings of this family: {', '.join(sorted(schema.model_fields))}." if unknown else ""
            raise UsageError(
                f"{where}, task {self.card.name}@{self.protocol.id}: {problem_text(error, schema.model_fields)}{known}"
            ) from error


def settings_schema(family: str, module: str) -> type[Settings]:
    """Return the `Settings` of a protocol whose `run` is in `module`: from its settings module, or from `module` for
    plug-ins without one. Raises BadInputError if a plug-in is broken."""
    name = "settings" if module == "task" else f"{module}_settings"
    has_own = (_family_folder(family) / f"{name}.py").exists()
    return family_module(family, name if has_own else module, "Settings").Settings


def family_module(family: str, name: str, *needed: str) -> Any:
    """Import a module of a family. Raises BadInputError if this fails, or if a name of `needed` is missing."""
    entry = FAMILIES.entry(family)
    try:
        module = importlib.import_module(f"{entry.value}.{name}")
        for attribute in needed:
            getattr(module, attribute)
    except Exception as error:  # a plug-in may raise any error
        raise BadInputError(
            f"task family {family!r} of {entry.origin} ({entry.value}.{name}) could not be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    return module


def _family_folder(family: str) -> Path:
    value = FAMILIES.entry(family).value
    try:
        spec = importlib.util.find_spec(value)
    except Exception as error:  # the parent package of a plug-in may fail in any way
        raise BadInputError(f"task family {family!r} ({value}) could not be found: {error}") from error
    if spec is None or not spec.submodule_search_locations:
        raise BadInputError(f"task family {family!r}: {value} is not a package with a cards.toml.")
    return Path(next(iter(spec.submodule_search_locations)))


@dataclass(frozen=True)
class Family:
    """The content of the `cards.toml` of a family. own: tables of tasks for user-defined data sets, by ending."""

    protocols: Mapping[str, Protocol]
    cards: Mapping[str, Card]
    own: Mapping[str, Mapping[str, Any]]
    citation: str

    def own_cards(self, family: str, data: OwnDataset) -> Iterator[Card]:
        """Yield the tasks of a user-defined data set that has the splits for them."""
        if data.file is None:
            return
        for ending, table in self.own.items():
            constants = dict(table)
            kind, metric, protocols = (constants.pop(key) for key in ("kind", "metric", "protocols"))
            splits = {role: data.file.role(role) for role in constants.pop("roles")}
            if kind == data.file.kind and all(splits.values()):
                yield Card(
                    name=f"{data.name}_{ending}",
                    family=family,
                    dataset=data.name,
                    splits={role: split for role, split in splits.items() if split},
                    metric=metric,
                    constants=constants,
                    protocols=protocols,
                    origin=str(data.folder / FILE),
                    citation="; ".join(filter(None, [self.citation, data.file.citation])),
                )


@functools.cache
def _read_family(family: str) -> Family:
    path = _family_folder(family) / "cards.toml"
    document = read_toml(path)
    protocols = {
        name: Protocol(
            name,
            family,
            constants,
            constants.pop("module", "task"),
            constants.pop("citation", ""),
            constants.pop("allows_bf16", False),
        )
        for name, constants in document.get("protocols", {}).items()
    }
    cards = {}
    for name, table in document.get("tasks", {}).items():
        table = dict(table)
        try:
            common = {key: table.pop(key) for key in ("dataset", "splits", "metric", "protocols")}
        except KeyError as error:
            raise BadInputError(f"{path}: task {name!r} lacks {error}.") from error
        unknown = set(common["protocols"]) - set(protocols)
        if unknown or not common["protocols"]:
            raise BadInputError(f"{path}: task {name!r} names protocols {sorted(unknown)}, which the file lacks.")
        cards[name] = Card(
            name=name, family=family, constants=table, origin=str(path), citation=document.get("citation", ""), **common
        )
    return Family(protocols, cards, document.get("own", {}), document.get("citation", ""))


def all_cards(data_root: str | os.PathLike[str] | None = None) -> tuple[dict[str, Card], dict[str, str]]:
    """Return all cards by name, and broken plug-in families and user-defined data sets with the reason.

    Broken ones do not affect the others. data_root: folder of user-defined data sets; None: NECO_BENCH_DATA.
    """
    cards: dict[str, Card] = {}
    broken: dict[str, str] = {}
    families: dict[str, Family] = {}
    for family in FAMILIES:
        try:
            families[family] = _read_family(family)
        except NecoBenchError as error:
            broken[family] = str(error)
            continue
        for name, card in families[family].cards.items():
            if name in cards:
                broken[family] = f"task {name!r} is already defined by {cards[name].origin}"
            else:
                cards[name] = card
    known = {card.dataset for card in cards.values()}
    known |= {table["dataset"] for card in cards.values() for table in card.protocols.values() if "dataset" in table}
    for data in own_datasets(data_root).values():
        path = data.folder / FILE
        if data.file is None:
            broken[data.name] = data.problem
        elif data.name in known:
            broken[data.name] = f"{path}: {data.name!r} is the name of a data set with a reader. Rename the folder."
        else:
            own = [card for family, found in families.items() for card in found.own_cards(family, data)]
            taken = next((card.name for card in own if card.name in cards), None)
            if taken or not own:
                needed = 'a split "train", "val" or "test"'
                why = (
                    f"the task {taken!r} is another data set's. Rename the folder."
                    if taken
                    else f"no task fits: name {needed}."
                )
                broken[data.name] = f"{path}: {why}"
            else:
                cards |= {card.name: card for card in own}
    return cards, broken


def protocol(family: str, name: str) -> Protocol:
    """Return the protocol with this id. Raises UsageError, which suggests similar names."""
    known = _read_family(family).protocols
    if name not in known:
        raise UsageError(
            f"Unknown protocol {name!r} of family {family!r}.{did_you_mean(name, known)} Protocols: {', '.join(known)}."
        )
    return known[name]


def find_tasks(
    requests: Iterable[str],
    changed: Mapping[str, Any] | None = None,
    *,
    data_root: str | os.PathLike[str] | None = None,
) -> list[Task]:
    """Return the tasks for names, globs and `name@protocol` (optionally comma-separated), without repeats, in order.

    `name[split]` is the task scored on another split: `camvid_ic[test]@clean-1`. A glob without a protocol selects each
    card's default; with a protocol, the cards that have it. data_root: folder of user-defined data sets; None:
    NECO_BENCH_DATA. Raises UsageError for unknown names and protocols, a glob that matches nothing, or a split that the
    task is trained on, and BadInputError for a task of a data set whose `dataset.toml` is wrong.
    """
    cards, broken = all_cards(data_root)
    tasks: dict[tuple[str, str], Task] = {}
    for request in split_names(requests):
        name, _, wanted = request.partition("@")
        name, split = _name_and_split(name, cards)
        is_glob = any(sign in name for sign in "*?[")
        names = fnmatch.filter(cards, name) if is_glob else [name]
        if is_glob and wanted:
            names = [n for n in names if wanted in cards[n].protocols]
        for match in names:
            if match not in cards:
                _raise_broken(match, broken)
                note = f" These are broken: {broken}." if broken else ""
                raise UsageError(
                    f"Unknown task {match!r}.{did_you_mean(match, cards)} `neco-bench tasks` lists all.{note}"
                )
            card = cards[match].on_split(split) if split else cards[match]
            wanted_id = wanted or card.default_protocol
            if wanted_id not in card.protocols:
                protocol(card.family, wanted_id)
                raise UsageError(
                    f"Task {match!r} is not defined under protocol {wanted_id!r}; it has {', '.join(card.protocols)}."
                )
            task = Task(card, protocol(card.family, wanted_id), dict(changed or {}))
            tasks.setdefault((card.name, wanted_id), task)
        if not names:
            _raise_broken(name, broken)
            raise UsageError(f"No task matches {request!r}. `neco-bench tasks` lists all.")
    if not tasks:
        raise UsageError("No task is named. `neco-bench tasks` lists all.")
    return list(tasks.values())


def _name_and_split(name: str, cards: Mapping[str, Card]) -> tuple[str, str]:
    """Return the parts of `NAME[SPLIT]` if NAME is a task; otherwise the name or glob, and no split."""
    match = re.fullmatch(r"(.+)\[([\w.-]+)\]", name)
    return (match[1], match[2]) if match and match[1] in cards else (name, "")


def _raise_broken(name: str, broken: Mapping[str, str]) -> None:
    """Raise BadInputError if a name belongs to a task of a broken user-defined data set."""
    for data, reason in broken.items():
        if data not in FAMILIES and name.startswith(f"{data}_"):
            raise BadInputError(reason)
