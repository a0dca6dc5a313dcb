"""The training augmentation of `dinov3-1`: sizes and crops by hand, colours against an independent formula."""

from __future__ import annotations

import colorsys
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neco_bench.tasks.linear_segmentation.scale_crop import (
    Distortion,
    ScaleCropDistort,
    choose_crop,
    resize_short_side,
    short_side_size,
    varied,
)
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from neco_bench.core.rng import item_rng
from neco_bench.data.base import IGNORE, Sample

NONE = Distortion(0, 32, (0.5, 1.5), (0.5, 1.5), 0.5)
MEAN = (0.485, 0.456, 0.406)
PLAIN = ScaleCropDistort(64, (1, 1), 0.75, 10, 0, NONE, MEAN)


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [
        ((480, 640), 512, (512, 683)),  # 682.67
        ((640, 480), 512, (683, 512)),
        ((512, 683), 512, (512, 683)),
        ((4, 5), 2, (2, 3)),  # 2.5 goes up, where round() gives 2
        ((300, 300), 7, (7, 7)),
    ],
)
def test_the_long_side_by_hand(size: tuple[int, int], short: int, expected: tuple[int, int]) -> None:
    assert short_side_size(*size, short) == expected


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 1100))
def test_the_long_side_is_the_float_formula(height: int, width: int, short: int) -> None:
    long = math.floor(short * max(height, width) / min(height, width) + 0.5)
    assert short_side_size(height, width, short) == ((short, long) if height <= width else (long, short))


def test_the_image_is_resized_by_pillow() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    expected = Image.fromarray(image).resize((67, 50), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resize_short_side(image, 50), np.asarray(expected))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({0: 74, 1: 26}, True),
        ({0: 75, 1: 25}, False),  # less than the share, not as much
        ({0: 100}, False),
        ({3: 70, 9: 30, IGNORE: 900}, True),  # void is no class and no pixel
        ({3: 1, IGNORE: 999}, False),
        ({IGNORE: 10}, False),
    ],
)
def test_which_crops_are_varied(counts: dict[int, int], expected: bool) -> None:
    mask = np.repeat(np.array(list(counts), np.uint8), list(counts.values()))
    assert varied(mask[None], 0.75) is expected
    # A share of 1 still wants two classes.
    assert varied(mask[None], 1.0) is (len(counts.keys() - {IGNORE}) > 1)


class Counting:
    """A generator that notes how often it was asked."""

    def __init__(self) -> None:
        self.rng, self.calls = np.random.default_rng(0), 0

    def integers(self, high: int) -> int:
        self.calls += 1
        return int(self.rng.integers(high))


@pytest.mark.parametrize(("tries", "crops"), [(10, 11), (0, 1)])
def test_a_hopeless_mask_is_tried_ten_times_and_taken_after(tries: int, crops: int) -> None:
    rng = Counting()
    rows, columns = choose_crop(np.zeros((30, 40), np.uint8), 20, 0.75, tries, rng)  # type: ignore[arg-type]
    assert rng.calls == 2 * crops
    assert rows.stop - rows.start == columns.stop - columns.start == 20


def test_the_first_varied_crop_is_taken() -> None:
    """Two classes in the right fifth only: crops that see enough of it are a minority, yet nearly always found."""
    mask = np.zeros((64, 320), np.uint8)
    mask[:, 256:] = 1
    shares = []
    for seed in range(200):
        crop = choose_crop(mask, 64, 0.75, 10, np.random.default_rng(seed))
        first = choose_crop(mask, 64, 0.75, 0, np.random.default_rng(seed))
        assert not varied(mask[first], 0.75) or crop == first
        shares.append((varied(mask[first], 0.75), varied(mask[crop], 0.75)))
    chance, after = np.mean(shares, axis=0)
    assert 0.05 < chance < 0.25  # 32 of 257 places
    assert after == pytest.approx(1 - (1 - chance) ** 11, abs=0.1)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_crops_lie_inside_and_keep_short_sides(height: int, width: int, size: int, seed: int) -> None:
    mask = np.zeros((height, width), np.uint8)
    rows, columns = choose_crop(mask, size, 0.75, 2, np.random.default_rng(seed))
    assert 0 <= rows.start <= max(0, height - size)
    assert 0 <= columns.start <= max(0, width - size)
    assert mask[rows, columns].shape == (min(height, size), min(width, size))


