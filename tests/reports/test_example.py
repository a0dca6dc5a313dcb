"""The example under leaderboards/ is what its results give."""

from __future__ import annotations

from pathlib import Path

from neco_bench.reports.leaderboard import write_leaderboard
from neco_bench.reports.published import read_published
from neco_bench.reports.survey import survey_page
from neco_bench.results.store import ResultStore

LEADERBOARDS = Path(__file__).parents[2] / "leaderboards"


def test_the_example_is_made_of_its_results(tmp_path: Path) -> None:
    example = LEADERBOARDS / "example"
    store = ResultStore(example / "results")
    results = store.load_all()
    assert not store.problems
    assert len({result.model for result in results}) >= 6
    made = write_leaderboard(results, tmp_path, LEADERBOARDS / "published.csv", statistics=store.statistics)
    assert {path.name for path in made} == {path.name for path in example.iterdir() if path.is_file()}
    for path in made:
        assert path.read_bytes() == (example / path.name).read_bytes(), path.name


def test_the_survey_is_made_of_the_published_numbers() -> None:
    page = survey_page(read_published(LEADERBOARDS / "published.csv"))
    assert page.encode() == (LEADERBOARDS / "published.html").read_bytes()
    assert len(page.encode()) < 2_000_000
