"""What an installation holds: every package of the tree, with every file in it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

import neco_bench

ROOT = Path(__file__).parents[1]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py gives to setuptools."""
    setuptools = pytest.importorskip("setuptools")
    settings: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: settings.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return settings


def test_no_package_is_missing(given: dict[str, Any]) -> None:
    """`show` and `diagnose` need neco_bench.viz, which a list that was typed had lacked."""
    inside = [path.parent.relative_to(ROOT) for path in ROOT.glob("*/**/__init__.py")]
    installed = {path for path in inside if path.parts[0] in ("neco_bench", "tasks", "leaderboards")}
    names = {
        ".".join(path.parts) if path.parts[0] == "neco_bench" else f"neco_bench.{'.'.join(path.parts)}"
        for path in installed
    }
    assert set(given["packages"]) == names
    assert {"neco_bench.viz", "neco_bench.tasks.in_context", "neco_bench.leaderboards"} <= names


def test_the_api_page_has_every_public_name() -> None:
    page = (ROOT / "docs" / "pages" / "api.md").read_text(encoding="utf-8")
    shown = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith("::: ")}
    assert shown == set(neco_bench.__all__) - {"__version__"} | {"Comparison"}  # what `compare` gives


def test_no_file_of_a_package_is_missing(given: dict[str, Any]) -> None:
    """.ci/wheel compares a whole wheel with the tree; here that no pattern has to name a kind of file."""
    assert set(given["package_data"]) == {"neco_bench", *given["package_dir"]}
    assert all(patterns == ["**/*"] for patterns in given["package_data"].values())