def test_places_of_crops_are_uniform_up_to_the_border() -> None:
    rng = np.random.default_rng(0)
    tops = [choose_crop(np.zeros((13, 10), np.uint8), 10, 0.75, 0, rng)[0].start for _ in range(2000)]
    np.testing.assert_allclose(np.bincount(tops) / 2000, [0.25] * 4, atol=0.04)


def sample(height: int, width: int) -> Sample:
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Sample(image, rng.integers(0, 5, (height, width), dtype=np.uint8), "x")


def test_small_images_are_padded_right_and_below_with_the_mean_and_void() -> None:
    one = sample(32, 48)
    image, mask = replace(PLAIN, scale=(0.5, 0.5))(one, item_rng(0))
    assert image.shape == (3, 64, 64)
    np.testing.assert_array_equal(mask[:32, :48], one.mask)
    assert torch.equal(image[:, :32, :48], torch.from_numpy(one.image).permute(2, 0, 1) / 255)
    assert (mask[32:] == IGNORE).all()
    assert (mask[:, 48:] == IGNORE).all()
    colour = torch.tensor(MEAN)[:, None, None]
    assert torch.equal(image[:, 32:], colour.expand(3, 32, 64))
    assert torch.equal(image[:, :, 48:], colour.expand(3, 64, 16))


def test_the_mask_is_resized_by_the_rule_of_tensors() -> None:
    """torchvision's `nearest` of a tensor, as in the reference; that of a Pillow image differs."""
    one = sample(60, 81)
    _, mask = replace(PLAIN, scale=(0.7, 0.7))(one, item_rng(0))  # 44 x 59: the crop is all of it
    expected = tvf.resize(torch.from_numpy(one.mask)[None], [44, 59], InterpolationMode.NEAREST)[0].numpy()
    np.testing.assert_array_equal(mask[:44, :59], expected)
    pillow = np.asarray(Image.fromarray(one.mask).resize((59, 44), Image.Resampling.NEAREST))
    assert (pillow != expected).mean() > 0.01


def test_the_short_side_is_rounded_down() -> None:
    """64 * 0.999 = 63.9: one row and one column are padded."""
    _, mask = replace(PLAIN, scale=(0.999, 0.999))(sample(64, 64), item_rng(0))
    assert (mask != IGNORE).sum() == 63**2


def test_scales_are_uniform() -> None:
    """Images of one class, 64 x 64: the void share tells r below 1, which a third of the draws are."""
    one = Sample(np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8), "x")
    transform = replace(PLAIN, scale=(0.5, 2.0))
    sides = [np.sqrt((transform(one, item_rng(i))[1] == 0).sum()) for i in range(600)]
    assert np.mean(np.array(sides) < 64) == pytest.approx(1 / 3, abs=0.06)
    assert min(sides) == pytest.approx(32, abs=1)


def test_image_and_mask_move_together_and_half_are_flipped() -> None:
    """A picture of its own mask still shows it after scaling, cropping and flipping, but for the borders."""
    mask = np.repeat(np.repeat(np.arange(12).reshape(3, 4), 40, 0), 40, 1).astype(np.uint8)
    picture = Sample(np.repeat(mask[..., None] * 20, 3, 2), mask, "x")
    transform = replace(PLAIN, size=96, scale=(0.5, 2.0), flip_probability=0.5)
    flipped = []
    for epoch in range(60):
        image, moved = transform(picture, item_rng(0, epoch))
        inside = moved != IGNORE
        assert np.mean(np.abs(image[0].numpy() * 255 / 20 - moved)[inside] < 0.1) > 0.8
        row = moved[0][inside[0]].astype(int)
        if row[0] != row[-1]:
            flipped.append(row[0] > row[-1])
    assert 0.3 < np.mean(flipped) < 0.7


