"""`recipe.json` of a run folder: settings, changes made on resuming, and versions."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from neco_bench.core.errors import BadInputError, UsageError
from neco_bench.core.files import write_whole
from neco_bench.results.provenance import environment
from neco_bench.training.recipe import CHANGEABLE

# {name: (value before, value now)} of settings.
Changes = dict[str, tuple[Any, Any]]


class RunRecord:
    """The settings of a run. changes: changes made on resuming, each {"step", "from", "to"}."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = out / "recipe.json", settings
        self.changes: list[dict[str, Any]] = []

    def write(self) -> None:
        """Write the file."""
        content = {**self.settings, "changes": self.changes, "environment": environment()}
        write_whole(self.path, json.dumps(content, indent=2, default=str).encode())

    def load(self, stated: Collection[str]) -> Changes:
        """Read the previous changes from the file, and return the settings that now differ from the stored ones.

        stated: names of settings given by the command. Raises BadInputError for an unreadable file, and UsageError for
        a difference that is not allowed or not given by the command.
        """
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            self.changes = [{"step": int(c["step"]), "from": dict(c["from"]), "to": dict(c["to"])}
                            for c in stored.pop("changes", [])]  # fmt: skip
            before = {**stored.pop("recipe"), **stored}
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise BadInputError(f"{self.path} cannot be read ({error!r}), so the run cannot be resumed.") from error
        now = json.loads(json.dumps(self.settings))
        now = {**now.pop("recipe"), **now}
        changed = {name: (before.get(name), now[name]) for name in now if now[name] != before.get(name)}
        changed.pop("max_unreadable", None)
        allowed = {*stated} & {*CHANGEABLE}
        if allowed & {"epochs", "steps"}:
            allowed |= {"epochs", "steps"}
        refused = {name: pair for name, pair in changed.items() if name not in allowed}
        if refused:
            free = [name for name in refused if name in CHANGEABLE]
            hint = f" To change {', '.join(free)} from here on, give --set." if free else ""
            raise UsageError(
                f"--resume: {self.path.parent} was started with {format_changes(refused, '{1!r} (now {0!r})')}. Use "
                f"the same settings, or another --out.{hint}"
            )
        return changed

    def resume(self, step: int, changed: Changes) -> bool:
        """Record `changed` from `step` on, and return whether the file must be written again.

        Changes made after the checkpoint of `step` was written also apply from `step` on.
        """
        stored = self.changes
        self.changes = [{**change, "step": min(change["step"], step)} for change in stored]
        if changed:
            before, now = ({name: pair[i] for name, pair in changed.items()} for i in (0, 1))
            self.changes.append({"step": step, "from": before, "to": now})
        return self.changes != stored

    def changes_before(self, step: int) -> str:
        """Return the changes with which weights of `step` were trained, as the end of a sentence."""
        return "".join(
            f", from step {change['step']} on {name}={value}"
            for change in self.changes
            if change["step"] < step
            for name, value in change["to"].items()
        )


def format_changes(changed: Changes, form: str) -> str:
    """Format settings with their values now, {0}, and before, {1}."""
    return ", ".join(f"{name}={form.format(now, before)}" for name, (before, now) in changed.items())
