"""Suites: named tables of models by tasks, and of training runs, read from `suites.toml` beside this file.

One's own suite is one of a TOML file of the same form, named FILE.toml:NAME. Imports no torch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from neco_bench.core.config import read_toml
from neco_bench.core.dataset_file import problem_text
from neco_bench.core.errors import BadInputError, UsageError, did_you_mean
from neco_bench.core.protocol import Task, find_tasks

FILE = Path(__file__).with_name("suites.toml")

_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # of suites and runs, which are names of files and folders too


class SuiteModel(BaseModel):
    """A row of the table of a suite.

    name: what the table calls it; by default the spec. model: the spec that `run` takes; empty for a row of published
    numbers alone. published: the name that `published.csv` has for it; by default the spec. arch: the architecture
    there, where several models have that name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""
    model: str = ""
    published: str = ""
    arch: str = ""

    @model_validator(mode="after")
    def _is_named(self) -> SuiteModel:
        if not (self.name or self.model):
            raise ValueError("give a model, or the name of a row of published numbers")
        return self

    @property
    def title(self) -> str:
        """What the table calls it."""
        return self.name or self.model

    @property
    def published_name(self) -> str:
        """The name in `published.csv`."""
        return self.published or self.model or self.name


class SuiteRun(BaseModel):
    """A training run of a suite: recipe, training data as `train --data` takes them, and changes of the recipe.

    name: of its folder; by default the recipe's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    data: str
    name: str = ""
    set: Mapping[str, Any] = Field(default={})

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return self.name or PurePath(self.recipe).stem


class Suite(BaseModel):
    """Models by tasks, and what they are printed beside.

    tasks: names (or globs, or task@protocol), or such a name for each column title. models: model specs or rows
    (`SuiteModel`), in the order of the table. runs: what `train` makes; then the rows are those runs. stands_for: by
    column title, the task whose published numbers stand beside that column, where it is another one; no difference is
    then made. published: starts of `source` in `published.csv`, the one that counts first; without any nothing is
    published. note: what a reader of the table must know.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    title: str
    tasks: list[str] | dict[str, str] = Field(min_length=1)
    models: list[SuiteModel] = []
    runs: list[SuiteRun] = []
    stands_for: dict[str, str] = {}
    published: list[str] = []
    citation: str = ""
    note: str = ""

    @field_validator("models", mode="before")
    @classmethod
    def _specs(cls, models: Any) -> Any:
        return (
            [{"model": row} if isinstance(row, str) else row for row in models] if isinstance(models, list) else models
        )

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        folders = [run.folder for run in self.runs]
        titles = [row.title for row in self.models]
        for kind, names in (("runs", folders), ("models", titles)):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{kind}: {', '.join(twice)} stands there twice; give each another name")
        if wrong := [name for name in folders if not _NAME.fullmatch(name)]:
            raise ValueError(f"runs: {wrong[0]!r} is the name of a folder: letters, digits, _ . and - only")
        titles = list(self.tasks)
        if unknown := [title for title in self.stands_for if title not in titles]:
            raise ValueError(f"stands_for: there is no column {unknown[0]!r}")
        return self

    @property
    def rows(self) -> list[SuiteModel]:
        """The rows of its table: the models, then the runs."""
        return [*self.models, *(SuiteModel(name=run.folder) for run in self.runs)]

    @property
    def specs(self) -> list[str]:
        """The models that can be run, each once."""
        return list(dict.fromkeys(row.model for row in self.models if row.model))

    def columns(self, changed: Mapping[str, Any] | None = None, data_root: Any = None) -> list[SuiteColumn]:
        """The columns of its table.

        Raises what `find_tasks` raises, and BadInputError where a title stands for several tasks.
        """
        columns: dict[tuple[str, str], SuiteColumn] = {}
        titled = self.tasks if isinstance(self.tasks, dict) else {name: name for name in self.tasks}
        for title, name in titled.items():
            tasks = find_tasks([name], changed, data_root=data_root)
            if len(tasks) > 1 and isinstance(self.tasks, dict):
                raise BadInputError(f"Suite {self.id!r}: the column {title!r} stands for several tasks, {name!r}.")
            for task in tasks:
                is_glob = title.partition("@")[0] != task.card.name and any(sign in title for sign in "*?[")
                shown = f"{task.card.name}@{task.protocol.id}" if is_glob else title
                column = SuiteColumn(shown, task, self.stands_for.get(title, task.card.name))
                columns.setdefault((task.card.name, task.protocol.id), column)
        return list(columns.values())


@dataclass(frozen=True)
class SuiteColumn:
    """A column of a suite: its title, its task, and the task whose published numbers stand beside it."""

    title: str
    task: Task
    published: str


def _read(path: Path) -> dict[str, Suite]:
    """The suites of a file, by name. Raises MissingError and BadInputError, naming the file."""
    document = read_toml(path)
    tables = document.pop("suite", {})
    if document or not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise BadInputError(f"{path}: a file of suites has tables [suite.NAME] and nothing else.")
    suites = {}
    for name, table in tables.items():
        try:
            if not _NAME.fullmatch(name):
                raise BadInputError(f"{path}: suite {name!r}: a name has letters, digits, _ . and - only.")
            suites[name] = Suite(id=name, **{"title": name, **table})
        except ValidationError as error:
            raise BadInputError(f"{path}: suite {name!r}: {problem_text(error, Suite.model_fields)}") from error
    return suites


@functools.cache
def all_suites() -> dict[str, Suite]:
    """The suites of this package, by name."""
    return _read(FILE)


def find_suite(name: str) -> Suite:
    """The suite of that name: one of this package, or FILE.toml:NAME (FILE.toml where it has only one).

    Raises UsageError with near names, MissingError and BadInputError for a file.
    """
    file, sign, inner = name.rpartition(":")
    if not sign or not file.endswith(".toml"):
        file, inner = (name, "") if name.endswith(".toml") else ("", name)
    suites = _read(Path(file)) if file else all_suites()
    if not inner and len(suites) == 1:
        return next(iter(suites.values()))
    if inner not in suites:
        where = f" in {file}" if file else ""
        hint = f"It has: {', '.join(suites)}." if file else "`neco-bench suites` lists all."
        raise UsageError(f"Unknown suite {inner or name!r}{where}.{did_you_mean(inner, suites)} {hint}")
    return suites[inner]


def find_suites(names: Iterable[str]) -> list[Suite]:
    """The suites of names, comma-separated or not, without repeats. Raises as `find_suite`."""
    wanted = dict.fromkeys(part.strip() for name in names for part in name.split(",") if part.strip())
    return [find_suite(name) for name in wanted]
