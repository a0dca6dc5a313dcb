"""Hand-computed cases, a naive loop over the same draws, and properties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from neco_bench.core.errors import NumericalError
from neco_bench.metrics import bootstrap
from neco_bench.metrics.bootstrap import (
    bootstrap_mean,
    bootstrap_miou,
    bootstrap_ratio,
    class_iou_sums,
    holm,
    miou_sums,
    paired_difference,
    ratio_sums,
)
from neco_bench.metrics.segmentation import mean_iou
from tests.typed import present

# Class 2 occurs in no image; image 1 lacks class 1 but predicts it once.
HAND = np.array(
    [
        [[3, 1, 0], [0, 4, 0], [0, 0, 0]],
        [[2, 1, 0], [0, 0, 0], [0, 0, 0]],
    ]
)


def picks(n: int, draws: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n, (draws, n))


def test_hand_computed() -> None:
    # Draws of two images, {0,0}: ious 6/8, 8/10; {1,1}: 4/6 (class 1 has no truth); {0,1}: 5/7, 4/6.
    twice_0, mixed, twice_1 = (3 / 4 + 4 / 5) / 2, (5 / 7 + 4 / 6) / 2, 2 / 3
    assert bootstrap_miou(HAND, level=1.0) == pytest.approx((twice_1, twice_0))
    assert bootstrap_miou(HAND, level=0.2) == pytest.approx((mixed, mixed))
    # As zero: class 2 counts as 0, class 1 is left out of the draw that misses it.
    lowest = min(2 / 3, mixed)
    assert bootstrap_miou(HAND, absent="zero", level=1.0) == pytest.approx((2 / 3 * lowest, 2 / 3 * twice_0))


@pytest.mark.parametrize("absent", ["exclude", "zero"])
def test_same_as_a_naive_loop(absent: Any) -> None:
    rng = np.random.default_rng(3)
    confusions = rng.integers(0, 6, (7, 4, 4)) * (rng.random((7, 4, 1)) < 0.4)  # most images lack most classes
    # A class that only the draw lacks is left out; one that all images lack counts as 0 under "zero".
    share = 1 if absent == "exclude" else (confusions.sum((0, 2)) > 0).mean()
    values = [share * mean_iou(confusions[draw].sum(0), absent="exclude") for draw in picks(7, 500, seed=5)]
    expected = np.nanquantile(values, [0.05, 0.95])
    assert bootstrap_miou(confusions, absent=absent, draws=500, seed=5, level=0.9) == pytest.approx(tuple(expected))


def test_draws_without_ground_truth_are_left_out() -> None:
    confusions = np.zeros((3, 2, 2), int)
    confusions[0] = confusions[1] = [[3, 1], [0, 0]]
    confusions[1, 0, 1] = 3
    assert bootstrap_miou(confusions, level=1.0) == (0.5, 0.75)


@pytest.mark.parametrize("absent", ["exclude", "zero", "union"])
def test_masks_of_void_alone_are_an_error(absent: Any) -> None:
    with pytest.raises(NumericalError, match="3 images to score on have no labelled pixel"):
        bootstrap_miou(np.zeros((3, 2, 2), int), absent=absent)


def test_a_class_that_a_draw_misses_does_not_count_as_zero() -> None:
    """Twelve images of a common class and one rare class in two of them, both well found: the value is inside."""
    confusions = np.zeros((12, 3, 3), int)
    confusions[:, 0, 0] = np.arange(80, 92)
    confusions[:, 0, 2] = np.arange(12)
    confusions[6:, 0, 1] = 1
    confusions[3:5, 1, 1] = 40, 70
    value = mean_iou(confusions.sum(0), absent="zero")
    low, high = present(bootstrap_miou(confusions, absent="zero"))
    plain = present(bootstrap_miou(confusions, absent="exclude"))
    assert (low, high) == pytest.approx([2 / 3 * end for end in plain])  # the third class occurs nowhere
    assert low < value < high
    assert low > 0.9 * value


def test_one_item_has_no_interval() -> None:
    one = np.zeros((4, 2, 2), int)
    one[2] = [[3, 1], [0, 2]]  # the other images are void
    assert bootstrap_miou(one) is bootstrap_miou(one[2:3]) is None
    assert bootstrap_mean(np.array([0.3])) is None
    assert bootstrap_ratio(np.array([0, 2]), np.array([0, 5])) is None
    assert bootstrap_ratio(np.array([2]), np.array([5]), images=np.array([[0, 1]])) is None


@pytest.mark.parametrize("hits", [0, 1])
def test_where_all_items_agree_there_is_a_one_sided_bound(hits: int) -> None:
    """Of 0 hits in 80, Wilson's bound is 1.96² / (80 + 1.96²); that of Clopper and Pearson is 4.5 %, no more."""
    bound = 1.96**2 / (80 + 1.96**2)
    expected = (1 - bound, 1) if hits else (0, bound)
    assert bootstrap_mean(np.full(80, float(hits))) == pytest.approx(expected, abs=1e-5)
    points = np.arange(1, 81)
    assert bootstrap_ratio(hits * points, points) == pytest.approx(expected, abs=1e-5)
    sharing = np.stack([np.arange(80) % 20, 20 + np.arange(80) % 7], 1)  # of 27 images: 13 pairs at most are apart
    bound = 1.96**2 / (13 + 1.96**2)
    expected = (1 - bound, 1) if hits else (0, bound)
    assert bootstrap_ratio(hits * points, points, images=sharing) == pytest.approx(expected, abs=1e-5)
    confusions = np.array([[[4, 0], [0, 4]], [[0, 4], [4, 0]]])[1 - hits]
    low, high = present(bootstrap_miou(np.repeat(confusions[None], 80, 0)))
    assert (low, high) == pytest.approx((1 - 1.96**2 / (80 + 1.96**2), 1) if hits else (0, 0.045818), abs=1e-5)


