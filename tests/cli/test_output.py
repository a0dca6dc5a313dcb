"""What is printed: plain, parseable text in pipes and files, tables in the width of a terminal."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest

from neco_bench.cli.output import print_rows

ROWS = [
    {"task": "shapes_ic@hbird-2 [limit 24]", "metric": ["mIoU", "accuracy"], "data": True, "value": None},
    {"task": "[bold]x[/bold] :smile:", "metric": {"a": 1}, "data": False, "value": "61.5"},
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_pipes_get_one_line_per_row() -> None:
    file = io.StringIO()
    print_rows(ROWS, False, file)
    assert file.getvalue() == (
        "task                          metric          data  value\n"
        "shapes_ic@hbird-2 [limit 24]  mIoU, accuracy  yes\n"
        "[bold]x[/bold] :smile:        a 1             no    61.5\n"
    )


def test_terminals_get_every_cell_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    file = Terminal()
    print_rows(ROWS, False, file)
    text = without_colours(file.getvalue())
    for cell in ("task", "value", "shapes_ic@hbird-2 [limit 24]", "mIoU, accuracy", "[bold]x[/bold] :smile:", "61.5"):
        assert cell in text


def test_narrow_terminals_lose_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    file = Terminal()
    print_rows([{"name": "abcdefghij" * 4, "value": "12.3"}], False, file)
    lines = without_colours(file.getvalue()).splitlines()
    assert max(map(len, lines)) <= 30
    assert "".join(line.split()[0] for line in lines[1:]) == "abcdefghij" * 4


def test_lists_in_pipes_import_no_rich() -> None:
    code = (
        "import sys; from neco_bench.cli.app import main\n"
        "try:\n    main(['models'])\nexcept SystemExit:\n"
        "    print([m for m in ('rich', 'pandas', 'jinja2', 'torch') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"
