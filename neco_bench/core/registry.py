"""A generic lazy registry of names and "module:attr" values, for built-in and third-party entries.

Listing imports no registered module; `Registry.load` imports it. A plug-in that cannot be loaded is an error when it is
used, and is shown as broken in listings; it does not affect other entries.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from neco_bench.core.errors import BadInputError, UsageError, did_you_mean

T = TypeVar("T")

BUILTIN = "neco-bench"  # the origin of built-in entries


@dataclass(frozen=True)
class Entry:
    """A registered entry: `value` is "module:attr", `origin` is the name of the package."""

    name: str
    value: str
    origin: str

    @property
    def problem(self) -> str:
        """Return why it cannot be loaded, as far as this is visible without imports; else an empty string."""
        name, path = "", None
        for part in self.value.partition(":")[0].split("."):
            name = f"{name}.{part}" if name else part
            # Like importlib.util.find_spec, but without importing the parent packages.
            spec = next((s for finder in sys.meta_path if (s := finder.find_spec(name, path))), None)
            if spec is None:
                return f"there is no module {name!r}"
            path = spec.submodule_search_locations
        return ""


@functools.cache
def _installed(find: Callable[..., Iterable[Any]], group: str) -> tuple[Any, ...]:
    """Return the entry points of a group by `find`; cached, because it reads the metadata of all installed packages.

    `tasks` asks 84 times: 1.19 s of CPU without this cache, 0.84 with it.
    """
    return tuple(find(group=group))


class Registry(Generic[T]):
    """Registered names of one kind.

    group: the entry-point group through which other packages add to it. listing: the command that lists the names.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str], *, listing: str) -> None:
        self.kind = kind
        self.group = group
        self.listing = listing
        self._builtin = {name: Entry(name, value, BUILTIN) for name, value in builtin.items()}

    def entries(self) -> dict[str, Entry]:
        """Return all entries by name. Raises `UsageError` if two packages register the same name."""
        entries = dict(self._builtin)
        for point in _installed(importlib.metadata.entry_points, self.group):
            origin = point.dist.name if point.dist else "an unnamed package"
            known = entries.get(point.name)
            if known is not None and known.value != point.value:
                raise UsageError(
                    f"{self.kind} {point.name!r} is registered by both {known.origin} ({known.value}) and {origin} "
                    f"({point.value}). Uninstall one of the two, or rename its entry point."
                )
            entries[point.name] = Entry(point.name, point.value, origin)
        return entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries())

    def __contains__(self, name: object) -> bool:
        return name in self.entries()

    def entry(self, name: str) -> Entry:
        """Return the entry with this name. Raises `UsageError`, which suggests similar names."""
        entries = self.entries()
        if name not in entries:
            raise UsageError(f"Unknown {self.kind} {name!r}.{did_you_mean(name, entries)} `{self.listing}` lists all.")
        return entries[name]

    def load(self, name: str) -> T:
        """Import and return the registered object. Raises `UsageError` (unknown), `BadInputError` (broken plug-in)."""
        entry = self.entry(name)
        module, _, attribute = entry.value.partition(":")
        try:
            value = importlib.import_module(module)
            for part in filter(None, attribute.split(".")):
                value = getattr(value, part)
        except (Exception, SystemExit) as error:  # a plug-in may raise any error, which must name the plug-in
            raise BadInputError(
                f"{self.kind} {name!r} of {entry.origin} ({entry.value}) could not be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
        return value  # type: ignore[return-value]