def test_items_that_agree_between_the_ends_are_no_certainty() -> None:
    low, high = present(bootstrap_mean(np.full(10, 0.6)))
    z, n, p = 1.959964, 10, 0.6  # the roots of (p - x)² = z² x (1 - x) / n
    roots = np.roots([1 + z**2 / n, -2 * p - z**2 / n, p**2])
    assert (low, high) == pytest.approx(sorted(roots))
    assert bootstrap_mean(np.full(10, 7.0)) is None  # no share: nothing bounds its variance


def test_grouped_ratio_same_as_a_naive_loop() -> None:
    hits, totals = np.array([1, 2, 0, 3, 4]), np.array([2, 2, 3, 4, 5])
    groups = np.array([7, 7, 3, 3, 9])

    def macro(draw: np.ndarray) -> np.floating:
        parts = [(hits[draw][groups[draw] == g].sum(), totals[draw][groups[draw] == g].sum()) for g in (3, 7, 9)]
        return np.mean([h / t for h, t in parts if t])

    expected = np.quantile([macro(draw) for draw in picks(5, 300)], [0.025, 0.975])
    assert bootstrap_ratio(hits, totals, groups, draws=300) == pytest.approx(tuple(expected))
    pooled = [hits[draw].sum() / totals[draw].sum() for draw in picks(5, 300)]
    assert bootstrap_ratio(hits, totals, draws=300) == pytest.approx(tuple(np.quantile(pooled, [0.025, 0.975])))


def test_mean_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(2, 1, 2000)
    low, high = present(bootstrap_mean(values))
    half = 1.96 * values.std() / np.sqrt(2000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.002)


def test_pieces_do_not_move_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bootstrap_miou(HAND, draws=1000, level=0.5), bootstrap_mean(np.arange(11.0) ** 2, draws=1000)
    monkeypatch.setattr(bootstrap, "_CHUNK", 37)
    assert (bootstrap_miou(HAND, draws=1000, level=0.5), bootstrap_mean(np.arange(11.0) ** 2, draws=1000)) == whole


def test_large_counts_stay_exact() -> None:
    confusions = np.array([[[10**12, 1], [1, 10**12]]] * 3)
    assert (bootstrap._resampled(miou_sums(confusions), 10, 0) == 10**12 / (10**12 + 2)).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_mean(np.array([])),
        lambda: bootstrap_mean(np.array([1.0, np.nan])),
        lambda: bootstrap_miou(np.zeros((0, 3, 3), int)),
        lambda: bootstrap_ratio(np.array([0]), np.array([0])),
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
def test_bounds_are_ordered_fractions(confusions: np.ndarray, absent: Any) -> None:
    interval = bootstrap_miou(confusions, absent=absent, draws=50)
    assert interval is None or 0 <= interval[0] < interval[1] <= 1


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.float64, st.integers(2, 30), elements=st.floats(0, 1)))
def test_symmetric_values_lie_around_their_mean(values: np.ndarray) -> None:
    low, high = present(bootstrap_mean(np.concatenate([values, 1 - values]), draws=500))
    assert low <= 0.5 + 1e-12
    assert high >= 0.5 - 1e-12


