"""Intervals: cases by hand, a naive loop, properties, and the ends where leaving out shows nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import t

from neco_bench.core.errors import NumericalError
from neco_bench.core.sampling import Sampling
from neco_bench.metrics.bootstrap import bootstrap_mean
from neco_bench.metrics.intervals import estimate, estimates, mean_interval, miou_interval, pck_interval, wilson
from neco_bench.metrics.segmentation import AbsentClasses, mean_iou
from neco_bench.metrics.sums import category_sums, mean_sums, merged, miou_sums, ratio_sums
from tests.typed import present

# Class 2 occurs in no image; image 1 lacks class 1 but predicts it once.
HAND = np.array(
    [
        [[3, 1, 0], [0, 4, 0], [0, 0, 0]],
        [[2, 1, 0], [0, 0, 0], [0, 0, 0]],
        [[4, 0, 0], [1, 1, 0], [0, 0, 0]],
    ]
)


def naive(values: float, without: np.ndarray) -> tuple[float, float]:
    """Wilson's interval with as many trials as have the variance and squared bias that leaving out shows."""
    value, n = values, len(without)
    variance = (n - 1) / n * np.square(without - without.mean()).sum() + ((n - 1) * (without.mean() - value)) ** 2
    return wilson(value, value * (1 - value) / variance, float(t.ppf(0.975, n - 1)))


@pytest.mark.parametrize("absent", ["exclude", "zero", "union"])
def test_same_as_a_naive_loop(absent: AbsentClasses) -> None:
    rng = np.random.default_rng(3)
    confusions = rng.integers(0, 6, (7, 4, 4)) * (rng.random((7, 4, 1)) < 0.4)  # most images lack most classes
    whole = np.arange(7)
    without = np.array([mean_iou(confusions[whole != i].sum(0), absent=absent) for i in whole])
    expected = naive(mean_iou(confusions.sum(0), absent=absent), without)
    assert miou_interval(confusions, absent=absent) == pytest.approx(expected)


def test_the_mean_has_student_s_interval() -> None:
    values = np.random.default_rng(1).normal(2, 1, 30)
    half = t.ppf(0.975, 29) * values.std(ddof=1) / 30**0.5
    expected = (values.mean() - half, values.mean() + half)
    assert mean_interval(values, fraction=False) == pytest.approx(expected)


def test_the_root_of_a_mean_of_squares() -> None:
    squares = np.random.default_rng(1).gamma(2, 0.1, 12)
    value, without = squares.mean() ** 0.5, np.array([np.delete(squares, i).mean() ** 0.5 for i in range(12)])
    variance = 11 / 12 * np.square(without - without.mean()).sum() + (11 * (without.mean() - value)) ** 2
    half = t.ppf(0.975, 11) * variance**0.5
    found = estimate(mean_sums(squares, root=True, fraction=False))
    assert found.value == pytest.approx(value)
    assert found.interval().ends == pytest.approx((value - half, value + half))


def test_groups_are_left_out_whole() -> None:
    rng = np.random.default_rng(2)
    scores, group = rng.random(20), np.repeat(np.arange(8), [1, 2, 3, 4, 1, 2, 3, 4])
    without = np.array([scores[group != g].mean() for g in range(8)])
    found = estimate(mean_sums(scores), Sampling("sequence", group)).interval()
    assert found.ends == pytest.approx(naive(scores.mean(), without))
    assert (found.unit, found.units, found.method) == ("sequence", 8, "delete-one-sequence jackknife")


