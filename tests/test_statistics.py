"""Hand-computed cases, a naive loop over the same draws, and properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from neco_bench import statistics
from neco_bench.errors import NumericalError
from neco_bench.metrics import mean_iou
from neco_bench.statistics import bootstrap_mean, bootstrap_miou, bootstrap_ratio

# Class 2 occurs in no image; image 1 lacks class 1 but predicts it once.
HAND = np.array(
    [
        [[3, 1, 0], [0, 4, 0], [0, 0, 0]],
        [[2, 1, 0], [0, 0, 0], [0, 0, 0]],
    ]
)


def picks(n: int, draws: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n, (draws, n))


def test_hand_computed():
    # Draws of two images, {0,0}: ious 6/8, 8/10; {1,1}: 4/6 (class 1 has no truth); {0,1}: 5/7, 4/6.
    twice_0, mixed, twice_1 = (3 / 4 + 4 / 5) / 2, (5 / 7 + 4 / 6) / 2, 2 / 3
    assert bootstrap_miou(HAND, level=1.0) == pytest.approx((twice_1, twice_0))
    assert bootstrap_miou(HAND, level=0.2) == pytest.approx((mixed, mixed))
    # As zero: the mean over all three classes, whatever is absent.
    assert bootstrap_miou(HAND, absent="zero", level=1.0) == pytest.approx((2 / 9, (3 / 4 + 4 / 5) / 3))


@pytest.mark.parametrize("absent", ["exclude", "zero"])
def test_same_as_a_naive_loop(absent):
    rng = np.random.default_rng(3)
    confusions = rng.integers(0, 6, (7, 4, 4)) * (rng.random((7, 4, 1)) < 0.4)  # most images lack most classes
    values = [mean_iou(confusions[draw].sum(0), absent=absent) for draw in picks(7, 500, seed=5)]
    expected = np.nanquantile(values, [0.05, 0.95])
    assert bootstrap_miou(confusions, absent=absent, draws=500, seed=5, level=0.9) == pytest.approx(tuple(expected))


def test_draws_without_ground_truth_are_left_out():
    confusions = np.zeros((2, 2, 2), int)
    confusions[0] = [[3, 1], [0, 0]]
    assert bootstrap_miou(confusions, level=1.0) == (0.75, 0.75)
    with pytest.raises(NumericalError, match="ground truth"):
        bootstrap_miou(confusions[1:])


def test_grouped_ratio_same_as_a_naive_loop():
    hits, totals = np.array([1, 2, 0, 3, 4]), np.array([2, 2, 3, 4, 5])
    groups = np.array([7, 7, 3, 3, 9])

    def macro(draw):
        parts = [(hits[draw][groups[draw] == g].sum(), totals[draw][groups[draw] == g].sum()) for g in (3, 7, 9)]
        return np.mean([h / t for h, t in parts if t])

    expected = np.quantile([macro(draw) for draw in picks(5, 300)], [0.025, 0.975])
    assert bootstrap_ratio(hits, totals, groups, draws=300) == pytest.approx(tuple(expected))
    pooled = [hits[draw].sum() / totals[draw].sum() for draw in picks(5, 300)]
    assert bootstrap_ratio(hits, totals, draws=300) == pytest.approx(tuple(np.quantile(pooled, [0.025, 0.975])))


def test_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(2, 1, 2000)
    low, high = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.002)


def test_pieces_do_not_move_the_interval(monkeypatch):
    whole = bootstrap_miou(HAND, draws=1000, level=0.5), bootstrap_mean(np.arange(11.0) ** 2, draws=1000)
    monkeypatch.setattr(statistics, "_CHUNK", 37)
    assert (bootstrap_miou(HAND, draws=1000, level=0.5), bootstrap_mean(np.arange(11.0) ** 2, draws=1000)) == whole


def test_large_counts_stay_exact():
    confusions = np.array([[[10**12, 1], [1, 10**12]]] * 3)
    expected = 10**12 / (10**12 + 2)
    assert bootstrap_miou(confusions, draws=10) == (expected, expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_mean(np.array([])),
        lambda: bootstrap_mean(np.array([1.0, np.nan])),
        lambda: bootstrap_miou(np.zeros((0, 3, 3), int)),
        lambda: bootstrap_ratio(np.array([0]), np.array([0])),
    ],
)
def test_undefined_is_an_error(call):
    with pytest.raises(NumericalError):
        call()


confusion_stacks = hnp.arrays(
    np.int64, st.tuples(st.integers(1, 5), st.just(3), st.just(3)), elements=st.integers(0, 50)
).filter(lambda c: c.sum() > 0)


@settings(max_examples=50, deadline=None)
@given(confusion_stacks, st.sampled_from(["exclude", "zero"]))
def test_bounds_are_ordered_fractions(confusions, absent):
    low, high = bootstrap_miou(confusions, absent=absent, draws=50)
    assert 0 <= low <= high <= 1


@settings(max_examples=50, deadline=None)
@given(confusion_stacks, st.sampled_from(["exclude", "zero"]))
def test_one_image_has_no_spread(confusions, absent):
    one = confusions.sum(0, keepdims=True)
    value = mean_iou(one[0], absent=absent)
    assert bootstrap_miou(one, absent=absent, draws=20) == pytest.approx((value, value))


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.float64, st.integers(2, 30), elements=st.floats(0, 1)))
def test_symmetric_values_lie_around_their_mean(values):
    mirrored = np.concatenate([values, 1 - values])
    low, high = bootstrap_mean(mirrored, draws=500)
    assert low <= 0.5 + 1e-12
    assert high >= 0.5 - 1e-12


def test_image_order_moves_it_only_by_chance():
    rng = np.random.default_rng(0)
    confusions = rng.integers(0, 100, (60, 5, 5))
    bounds = np.array([bootstrap_miou(confusions[rng.permutation(60)]) for _ in range(5)])
    width = (bounds[:, 1] - bounds[:, 0]).mean()
    assert (np.ptp(bounds, axis=0) < 0.1 * width).all()