def test_image_order_moves_it_only_by_chance() -> None:
    rng = np.random.default_rng(0)
    confusions = rng.integers(0, 100, (60, 5, 5))
    bounds = np.array([bootstrap_miou(confusions[rng.permutation(60)]) for _ in range(5)])
    width = (bounds[:, 1] - bounds[:, 0]).mean()
    assert (np.ptp(bounds, axis=0) < 0.1 * width).all()


def simulated(rng: np.random.Generator, images: int, skill: np.ndarray) -> np.ndarray:
    """Per-image confusions (n, 4, 4): difficulty and class sizes differ between images, `skill` (4,) is the recall."""
    sizes = rng.gamma(1.0, 300, (images, 4)).astype(int)
    ease = np.clip(skill + rng.normal(0, 0.15, (images, 1)), 0.02, 0.98)
    right = rng.binomial(sizes, ease)
    wrong = sizes - right
    confusion = np.zeros((images, 4, 4), np.int64)
    for c in range(4):
        confusion[:, c, c] = right[:, c]
        for other in range(1, 4):
            part = wrong[:, c] // 3 + (other <= wrong[:, c] % 3)
            confusion[:, c, (c + other) % 4] = part
    return confusion


SKILL = np.array([0.9, 0.7, 0.6, 0.4])


def test_intervals_cover_the_true_value() -> None:
    rng = np.random.default_rng(0)
    truth = mean_iou(simulated(rng, 400_000, SKILL).sum(0), absent="exclude")
    inside = 0
    for seed in range(600):
        low, high = present(bootstrap_miou(simulated(rng, 100, SKILL), draws=1000, seed=seed))
        inside += low <= truth <= high
    assert 0.93 <= inside / 600 <= 0.97


def test_the_paired_test_rejects_a_true_null_as_often_as_it_says() -> None:
    """Two models of equal skill, whose errors on an image go together: 5 % within three simulation errors."""
    rng = np.random.default_rng(1)
    rejected = 0
    for seed in range(600):
        images = simulated(rng, 100, SKILL)
        truth = images.sum(2)
        sides = []
        for _ in range(2):  # the same images, each model some of their pixels otherwise
            side = images.copy()
            moved = rng.binomial(np.einsum("nii->ni", images), 0.1 * rng.random((100, 1)))
            for c in range(4):
                side[:, c, c] -= moved[:, c]
                side[:, c, (c + 1) % 4] += moved[:, c]
            assert (side.sum(2) == truth).all()
            sides.append(miou_sums(side))
        (difference,) = paired_difference(*sides, draws=1000, seed=seed)
        rejected += difference.p < 0.05
        assert (difference.p < 0.05) == (difference.low > 0 or difference.high < 0) or 0.03 < difference.p < 0.07
    assert abs(rejected / 600 - 0.05) <= 3 * np.sqrt(0.05 * 0.95 / 600)


def test_paired_difference_by_hand() -> None:
    hits, more, totals = np.array([1, 0, 2, 1]), np.array([2, 1, 2, 2]), np.full(4, 2)
    (same,) = paired_difference(ratio_sums(hits, totals), ratio_sums(hits, totals))
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    (better,) = paired_difference(ratio_sums(hits, totals), ratio_sums(more, totals), draws=2000)
    draws = picks(4, 2000)
    expected = np.quantile((more - hits)[draws].sum(1) / 8, [0.025, 0.975])
    assert (better.value, better.low, better.high) == pytest.approx((3 / 8, *expected))
    assert better.p == pytest.approx(2 * (((more - hits)[draws].sum(1) == 0).sum() + 1) / 2001)
    with pytest.raises(NumericalError, match="cannot be paired"):
        paired_difference(ratio_sums(hits, totals), ratio_sums(more[:3], totals[:3]))


def test_one_item_tells_nothing_about_a_difference() -> None:
    hits, totals = np.array([3.0]), np.array([7.0])
    (alone,) = paired_difference(ratio_sums(hits, totals), ratio_sums(hits + 2, totals))
    assert alone.value == pytest.approx(2 / 7)
    assert np.isnan([alone.low, alone.high, alone.p]).all()
    hits, totals = np.array([0.0, 4.0]), np.array([0.0, 9.0])  # the first item has nothing to count
    (one_of_two,) = paired_difference(ratio_sums(hits, totals), ratio_sums(hits + np.array([0, 2]), totals))
    assert np.isnan(one_of_two.p)