def test_an_image_is_left_out_with_all_its_pairs_within_its_category() -> None:
    hits, totals = np.array([1, 2, 0, 3, 4, 2]), np.array([2, 2, 3, 4, 5, 4])
    category, images = np.array([0, 0, 0, 1, 1, 1]), np.array([[0, 1], [1, 2], [2, 0], [3, 4], [4, 5], [5, 3]])

    def pck(keep: np.ndarray) -> float:
        return float(np.mean([hits[k].sum() / totals[k].sum() for k in (keep & (category == c) for c in (0, 1))]))

    value, variance, bias = pck(np.ones(6, bool)), 0.0, 0.0
    for own in ((0, 1, 2), (3, 4, 5)):
        without = np.array([pck(~(images == i).any(1)) for i in own])
        variance += 2 / 3 * np.square(without - without.mean()).sum()
        bias += 2 * (value - without.mean())
    expected = wilson(value, value * (1 - value) / (variance + bias**2), float(t.ppf(0.975, 4)))
    assert pck_interval(hits, totals, category, images, mean="categories") == pytest.approx(expected)


def test_weights_of_categories_stay_when_an_image_is_left_out() -> None:
    hits, totals = np.array([3, 4, 1, 0, 2, 2]), np.array([3, 4, 2, 3, 4, 5])
    category = np.array([0, 0, 1, 1, 1, 1])
    sums = category_sums(hits, totals, category, mean="totals")
    assert float(sums.value()) == pytest.approx(hits.sum() / totals.sum())
    effects = estimate(sums).effects
    assert effects[0] == pytest.approx(0)  # of two that were all found one is left, still all found
    assert effects[:2] == pytest.approx(effects[1::-1])


def test_masks_of_void_alone_are_an_error() -> None:
    with pytest.raises(NumericalError, match="3 images to score on have no labelled pixel"):
        miou_interval(np.zeros((3, 2, 2), int))


def test_one_item_has_no_interval() -> None:
    one = np.zeros((4, 2, 2), int)
    one[2] = [[3, 1], [0, 2]]  # the other images are void
    assert miou_interval(one) is miou_interval(one[2:3]) is None
    assert mean_interval(np.array([0.3])) is None
    found = estimate(ratio_sums(np.array([0, 2]), np.array([0, 5]))).interval()
    assert (found.ends, found.units, found.notes) == (None, 1, ("one image: nothing is known of the spread",))


@pytest.mark.parametrize("hits", [0, 1])
def test_where_all_items_agree_there_is_a_one_sided_bound(hits: int) -> None:
    """Of 0 hits in 80, Wilson's bound is 1.96² / (80 + 1.96²); that of Clopper and Pearson is 4.5 %, no more."""
    bound = 1.96**2 / (80 + 1.96**2)
    expected = (1 - bound, 1) if hits else (0, bound)
    assert mean_interval(np.full(80, float(hits))) == pytest.approx(expected, abs=1e-5)
    points = np.arange(1, 81)
    assert estimate(ratio_sums(hits * points, points)).interval().ends == pytest.approx(expected, abs=1e-5)
    sharing = np.stack([np.arange(80) % 20, 20 + np.arange(80) % 7], 1)  # of 27 images: 13 pairs at most are apart
    bound = 1.96**2 / (13 + 1.96**2)
    expected = (1 - bound, 1) if hits else (0, bound)
    assert pck_interval(hits * points, points, np.zeros(80, int), sharing, mean="totals") == pytest.approx(
        expected, abs=1e-5
    )
    confusions = np.array([[[4, 0], [0, 4]], [[0, 4], [4, 0]]])[1 - hits]
    found = miou_interval(np.repeat(confusions[None], 80, 0))
    assert found == pytest.approx((1 - 1.96**2 / (80 + 1.96**2), 1) if hits else (0, 0.045818), abs=1e-5)


def test_items_that_agree_between_the_ends_are_no_certainty() -> None:
    low, high = present(mean_interval(np.full(10, 0.6)))
    z, n, p = 1.959964, 10, 0.6  # the roots of (p - x)² = z² x (1 - x) / n
    roots = np.roots([1 + z**2 / n, -2 * p - z**2 / n, p**2])
    assert (low, high) == pytest.approx(sorted(roots))
    assert mean_interval(np.full(10, 7.0), fraction=False) is None  # no share: nothing bounds its variance


