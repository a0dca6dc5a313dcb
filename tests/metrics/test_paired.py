"""Paired tests: p by hand, exactness, items that carry information, and adjustment."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from neco_bench.core.errors import NumericalError
from neco_bench.core.sampling import Sampling
from neco_bench.metrics.paired import holm, paired_difference, sign_flips
from neco_bench.metrics.sums import SumMetric, category_sums, class_iou_sums, mean_sums, merged, miou_sums, ratio_sums


def test_all_of_three_images_improve() -> None:
    """The exact p is 2 / 2³ = 0.25; so few units have none."""
    p, exact = sign_flips(np.ones((3, 1)))
    assert (p.tolist(), exact.tolist()) == ([0.25], [True])
    (found,) = paired_difference(ratio_sums(np.zeros(3), np.full(3, 2)), ratio_sums(np.ones(3), np.full(3, 2)))
    assert (found.value, found.units) == (0.5, 3)
    assert np.isnan(found.p)


@pytest.mark.parametrize("count", [6, 9, 12])
def test_few_units_have_the_exact_p(count: int) -> None:
    parts = np.random.default_rng(count).normal(0.3, 1, count)
    sums = [abs(np.dot(signs, parts)) for signs in product((-1, 1), repeat=count)]
    expected = np.mean(np.array(sums) >= abs(parts.sum()) * (1 - 1e-12))
    p, exact = sign_flips(parts[:, None])
    assert exact[0]
    assert p[0] == pytest.approx(expected)


def test_the_smallest_p_is_two_in_draws_and_one() -> None:
    for draws in (99, 1000):
        p, exact = sign_flips(np.ones((40, 1)), draws=draws)
        assert not exact[0]
        assert p[0] == 2 / (draws + 1)


def test_units_that_do_not_differ_change_nothing() -> None:
    parts = np.random.default_rng(0).normal(0.2, 1, 11)
    more = np.concatenate([parts, np.zeros(200)])
    assert sign_flips(more[:, None])[0] == sign_flips(parts[:, None])[0]


def test_many_units_agree_with_student_s_t() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(200)
    second = first + rng.normal(0.02, 0.1, 200)
    (found,) = paired_difference(mean_sums(first), mean_sums(second))
    assert found.test == "sign flips"
    expected = ttest_rel(second, first)
    assert found.p == pytest.approx(expected.pvalue, abs=0.01)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_exchanging_the_models_is_exact_for_mious() -> None:
    """All patterns of exchange of nine images, computed from whole confusions: p is of the sum of single exchanges."""
    rng = np.random.default_rng(4)
    first, second = rng.integers(0, 30, (2, 9, 3, 3)) + 20 * np.eye(3, dtype=int)
    second[:, 1] = second[:, 1] * (first[:, 1].sum(1, keepdims=True) > 0)
    (found,) = paired_difference(miou_sums(first, "union"), miou_sums(second, "union"))
    middle, statistic = (first.sum(0) + second.sum(0)) / 2, miou_sums(first, "union").statistic

    def value(total: np.ndarray) -> float:
        hits, union, truth = np.diag(total), total.sum(0) + total.sum(1) - np.diag(total), total.sum(1)
        return float(statistic(np.concatenate([hits, union, truth])[None])[0, 0])

    parts = np.array([value(middle + step) - value(middle - step) for step in (second - first) / 2])
    sums = np.array([abs(np.dot(signs, parts)) for signs in product((-1, 1), repeat=9)])
    assert found.p == pytest.approx(np.mean(sums >= abs(parts.sum()) - 1e-12))
    back = paired_difference(miou_sums(second, "union"), miou_sums(first, "union"))[0]
    assert (back.p, back.value) == pytest.approx((found.p, -found.value))


def test_items_are_those_in_which_a_class_differs() -> None:
    confusions = np.zeros((50, 3, 3), int)
    confusions[:, 0, 0] = 90
    confusions[:7, 1, 1] = 10
    other = confusions.copy()
    other[:7, 1, 1], other[:7, 1, 0] = 4, 6
    found = {d.units for d in paired_difference(class_iou_sums(confusions), class_iou_sums(other))[:2]}
    assert found == {7}
    empty = paired_difference(class_iou_sums(confusions), class_iou_sums(other))[2]
    assert np.isnan([empty.value, empty.low, empty.p]).all()


def test_a_model_with_itself() -> None:
    hits, totals = np.array([1, 0, 2, 1, 2, 1, 0]), np.full(7, 2)
    (same,) = paired_difference(ratio_sums(hits, totals), ratio_sums(hits, totals))
    assert (same.value, same.low, same.high, same.units) == (0, 0, 0, 0)
    assert np.isnan(same.p)


def test_what_cannot_be_paired() -> None:
    with pytest.raises(NumericalError, match="cannot be paired"):
        paired_difference(ratio_sums(np.ones(4), np.ones(4)), ratio_sums(np.ones(3), np.ones(3)))


def test_one_item_tells_nothing_about_a_difference() -> None:
    hits, totals = np.array([0.0, 4.0]), np.array([0.0, 9.0])  # the first item has nothing to count
    (one_of_two,) = paired_difference(ratio_sums(hits, totals), ratio_sums(hits + np.array([0, 2]), totals))
    assert one_of_two.value == pytest.approx(2 / 9)
    assert np.isnan([one_of_two.low, one_of_two.high, one_of_two.p]).all()


def test_the_spread_of_seeds_is_in_the_test() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0.5, 0.2, 60)
    means: dict[float, list[SumMetric]] = {0.51: [], 0.41: []}
    for mean, sides in means.items():
        sides += [mean_sums(hard + mean + step, fraction=False) for step in (-0.101, 0.0, 0.101)]
    first, second = (merged(sides) for sides in means.values())
    shuffled = merged([means[0.41][i] for i in (1, 2, 0)])  # seeds of two models have nothing in common
    (found,) = paired_difference(first, shuffled)
    assert found.test == "t"
    assert found.value == pytest.approx(-0.1)
    assert found.p > 0.2
    assert found.low < 0 < found.high
    assert paired_difference(means[0.51][0], means[0.41][0])[0].p < 0.001  # of one seed: all images agree
    assert second.columns.shape == shuffled.columns.shape


def test_pairs_that_share_images_are_tested_by_their_images() -> None:
    rng = np.random.default_rng(0)
    images = np.array([(a, b) for a in range(12) for b in range(12) if a != b])
    totals, category = np.full(len(images), 6), np.zeros(len(images), int)
    ease = rng.normal(0, 1, (2, 12))
    sides = [rng.binomial(totals, 1 / (1 + np.exp(-one[images].sum(1)))) for one in ease]
    first, second = (category_sums(hits, totals, category, mean="totals") for hits in sides)
    (found,) = paired_difference(first, second, Sampling("pair", images=images))
    (naive,) = paired_difference(first, second)
    assert (found.unit, found.units, found.test) == ("image", 12, "t")
    assert found.p > naive.p


def test_blocks_of_frames_are_exchanged_together() -> None:
    rng = np.random.default_rng(1)
    walk = np.convolve(rng.normal(0, 1, 120), np.ones(10) / 10, "valid")[:101]
    first, second = mean_sums(np.full(101, 0.4)), mean_sums(0.42 + 0.1 * walk)
    (found,) = paired_difference(first, second, Sampling("frame", np.zeros(101, int)))
    assert found.unit == "block of frames"
    assert found.units < 12


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm(values: list[float]) -> None:
    adjusted = holm(np.array([*values, np.nan]))
    assert np.isnan(adjusted[-1])
    order = np.argsort(values, kind="stable")
    for rank, i in enumerate(order):
        expected = max(values[j] * (len(values) - r) for r, j in enumerate(order[: rank + 1]))
        assert adjusted[i] == pytest.approx(min(1, expected))
