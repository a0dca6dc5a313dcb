"""Errors of depth and normals: by hand on 3 x 3 pixels, against other implementations, and their invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mean_absolute_percentage_error, root_mean_squared_error, root_mean_squared_log_error

from neco_bench.core.metric import metric_named
from neco_bench.metrics.dense import DEPTH_METRICS, LIMITS, NORMAL_METRICS, angles, depth_errors, normal_errors


def test_depth_by_hand() -> None:
    """3 x 3 pixels of which one has no depth, so that eight count."""
    truth = np.array([[1.0, 2, 4], [0, 1, 2], [4, 1, 2]])
    found = np.array([[1.0, 2, 4], [9, 2, 1], [2, 1.25, 2.4]])
    errors = depth_errors(found[truth > 0], truth[truth > 0])
    # Differences: 0, 0, 0, 1, -1, -2, 0.25, 0.4; ratios: 1, 1, 1, 2, 1/2, 1/2, 1.25, 1.2.
    assert errors["rmse"] == pytest.approx(math.sqrt((1 + 1 + 4 + 0.0625 + 0.16) / 8))
    assert errors["abs_rel"] == pytest.approx((1 + 0.5 + 0.5 + 0.25 + 0.2) / 8)
    assert errors["sq_rel"] == pytest.approx((1 + 0.5 + 1 + 0.0625 + 0.08) / 8)
    assert errors["log10"] == pytest.approx((3 * math.log10(2) + math.log10(1.25) + math.log10(1.2)) / 8)
    logs = [0, 0, 0, math.log(2), -math.log(2), -math.log(2), math.log(1.25), math.log(1.2)]
    assert errors["rmse_log"] == pytest.approx(math.sqrt(sum(g * g for g in logs) / 8))
    mean = sum(logs) / 8
    assert errors["silog"] == pytest.approx(100 * math.sqrt(sum(g * g for g in logs) / 8 - mean**2))
    assert (errors["d1"], errors["d2"], errors["d3"]) == (4 / 8, 5 / 8, 5 / 8)  # 1.25 itself is not below 1.25


def test_normals_by_hand() -> None:
    """3 x 3 pixels: right angles, an opposite, 45 degrees, one of another length, and one without a normal."""
    x, y, z, none = (1.0, 0, 0), (0.0, 1, 0), (0.0, 0, 1), (0.0, 0, 0)
    truth = np.array([[x, x, x], [y, y, z], [z, z, none]])
    found = np.array(
        [[x, y, (-1.0, 0, 0)], [(0, 5.0, 0), (1.0, 1, 0), z], [z, (0, math.tan(math.radians(20)), 1.0), x]]
    )
    counts = truth.any(2)
    errors = normal_errors(found[counts], truth[counts])
    expected = [0, 90, 180, 0, 45, 0, 0, 20]
    assert np.allclose(angles(found[counts], truth[counts]), expected)
    assert errors["mean_angle"] == pytest.approx(335 / 8)
    assert errors["median_angle"] == pytest.approx(10)
    assert errors["rmse_angle"] == pytest.approx(math.sqrt((90**2 + 180**2 + 45**2 + 20**2) / 8))
    assert [errors[f"within_{limit:g}"] for limit in LIMITS] == [4 / 8, 5 / 8, 5 / 8]


def test_depth_against_scikit_learn_and_plain_loops() -> None:
    rng = np.random.default_rng(0)
    truth, found = rng.uniform(1, 10, 500), rng.uniform(1, 10, 500)
    errors = depth_errors(found, truth)
    assert errors["rmse"] == pytest.approx(root_mean_squared_error(truth, found), rel=1e-12)
    assert errors["abs_rel"] == pytest.approx(mean_absolute_percentage_error(truth, found), rel=1e-12)
    assert errors["rmse_log"] == pytest.approx(root_mean_squared_log_error(truth - 1, found - 1), rel=1e-9)
    below = [0, 0, 0]
    for p, d in zip(found, truth, strict=True):
        for power in (1, 2, 3):
            below[power - 1] += p / d < 1.25**power and d / p < 1.25**power
    assert [errors[f"d{power}"] for power in (1, 2, 3)] == [count / 500 for count in below]


def test_normals_against_cross_products() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 400, 3))
    plain = np.degrees(np.arctan2(np.linalg.norm(np.cross(first, second), axis=1), (first * second).sum(1)))
    assert np.allclose(angles(first, second), plain, atol=1e-6)
    errors = normal_errors(first, second)
    assert errors["median_angle"] == pytest.approx(np.sort(plain)[[199, 200]].mean(), abs=1e-6)
    assert errors["within_30"] == (plain < 30).mean()


@given(st.floats(0.1, 10), st.integers(0, 2**31))
def test_scale_moves_only_what_has_a_unit(factor: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, found = rng.uniform(0.5, 5, (2, 40))
    one, other = depth_errors(found, truth), depth_errors(factor * found, factor * truth)
    for name in DEPTH_METRICS:
        scale = factor if name in ("rmse", "sq_rel") else 1
        assert other[name] == pytest.approx(scale * one[name], rel=1e-9, abs=1e-12)


def test_units_and_directions() -> None:
    """Every error is lower-better under its unit, also by region and over seeds; shares are percent."""
    for name in DEPTH_METRICS:
        for full in (name, f"{name}/eigen", f"{name}_std"):
            metric = metric_named(full)
            assert metric.lower_is_better is (name not in ("d1", "d2", "d3")), full
            assert metric.unit == ("metres" if name == "rmse" else "percent" if name[0] == "d" else "ratio"), full
    for name in NORMAL_METRICS:
        metric = metric_named(name)
        assert (metric.unit, metric.lower_is_better) == (
            ("percent", False) if name.startswith("within") else ("degrees", True)
        )


def test_nothing_to_score_is_undefined() -> None:
    assert all(math.isnan(value) for value in depth_errors(np.empty(0), np.empty(0)).values())
    assert all(math.isnan(value) for value in normal_errors(np.empty((0, 3)), np.empty((0, 3))).values())