def test_classes_are_compared_each_on_its_own() -> None:
    other = HAND.copy()
    other[0, 0] = [4, 0, 0]
    differences = paired_difference(class_iou_sums(HAND), class_iou_sums(other))
    assert [d.value for d in differences[:2]] == pytest.approx([6 / 7 - 5 / 7, 4 / 5 - 4 / 6])
    assert np.isnan(differences[2].value)
    assert np.isnan(differences[2].p)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm(values: list[float]) -> None:
    adjusted = holm(np.array([*values, np.nan]))
    assert np.isnan(adjusted[-1])
    order = np.argsort(values, kind="stable")
    for rank, i in enumerate(order):
        expected = max(values[j] * (len(values) - r) for r, j in enumerate(order[: rank + 1]))
        assert adjusted[i] == pytest.approx(min(1, expected))


def paired_images(rng: np.random.Generator, spread: float, images: int = 40, pairs: int = 240) -> tuple:
    """Hits and points of pairs of images whose difficulty differs by `spread`; the mean over all such images is 1/2."""
    ease = rng.normal(0, spread, images)
    first = rng.integers(0, images, pairs)
    second = (first + rng.integers(1, images, pairs)) % images
    totals = rng.integers(3, 9, pairs)
    hits = rng.binomial(totals, 1 / (1 + np.exp(-(ease[first] + ease[second]))))
    return hits.astype(float), totals.astype(float), np.stack([first, second], 1)


@pytest.mark.parametrize("spread", [0.0, 0.8])
def test_coverage_where_pairs_share_images(spread: float) -> None:
    rng = np.random.default_rng(0)
    naive = covered = 0
    for _ in range(300):
        hits, totals, images = paired_images(rng, spread)
        bounds = [present(bootstrap_ratio(hits, totals, images=shared, draws=400)) for shared in (None, images)]
        naive += bounds[0][0] <= 0.5 <= bounds[0][1]
        covered += bounds[1][0] <= 0.5 <= bounds[1][1]
    assert 0.91 < covered / 300 < 0.99
    if spread:  # as if every pair were its own: far too narrow
        assert naive / 300 < 0.7


def test_pairs_without_common_images_are_independent() -> None:
    rng = np.random.default_rng(1)
    hits, totals = rng.integers(0, 4, 50).astype(float), np.full(50, 4.0)
    apart = np.arange(100).reshape(50, 2)
    plain = present(bootstrap_ratio(hits, totals, draws=500))
    assert bootstrap_ratio(hits, totals, images=apart, draws=500) == pytest.approx(plain)
    doubled = np.concatenate([hits, hits])  # each pair twice, there and back: as if there were half as many
    both_ways = np.concatenate([apart, apart[:, ::-1]])
    wide = present(bootstrap_ratio(doubled, np.full(100, 4.0), images=both_ways, draws=4000))
    narrow = present(bootstrap_ratio(doubled, np.full(100, 4.0), draws=4000))
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(2**0.5, rel=0.02)


def test_a_result_that_knows_no_images_is_compared_as_its_partner() -> None:
    hits, totals, images = paired_images(np.random.default_rng(3), 0.8)
    known, unknown = (ratio_sums(hits, totals, images=shared) for shared in (images, None))
    other = [ratio_sums(np.roll(hits, 1).clip(max=totals), totals, images=shared) for shared in (images, None)]
    expected = paired_difference(known, other[0], draws=200)
    assert paired_difference(known, other[1], draws=200) == expected
    assert paired_difference(unknown, other[0], draws=200) == expected
    assert paired_difference(unknown, other[1], draws=200)[0].high < expected[0].high


def test_paired_difference_of_pairs_that_share_images() -> None:
    rng = np.random.default_rng(2)
    rejected = [0, 0]
    for _ in range(200):
        ease, hits = rng.normal(0, 1, (2, 40)), []
        first = rng.integers(0, 40, 200)
        second = (first + rng.integers(1, 40, 200)) % 40
        for own in ease:
            hits.append(rng.binomial(5, 1 / (1 + np.exp(-(own[first] + own[second])))))
        for k, images in enumerate((None, np.stack([first, second], 1))):
            sums = [ratio_sums(h, np.full(200, 5), images=images) for h in hits]
            rejected[k] += paired_difference(*sums, draws=300)[0].p < 0.05
    assert rejected[0] > 60
    assert rejected[1] <= 20  # 5 % of 200, and three and a half standard errors of the simulation
