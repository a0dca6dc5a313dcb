"""Segmentation metrics: cases by hand, an independent implementation, properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score

from neco_bench.core.errors import BadInputError
from neco_bench.metrics import segmentation

TRUTH = np.array([[0, 0, 1], [1, 255, 2], [2, 2, 255]])
GUESS = np.array([[0, 1, 1], [1, 1, 2], [0, 2, 0]])


def test_by_hand_with_void_and_an_absent_class() -> None:
    confusion = segmentation.confusion_matrix(TRUTH, GUESS, 4)
    expected = np.array([[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(confusion, expected)
    np.testing.assert_allclose(segmentation.iou_per_class(confusion), [1 / 3, 2 / 3, 2 / 3, np.nan])
    assert segmentation.mean_iou(confusion, absent="exclude") == pytest.approx(5 / 9)
    assert segmentation.mean_iou(confusion, absent="zero") == pytest.approx(5 / 12)


def test_class_without_truth_is_absent_even_where_predicted() -> None:
    confusion = np.array([[3, 1], [0, 0]])
    assert segmentation.mean_iou(confusion, absent="exclude") == pytest.approx(3 / 4)
    assert segmentation.mean_iou(confusion, absent="zero") == pytest.approx(3 / 8)


def test_nothing_but_void_has_no_miou() -> None:
    assert np.isnan(segmentation.mean_iou(np.zeros((3, 3), int), absent="exclude"))


@pytest.mark.parametrize(("truth", "guess"), [([0, 3], [0, 0]), ([0, -1], [0, 0]), ([0, 1], [0, 3]), ([0, 1], [-1, 0])])
def test_ids_out_of_range(truth: list[int], guess: list[int]) -> None:
    with pytest.raises(BadInputError, match=r"outside 0\.\.2"):
        segmentation.confusion_matrix(np.array(truth), np.array(guess), 3)


def test_matching_of_neco_protocol() -> None:
    """The self-test of NeCo's over-clustering: both matchings give IoUs 1, 2/3, 1/2."""
    truth = np.array([0, 0, 1, 1, 2, 2])
    many = segmentation.confusion_matrix(truth, np.array([3, 3, 1, 1, 1, 0]), 3, clusters=4)
    mapping = segmentation.majority_match(many)
    np.testing.assert_array_equal(mapping, [2, 1, 0, 0])
    np.testing.assert_allclose(
        segmentation.iou_per_class(segmentation.merge_clusters(many, mapping)), [1, 2 / 3, 1 / 2]
    )

    one = segmentation.confusion_matrix(truth, np.array([1, 1, 2, 2, 2, 0]), 3)
    merged = segmentation.merge_clusters(one, segmentation.hungarian_match(one))
    np.testing.assert_allclose(segmentation.iou_per_class(merged), [1, 2 / 3, 1 / 2])
    assert segmentation.mean_iou(merged, absent="zero") == pytest.approx(0.7222, abs=5e-5)


def test_majority_ties_go_to_the_lowest_class_and_empty_clusters_to_zero() -> None:
    np.testing.assert_array_equal(segmentation.majority_match(np.array([[0, 2, 0], [1, 2, 0]])), [1, 0, 0])


labels = arrays(np.int64, st.integers(1, 200), elements=st.integers(0, 4))


@given(labels, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_equals_scikit_learn(truth: np.ndarray, seed: int) -> None:
    guess = np.random.default_rng(seed).integers(0, 5, truth.shape)
    confusion = segmentation.confusion_matrix(truth, guess, 5)
    np.testing.assert_array_equal(confusion, sklearn_confusion(truth, guess, labels=range(5)))
    iou = np.nan_to_num(segmentation.iou_per_class(confusion))
    np.testing.assert_allclose(iou, jaccard_score(truth, guess, average=None, labels=range(5), zero_division=0))


@given(labels, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_hungarian_is_the_best_assignment_and_never_below_identity(truth: np.ndarray, seed: int) -> None:
    guess = np.random.default_rng(seed).integers(0, 5, truth.shape)
    confusion = segmentation.confusion_matrix(truth, guess, 5)
    # Independently: one boolean mask per class and cluster, as the reference scans them.
    iou = np.array(
        [
            [np.sum((truth == c) & (guess == k)) / max(1, np.sum((truth == c) | (guess == k))) for k in range(5)]
            for c in range(5)
        ]
    )
    rows, columns = linear_sum_assignment(-iou)
    merged = segmentation.merge_clusters(confusion, segmentation.hungarian_match(confusion))
    matched = np.nan_to_num(segmentation.iou_per_class(merged)).sum()
    assert matched == pytest.approx(iou[rows, columns].sum())
    assert matched >= np.nan_to_num(segmentation.iou_per_class(confusion)).sum() - 1e-12


def test_image_confusions_agree_with_the_dense_way() -> None:
    rng = np.random.default_rng(0)
    truths, guesses = rng.integers(0, 4, (2, 3, 8, 8))
    truths[:, 0] = 255
    guesses = guesses + rng.integers(0, 3, guesses.shape)
    mapping = rng.integers(0, 4, 6)
    sparse = segmentation.ImageConfusions(4, 6)
    for truth, guess in zip(truths, guesses, strict=True):
        sparse.add(truth, guess)
    dense = np.stack([segmentation.confusion_matrix(t, g, 4, clusters=6) for t, g in zip(truths, guesses, strict=True)])
    assert len(sparse) == 3
    np.testing.assert_array_equal(sparse.total(), dense.sum(0))
    np.testing.assert_array_equal(sparse.per_image(mapping), segmentation.merge_clusters(dense, mapping))
