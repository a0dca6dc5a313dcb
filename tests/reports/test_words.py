"""The page, LaTeX, Markdown, `compare`, the READMEs and the docs say the same of intervals, tests and ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from neco_bench.reports.leaderboard import write_leaderboard
from neco_bench.reports.words import MEANING, RANKS, TESTS
from neco_bench.results.schema import Result

ROOT = Path(__file__).parents[2]


def plain(text: str) -> str:
    return " ".join(text.replace("&#39;", "'").replace("%", " ").split())


@pytest.mark.parametrize("file", ["docs/pages/results.md", "leaderboards/README.md", "docs/pages/intervals.md"])
def test_documents(file: str) -> None:
    text = plain((ROOT / file).read_text(encoding="utf-8"))
    assert plain(MEANING) in text
    assert plain(TESTS) in text
    assert file == "docs/pages/results.md" or plain(RANKS) in text


def test_what_is_written(make_result: Callable[..., Result], tmp_path: Path) -> None:
    write_leaderboard([make_result()], tmp_path)
    for name in ("report.html", "leaderboard.md", "in_context.tex"):
        text = plain((tmp_path / name).read_text(encoding="utf-8"))
        assert plain(MEANING) in text, name
        assert plain(TESTS) in text, name
    assert plain(RANKS) in plain((tmp_path / "leaderboard.md").read_text(encoding="utf-8"))