def test_repeats_widen_the_interval_by_their_spread() -> None:
    hard = np.random.default_rng(0).normal(0.5, 0.2, 50)
    alone = estimate(mean_sums(hard, fraction=False))
    three = estimate(merged([mean_sums(hard + step, fraction=False) for step in (-0.101, 0.0, 0.101)]))
    assert three.value == pytest.approx(alone.value)
    first, second = alone.sampling_variance[0], 0.101**2 / 3
    assert three.sampling_variance[0] == pytest.approx(first)
    assert three.variance[0] == pytest.approx(first + second)
    assert three.variance[1] == pytest.approx((first + second) ** 2 / (first**2 / 49 + second**2 / 2))
    assert three.interval().repeats == 3


def test_frames_that_depend_on_each_other_are_drawn_in_blocks() -> None:
    rng = np.random.default_rng(0)
    walk = np.convolve(rng.normal(0, 1, 120), np.ones(20) / 20, "valid")[:101]
    scores = 0.5 + 0.1 * walk
    one_drive = Sampling("frame", np.zeros(101, int))
    alone, blocks = (estimate(mean_sums(scores), sampling) for sampling in (Sampling(), one_drive))
    assert alone.length == 1
    assert blocks.length == 25  # a fourth of the frames is the most
    assert blocks.variance[0] > 4 * alone.variance[0]
    found = blocks.interval()
    assert (found.unit, found.units, found.groups) == ("frame", 4, 1)
    assert found.method == "moving blocks of 25 frames"
    assert found.notes == ("frames of one drive: nothing is known of other drives", "fewer than 6 units")
    shuffled = estimate(mean_sums(rng.permutation(scores)), one_drive)
    assert shuffled.length < 8


def test_blocks_do_not_cross_drives() -> None:
    sampling = Sampling("frame", np.repeat([0, 1], [7, 12]))
    units = estimate(mean_sums(np.random.default_rng(0).random(19)), sampling).units
    assert units.blocks(5).tolist() == [0] * 7 + [1] * 5 + [2] * 7


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_interval(np.array([])),
        lambda: mean_interval(np.array([1.0, np.nan])),
        lambda: miou_interval(np.zeros((0, 3, 3), int)),
        lambda: estimate(ratio_sums(np.array([0]), np.array([0]))),
    ],
)
def test_undefined_is_an_error(call: Callable[[], object]) -> None:
    with pytest.raises(NumericalError):
        call()


confusion_stacks = hnp.arrays(
    np.int64, st.tuples(st.integers(1, 5), st.just(3), st.just(3)), elements=st.integers(0, 50)
).filter(lambda c: c.sum() > 0)


@settings(max_examples=50, deadline=None)
@given(confusion_stacks, st.sampled_from(["exclude", "zero"]))
def test_bounds_hold_the_value_and_are_fractions(confusions: np.ndarray, absent: AbsentClasses) -> None:
    interval = miou_interval(confusions, absent=absent)
    value = mean_iou(confusions.sum(0), absent=absent)
    assert interval is None or 0 <= interval[0] - 1e-12 <= value <= interval[1] + 1e-12 <= 1 + 2e-12


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.float64, st.integers(2, 30), elements=st.floats(0, 1)))
def test_order_does_not_matter(values: np.ndarray) -> None:
    assert mean_interval(values) == pytest.approx(mean_interval(values[::-1].copy()))
    assert bootstrap_mean(values, seed=3) == mean_interval(values)


def test_large_counts_stay_exact() -> None:
    confusions = np.array([[[10**12, 1], [1, 10**12]]] * 3)
    assert (estimate(miou_sums(confusions)).effects == 0).all()


def test_several_metrics_are_estimated_each_alone() -> None:
    hits, totals, category = np.array([1, 2, 3, 0]), np.array([2, 2, 4, 4]), np.array([0, 0, 1, 1])
    first, second = estimates(category_sums(hits, totals, category, apart=True))
    assert (first.value, second.value) == (3 / 4, 3 / 8)
    assert first.informative.tolist() == [True, True, False, False]
