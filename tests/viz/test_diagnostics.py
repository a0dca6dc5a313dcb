"""Diagnostics on features whose answer is known, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from neco_bench.viz.diagnosis import draw_diagnosis
from neco_bench.viz.diagnostics import (
    effective_rank,
    neighbour_purity,
    norm_outliers,
    positional_leakage,
    principal_colours,
    principal_shares,
    relative_norms,
    shift_sensitivity,
)
from tests.command import neco


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_norm_outliers_are_counted() -> None:
    maps = torch.nn.functional.normalize(noise(3, 8, 10, 10), dim=1)
    assert norm_outliers(maps) == 0
    maps[0, :, 2, 3] *= 10
    maps[2, :, 0, 0] *= 3.5
    maps[1, :, 5, 5] *= 2.9
    assert norm_outliers(maps) == pytest.approx(2 / 300)
    norms = relative_norms(maps)
    assert (norms[0, 2, 3], norms[1, 5, 5], norms[1, 0, 0]) == pytest.approx((10, 2.9, 1), abs=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_effective_rank_of_equal_directions(rank: int) -> None:
    basis = torch.linalg.qr(noise(16, 16)).Q[:rank]
    rows = torch.eye(rank).repeat(64 // rank, 1) @ basis
    maps = rows.T.reshape(1, 16, 8, 8)
    assert effective_rank(maps) == pytest.approx(rank, rel=0.01)


def test_positional_leakage_is_read_from_held_out_images() -> None:
    maps = noise(20, 12, 8, 8)
    assert positional_leakage(maps) < 0.05
    line = torch.linspace(-1, 1, 8)
    told = maps.clone()
    told[:, 0], told[:, 1] = line[:, None], line[None, :]
    assert positional_leakage(told) > 0.99
    half = maps.clone()
    half[:, 0] = line[:, None].expand(8, 8)
    assert positional_leakage(half) == pytest.approx(0.5, abs=0.05)


def test_purity_looks_into_other_images_only() -> None:
    labels = np.random.default_rng(0).integers(0, 4, (6, 5, 5))
    centres = noise(4, 16, seed=1)
    maps = centres[torch.from_numpy(labels)].permute(0, 3, 1, 2) + 0.01 * noise(6, 16, 5, 5)
    assert neighbour_purity(maps, labels) == 1
    own = labels.copy()
    own[:] = np.arange(6)[:, None, None]  # a class of its own for each image: none is found elsewhere
    assert neighbour_purity(maps, own) == 0
    void = labels.copy()
    void[labels == 2] = 255
    assert neighbour_purity(maps, void) == 1
    assert np.isnan(neighbour_purity(maps[:1], labels[:1]))


def test_features_that_move_with_the_image_are_not_sensitive() -> None:
    wide = noise(2, 8, 6, 9)
    maps, shifted = wide[..., :8], wide[..., 1:]
    assert shift_sensitivity(maps, shifted) == pytest.approx(0, abs=1e-6)
    assert shift_sensitivity(maps, maps) > 0.8
    assert shift_sensitivity(maps, -shifted) == pytest.approx(2, abs=1e-6)


def test_colours_separate_what_differs_most() -> None:
    maps = 0.01 * noise(2, 8, 4, 4)
    maps[:, 3, :, 2:] += 1
    colours = principal_colours(maps)
    left, right = colours[:, :, :2, 0].astype(int), colours[:, :, 2:, 0].astype(int)
    assert abs(left.mean() - right.mean()) > 200
    assert principal_colours(noise(1, 2, 4, 4)).shape == (1, 4, 4, 3)
    shares = principal_shares(maps)
    assert shares[0] > 0.99
    assert sum(principal_shares(noise(1, 2, 4, 4))) == pytest.approx(1)


def test_norms_that_are_all_equal_are_not_drawn() -> None:
    images = [np.zeros((16, 16, 3), np.uint8)] * 2
    maps = noise(2, 8, 4, 4)
    with_norms = draw_diagnosis(images, images, maps, "a model")
    without = draw_diagnosis(images, images, torch.nn.functional.normalize(maps, dim=1), "a model")
    assert (with_norms.width, without.width) == (4 * 164 - 4, 3 * 164 - 4)
    long = draw_diagnosis(images, images, maps, "a name that is never cut " * 20)
    assert long.height > with_norms.height


def test_command(tmp_path: Path) -> None:
    picture = tmp_path / "hog.png"
    code, out, err = neco("diagnose", "baseline_hog", "--images", 4, "--picture", picture, "--json")
    assert code == 0, err
    values = {row["diagnostic"]: row["value"] for row in json.loads(out)}
    assert set(values) == {
        "norm outliers",
        "effective rank",
        "positional leakage",
        "neighbour purity",
        "shift sensitivity",
    }
    assert 0 < values["neighbour purity"] < 1
    with Image.open(picture) as image:
        assert image.width in (3 * 164 - 4, 4 * 164 - 4)
        assert image.height > 4 * 164
        assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 100
    assert neco("diagnose", "baseline_hog", "--images", 1).code == 2
    assert neco("diagnose", "baseline_hog", "--dataset", "shapes_pairs").code == 2
