"""J and F: by hand, and against an independent computation with scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from neco_bench.metrics.video import (
    Boundary,
    FrameScores,
    boundary_accuracy,
    boundary_map,
    disk,
    region_similarity,
    tolerance,
)


def mask(*rows: str) -> np.ndarray:
    return np.array([[cell == "x" for cell in row] for row in rows])


CORNER, MIDDLE, EMPTY = mask("xx.", "xx.", "..."), mask("...", ".x.", "..."), mask("...", "...", "...")


def test_region_similarity_by_hand() -> None:
    assert region_similarity(CORNER, MIDDLE) == 1 / 4
    assert region_similarity(CORNER, CORNER) == 1
    assert region_similarity(EMPTY, EMPTY) == 1
    assert region_similarity(EMPTY, MIDDLE) == 0


def test_boundaries_by_hand() -> None:
    """A pixel is on the boundary where the one to the right, below or below to the right differs."""
    assert (boundary_map(MIDDLE) == mask("xx.", "xx.", "...")).all()
    assert (boundary_map(CORNER) == mask(".x.", "xx.", "...")).all()
    assert not boundary_map(EMPTY).any()
    assert (boundary_map(mask("..x")) == mask(".x.")).all()  # the last row is compared with the right alone
    assert (boundary_map(mask(".", ".", "x")) == mask(".", "x", ".")).all()
    assert not boundary_map(mask("x")).any()


def test_boundary_accuracy_by_hand() -> None:
    """Of MIDDLE's four boundary pixels three are CORNER's, all of CORNER's are MIDDLE's; within 1 pixel all match."""
    exact = [Boundary.of(m, 0) for m in (MIDDLE, CORNER)]
    assert boundary_accuracy(*exact) == pytest.approx(2 * 0.75 * 1 / 1.75)
    near = [Boundary.of(m, 1) for m in (MIDDLE, CORNER)]
    assert boundary_accuracy(*near) == 1
    nothing, something = Boundary.of(EMPTY, 1), Boundary.of(MIDDLE, 1)
    assert boundary_accuracy(nothing, something) == boundary_accuracy(something, nothing) == 0
    assert boundary_accuracy(nothing, nothing) == 1


def test_the_tolerance_is_that_of_davis() -> None:
    assert tolerance((480, 854)) == 8
    assert (disk(1) == [[0, 1, 0], [1, 1, 1], [0, 1, 0]]).all()
    assert disk(8).sum() == 197  # lattice points of a circle of radius 8


def test_frame_scores_by_hand() -> None:
    """Nine frames: quarters are frames 1-3 and 7-9, which share the frames that divide them with their neighbours."""
    found = FrameScores.of(np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]))
    assert found.mean == pytest.approx(0.6)
    assert found.recall == pytest.approx(5 / 9)
    assert found.decay == pytest.approx(0.9 - 0.3)


def independent_f(prediction: np.ndarray, truth: np.ndarray) -> float:
    """F by distances: neighbour comparison by shifted copies, matches by Euclidean distance to the nearest boundary."""

    def edges(m: np.ndarray) -> np.ndarray:
        right, below, both = m.copy(), m.copy(), m.copy()
        right[:, :-1], below[:-1], both[:-1, :-1] = m[:, 1:], m[1:], m[1:, 1:]
        both[-1, :-1], both[:-1, -1] = m[-1, 1:], m[1:, -1]
        return (m ^ right) | (m ^ below) | (m ^ both)

    first, second = edges(prediction), edges(truth)
    if not first.any() or not second.any():
        return float(first.any() == second.any())
    radius = np.ceil(0.008 * np.linalg.norm(truth.shape))
    to_first, to_second = (ndimage.distance_transform_edt(~e) for e in (first, second))
    precision, recall = (to_second[first] <= radius).mean(), (to_first[second] <= radius).mean()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def test_boundary_accuracy_against_distances_on_random_masks() -> None:
    rng = np.random.default_rng(0)
    values = []
    for i in range(200):
        shape = tuple(rng.integers(3, 240, 2))
        smooth = [ndimage.gaussian_filter(rng.standard_normal(shape), rng.uniform(0, 12)) for _ in range(2)]
        pair = [field > np.quantile(field, rng.uniform(0.3, 1.0)) for field in smooth]
        if i % 10 == 0:
            pair[i // 10 % 2][:] = False
        if i % 3 == 0:  # one is the other, moved by a few pixels
            pair[1] = np.roll(pair[0], tuple(rng.integers(-4, 5, 2)), (0, 1))
        values.append(boundary_accuracy(*map(Boundary.of, pair)))
        assert values[-1] == pytest.approx(independent_f(*pair), abs=1e-12), (i, shape)
    assert 0.2 < np.mean(values) < 0.9
    assert {0.0, 1.0} <= set(values)