def test_an_item_is_transformed_alike_for_a_seed_and_epoch() -> None:
    transform = ScaleCropDistort(64, (0.5, 2), 0.75, 10, 0.5, replace(NONE, probability=0.5), MEAN)
    (image, mask), (again, mask_again), (other, _) = (
        transform(sample(60, 80), item_rng(0, "augment", epoch, "x")) for epoch in (3, 3, 4)
    )
    assert torch.equal(image, again)
    np.testing.assert_array_equal(mask, mask_again)
    assert not torch.equal(image, other)
    assert (mask[mask != IGNORE] < 5).all()


def distorted(pixels: list[list[int]], seed: int = 0, **changes: Any) -> np.ndarray:
    """(N, 3) pixels after every step of a distortion that otherwise changes nothing."""
    still = Distortion(1, 0, (1, 1), (1, 1), 0)
    return replace(still, **changes)(np.array([pixels], np.uint8), np.random.default_rng(seed))[0]


PIXELS = [[0, 128, 255], [10, 20, 30], [201, 100, 7], [255, 255, 255]]


def test_contrast_saturation_and_brightness_by_hand() -> None:
    array = np.array(PIXELS, float)
    assert distorted(PIXELS).tolist() == PIXELS
    np.testing.assert_array_equal(distorted(PIXELS, contrast=(1.3, 1.3)), np.floor(np.minimum(array * 1.3, 255)))
    np.testing.assert_array_equal(distorted(PIXELS, contrast=(0.55, 0.55)), np.floor(array * 0.55 + 1e-4))
    grey = np.floor(array @ [0.2989, 0.587, 0.114])[:, None]
    mixed = np.floor(np.clip(array * 1.4 - grey * 0.4, 0, 255) + 1e-4)
    np.testing.assert_array_equal(distorted(PIXELS, saturation=(1.4, 1.4)), mixed)
    shifts = {tuple(distorted([[100, 0, 255]], seed, brightness=32)[0].tolist()) for seed in range(100)}
    assert {min(r for r, _, _ in shifts), max(r for r, _, _ in shifts)} <= {*range(68, 73), *range(127, 133)}
    assert all(g == max(0, r - 100) or g == r - 99 for r, g, _ in shifts)
    assert all(b == min(255, r + 155) or b == r + 156 for r, _, b in shifts)


def test_the_hue_turns_the_full_circle() -> None:
    """Red takes hues all round, kept saturated and bright; half a turn of a colour is its opposite."""
    hues = [colorsys.rgb_to_hsv(*(distorted([[255, 0, 0]], seed, hue=0.5)[0] / 255)) for seed in range(300)]
    counts = np.histogram([h for h, _, _ in hues], 6, (0, 1))[0]
    assert counts.min() > 25
    assert min(s * v for _, s, v in hues) > 0.98


def test_each_step_is_taken_half_of_the_time() -> None:
    """On grey, saturation and hue change nothing: brightness and contrast remain, each skipped in half of the cases."""
    half = Distortion(0.5, 32, (0.5, 1.5), (0.5, 1.5), 0.5)
    grey, blue = np.full((1, 1, 3), 100, np.uint8), np.array([[[50, 50, 200]]], np.uint8)
    same = [np.array_equal(half(grey, item_rng(seed)), grey) for seed in range(800)]
    assert np.mean(same) == pytest.approx(1 / 4, abs=0.06)
    same = [np.array_equal(half(blue, item_rng(seed)), blue) for seed in range(800)]
    assert np.mean(same) == pytest.approx(1 / 16, abs=0.03)


def test_contrast_comes_before_or_after_the_colours() -> None:
    """A contrast that clips, then grey; or grey, then contrast: both occur, and nothing else."""
    both = {tuple(distorted([[200, 50, 0]], s, contrast=(1.5, 1.5), saturation=(0.5, 0.5))[0]) for s in range(40)}
    assert len(both) == 2
