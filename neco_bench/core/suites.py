"""Suites: named tables of models by tasks, and sets of training runs, read from `suites.toml` in this folder.

A user-defined suite is a table in a TOML file of the same form, named FILE.toml:NAME. Imports no torch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from neco_bench.core.config import read_toml, split_names
from neco_bench.core.errors import BadInputError, UsageError, did_you_mean, problem_text
from neco_bench.core.protocol import Task, find_tasks

FILE = Path(__file__).with_name("suites.toml")

_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # names of suites and runs, which are also used for files and folders


class SuiteModel(BaseModel):
    """A row of the table of a suite.

    name: its name in the table; by default the spec. model: the model spec; empty for a row of published numbers only.
    published: its name in `published.csv`; by default the spec. arch: its architecture there, if several models share
    that name.
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
        """The name in the table."""
        return self.name or self.model

    @property
    def published_name(self) -> str:
        """The name in `published.csv`."""
        return self.published or self.model or self.name


class SuiteRun(BaseModel):
    """A training run of a suite: recipe, training data as in `train --data`, and changes to the recipe.

    name: name of its folder; by default that of the recipe.
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
    """Models by tasks, and the published numbers to show with them.

    tasks: names (or globs, or task@protocol), or a table that maps column titles to such names. models: model specs or
    rows (`SuiteModel`), in the order of the table. runs: training runs, which are then the rows. stands_for: for a
    column title, another task whose published numbers are shown in that column; no difference is computed then.
    published: prefixes of `source` in `published.csv`, in order of priority; without any, no published numbers are
    shown. note: information that a reader of the table needs.
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
        if not isinstance(models, list):
            return models
        return [{"model": row} if isinstance(row, str) else row for row in models]

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        folders = [run.folder for run in self.runs]
        for kind, names in (("runs", folders), ("models", [row.title for row in self.models])):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{kind}: {', '.join(twice)} is listed twice; give each another name")
        if wrong := [name for name in folders if not _NAME.fullmatch(name)]:
            raise ValueError(f"runs: {wrong[0]!r} is the name of a folder: letters, digits, _ . and - only")
        if unknown := [title for title in self.stands_for if title not in self.tasks]:
            raise ValueError(f"stands_for: there is no column {unknown[0]!r}")
        return self

    @property
    def rows(self) -> list[SuiteModel]:
        """Rows of the table: the models, then the runs."""
        return [*self.models, *(SuiteModel(name=run.folder) for run in self.runs)]

    @property
    def specs(self) -> list[str]:
        """Specs of the models that can be run, without repeats."""
        return list(dict.fromkeys(row.model for row in self.models if row.model))

    def columns(self, changed: Mapping[str, Any] | None = None, data_root: Any = None) -> list[SuiteColumn]:
        """Return the columns of the table.

        Raises the errors of `find_tasks`, and BadInputError if a title matches several tasks.
        """
        columns: dict[tuple[str, str], SuiteColumn] = {}
        titled = self.tasks if isinstance(self.tasks, dict) else {name: name for name in self.tasks}
        for title, name in titled.items():
            tasks = find_tasks([name], changed, data_root=data_root)
            if len(tasks) > 1 and isinstance(self.tasks, dict):
                raise BadInputError(f"Suite {self.id!r}: the column {title!r} matches several tasks, {name!r}.")
            for task in tasks:
                is_glob = title.partition("@")[0] != task.card.name and any(sign in title for sign in "*?[")
                shown = f"{task.card.name}@{task.protocol.id}" if is_glob else title
                column = SuiteColumn(shown, task, self.stands_for.get(title, task.card.name))
                columns.setdefault((task.card.name, task.protocol.id), column)
        return list(columns.values())


@dataclass(frozen=True)
class SuiteColumn:
    """A column of a suite: its title, its task, and the task whose published numbers are shown."""

    title: str
    task: Task
    published: str


def _read(path: Path) -> dict[str, Suite]:
    """Return the suites of a file, by name. Raises MissingError and BadInputError, whose messages name the file."""
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
    """Return the built-in suites, by name."""
    return _read(FILE)


def find_suite(name: str) -> Suite:
    """Return the suite with this name: a built-in one, or FILE.toml:NAME (FILE.toml if it has only one).

    Raises UsageError, which suggests similar names, and MissingError and BadInputError for a file.
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
    """Return the suites for names (optionally comma-separated), without repeats. Raises errors of `find_suite`."""
    return [find_suite(name) for name in dict.fromkeys(split_names(names))]
