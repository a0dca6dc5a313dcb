"""Intervals cover, and tests reject a true null, as often as docs/pages/intervals.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.statistics.simulate import Case, cases

CASES = {f"{case.kind}: {case.name}": case for case in cases()}

# In the quick suite, of cases that take a millisecond or a few.
QUICK = {
    "coverage: mIoU, 21 classes x 50 images, absent = zero": 150,
    "coverage: mIoU, 21 classes x 101 images, absent = exclude": 150,
    "coverage: mIoU, 150 classes x 101 images, absent = zero": 40,
    "coverage: PCK, 10 x 10 images, all pairs, mean over totals": 100,
    "coverage: 101 frames of a drive, autocorrelation 0.8": 300,
    "coverage: J&F, objects of 30 sequences": 300,
    "coverage: share of hits 0.02, 80 items": 300,
    "coverage: mean of 3 seeds that differ, 80 images": 200,
    "level: mIoU, 11 classes x 50 images": 100,
    "level: by class after Holm, 21 classes x 50 images": 60,
    "level: by class after Holm, 150 classes x 101 images": 10,
    "level: J&F, objects of 30 sequences": 200,
    "level: 3 seeds that differ, 80 images": 200,
}


def check(case: Case, times: int) -> None:
    """The share is within what the case allows, four errors of the simulation aside."""
    share, error = case.measure(times)
    assert case.low - 4 * error <= share <= case.high + 4 * error, f"{share:.3f} ± {error:.3f}"


@pytest.mark.parametrize("name", QUICK)
def test_quick(name: str) -> None:
    check(CASES[name], QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_all(name: str) -> None:
    check(CASES[name], max(10, CASES[name].times // 10))


def test_the_page_has_every_case_and_its_numbers_are_within_what_is_allowed() -> None:
    text = (Path(__file__).parents[2] / "docs" / "pages" / "intervals.md").read_text()
    kinds = re.split(r"\| (Coverage|Level) of", text)
    found = {}
    for kind, part in zip(kinds[1::2], kinds[2::2], strict=True):
        for name, share, error in re.findall(r"^\| (.+?) \| [\d.]+ % \| ([\d.]+) % \| ([\d.]+) % \|", part, re.M):
            found[f"{kind.lower()}: {name}"] = float(share) / 100, float(error) / 100
    assert found.keys() == CASES.keys()
    for name, (share, error) in found.items():
        assert CASES[name].low - 4 * error <= share <= CASES[name].high + 4 * error, name
