"""Every command of README.md and of the pages it leads to runs, and does what the text says.

The two install commands are what `.ci/run` calls.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neco_bench.data.shapes import Shapes
from tests.command import neco

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


PAGES = {
    name: (ROOT / "docs" / "pages" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("models", "tasks", "training", "results")
}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


LINES = [line for text in (README, *PAGES.values()) for block in blocks("bash", text) for line in block.splitlines()]
COMMANDS = list(dict.fromkeys(line for line in LINES if line.startswith("neco-bench")))
INSTALLS = [line for line in LINES if not line.startswith("neco-bench")]
(SCRIPT,) = blocks("python")
(EXAMPLE,) = blocks("python", PAGES["models"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder of the reader's own, with the README's encoder in it."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "my_encoder.py").write_text(EXAMPLE)
    return folder


@pytest.fixture(autouse=True)
def _few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the generated images: the commands stay as they are written, and encode less."""
    plain, few = Shapes.__init__, {"train": 32, "val": 16}

    def cut(self: Shapes, root: None, split: str) -> None:
        plain(self, root, split)
        self.ids = self.ids[: few[split]]

    monkeypatch.setattr(Shapes, "__init__", cut)
    monkeypatch.setattr(Shapes, "expected", few)


def test_there_are_two_install_commands_and_ci_calls_them() -> None:
    assert len(INSTALLS) == 2
    assert all(line.startswith("python3 -m venv") for line in INSTALLS)
    assert INSTALLS[1].endswith("python -m pytest")
    assert "grep '^python3 -m venv' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_example_encoder_is_short() -> None:
    function = EXAMPLE[EXAMPLE.index("def ") :].strip().splitlines()
    assert len(function) <= 15


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, place: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: a new one for each would spend most of its time importing torch."""
    if "/data" in command:
        command = command.replace("/data", str(request.getfixturevalue("real_data")))
    monkeypatch.chdir(place)
    done = neco(*shlex.split(command)[1:])
    assert done.code == 0, done.err
    assert done.out.strip()
    assert "Traceback" not in done.err


def test_python_example(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(SCRIPT, names)  # noqa: S102 (a page of this repository)
    assert capsys.readouterr().out.startswith(str(names["result"].metrics["mIoU"]))
    assert names["encoder"].stride > 1


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    "arguments", [["ruff", "check"], ["ruff", "format", "--check"], pytest.param(["mypy"], marks=pytest.mark.slow)]
)
def test_style(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
