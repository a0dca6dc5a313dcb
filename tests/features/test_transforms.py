"""Transforms against torch, torchvision and Pillow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.v2.functional as tvf
from hypothesis import given, settings
from hypothesis import strategies as st
from neco_bench.tasks.in_context import augment
from neco_bench.tasks.in_context.augment import HummingbirdTrain
from neco_bench.tasks.linear_segmentation.augment import CropFlip
from PIL import Image

from neco_bench.core.rng import item_rng
from neco_bench.data.base import Sample
from neco_bench.features.transforms import (
    ResizeSquare,
    crop_box,
    resize_image,
    resize_nearest_pil,
    resize_nearest_torch,
    resize_tensor,
    upsample_argmax,
)

sides = st.integers(1, 600)


@given(sides, sides, sides, sides)
@settings(max_examples=60, deadline=None)
def test_legacy_nearest_equals_torch(height: int, width: int, rows: int, columns: int) -> None:
    mask = np.random.default_rng(0).integers(0, 255, (height, width), dtype=np.uint8)
    torch_way = torch.nn.functional.interpolate(torch.from_numpy(mask)[None, None].float(), (rows, columns))[0, 0]
    np.testing.assert_array_equal(resize_nearest_torch(mask, rows, columns), torch_way.numpy())


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.sampled_from(["noise", "shares", "few", "constant"]),
    st.integers(0, 9),
)
@settings(max_examples=300, deadline=None)
def test_the_largest_map_is_that_of_all_upsampled(
    shape: tuple[int, int, int], size: tuple[int, int], kind: str, seed: int
) -> None:
    maps = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if kind == "shares":
        maps = (3 * maps).softmax(0)
    elif kind == "few":  # whole maps of zeros, and ties
        maps = (maps > 1.5).float()
    elif kind == "constant":
        maps[:] = 0.25
    whole = torch.nn.functional.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    classes = upsample_argmax(maps, *size)
    values = whole.gather(0, classes[None])[0]
    # Where a value lies in memory decides how PyTorch rounds it, so that even equal maps may differ in the last digit.
    rounding = 1e-6 * float(maps.abs().max())
    assert (values >= whole.amax(0) - rounding).all()
    alone = (whole >= whole.amax(0) - rounding).sum(0) == 1
    assert torch.equal(classes[alone], whole.argmax(0)[alone])


def test_maps_that_are_nowhere_the_largest_are_not_upsampled(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.rand(50, 6, 6) * 0.1
    maps[[3, 40]] += torch.tensor([0.5, 1.0])[:, None, None]
    upsampled, plain = [], torch.nn.functional.interpolate

    def interpolate(values: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        upsampled.append(values.shape[1])
        return plain(values, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "interpolate", interpolate)
    assert (upsample_argmax(maps, 48, 48) == 40).all()
    assert upsampled == [1]


def test_the_two_nearest_rules_differ() -> None:
    """By hand: 4 -> 2 rows; the legacy rule takes rows 0 and 2, the centre rule rows 1 and 3."""
    mask = np.arange(4, dtype=np.uint8)[:, None]
    assert resize_nearest_torch(mask, 2, 1).ravel().tolist() == [0, 2]
    assert resize_nearest_pil(mask, 2, 1).ravel().tolist() == [1, 3]


def test_resize_equals_torchvision_on_pillow_images() -> None:
    image = np.random.default_rng(0).integers(0, 256, (57, 91, 3), dtype=np.uint8)
    theirs = T.ToTensor()(T.Resize((32, 48))(Image.fromarray(image)))
    assert torch.equal(resize_image(image, 32, 48), theirs)


def test_resize_equals_torchvision_on_tensors() -> None:
    image = torch.rand(3, 57, 91)
    for size in ((32, 48), (70, 120)):
        assert torch.equal(resize_tensor(image, *size), tvf.resize(image, list(size), antialias=True))


@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue"])
def test_colours_change_as_by_torchvision(name: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (57, 91, 3), dtype=np.uint8))
    for factor in np.linspace(-0.5, 0.5, 41) + (0 if name == "adjust_hue" else 1):
        ours, theirs = getattr(augment, name)(image, factor), getattr(tvf, name)(image, factor)
        assert np.array_equal(np.asarray(ours), np.asarray(theirs)), factor


@given(
    st.integers(8, 300),
    st.integers(8, 300),
    st.integers(0, 1000),
    st.sampled_from([(3 / 4, 4 / 3), (1e9, 1e9), (1e-9, 1e-9)]),
)
@settings(max_examples=100, deadline=None)
def test_crop_box_stays_inside(height: int, width: int, seed: int, ratio: tuple[float, float]) -> None:
    top, left, h, w = crop_box(np.random.default_rng(seed), (height, width), (0.5, 2.0), ratio)
    assert top >= 0
    assert left >= 0
    assert 0 < h <= height - top
    assert 0 < w <= width - left


def test_crop_box_has_the_shares_measured_on_the_reference() -> None:
    """4:3 images: area share 0.5 to 1 with mean 0.71, about 15 % fallbacks, which are the whole image there."""
    rng = np.random.default_rng(0)
    boxes = [crop_box(rng, (360, 480), (0.5, 2.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    shares = [height * width / (480 * 360) for _, _, height, width in boxes]
    assert min(shares) > 0.49
    assert np.mean(shares) == pytest.approx(0.71, abs=0.01)
    assert np.mean(np.array(shares) == 1) == pytest.approx(0.15, abs=0.02)


def sample() -> Sample:
    rng = np.random.default_rng(1)
    return Sample(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8), rng.integers(0, 5, (60, 80), dtype=np.uint8), "x")


@pytest.mark.parametrize(
    "transform",
    [
        ResizeSquare(48, "torch"),
        HummingbirdTrain(48, 0.1, 0.5, (0.5, 2.0), (0.75, 4 / 3)),
        CropFlip(48, (0.8, 1), (0.75, 4 / 3), 0.5),
    ],
)
def test_an_item_is_transformed_alike_for_a_seed_and_epoch(transform: ResizeSquare) -> None:
    image, mask = transform(sample(), item_rng(0, "augment", 3, "x"))
    again, mask_again = transform(sample(), item_rng(0, "augment", 3, "x"))
    other, _ = transform(sample(), item_rng(0, "augment", 4, "x"))
    assert image.shape == (3, 48, 48)
    assert mask.shape == (48, 48)
    assert float(image.min()) >= -1e-6
    assert float(image.max()) <= 1 + 1e-6
    assert torch.equal(image, again)
    np.testing.assert_array_equal(mask, mask_again)
    assert isinstance(transform, ResizeSquare) or not torch.equal(image, other)


def test_image_and_mask_move_together() -> None:
    """A picture of its own mask still shows it after cropping and flipping, but for the borders."""
    mask = np.repeat(np.repeat(np.arange(12).reshape(3, 4), 40, 0), 40, 1).astype(np.uint8)
    picture = Sample(np.repeat(mask[..., None] * 20, 3, 2), mask, "x")
    for transform in (CropFlip(96, (0.8, 1), (0.75, 4 / 3), 0.5), HummingbirdTrain(96, 0, 0, (0.5, 1), (0.75, 4 / 3))):
        for epoch in range(6):
            image, moved = transform(picture, item_rng(0, epoch))
            assert np.mean(np.abs(image[0].numpy() * 255 / 20 - moved) < 0.1) > 0.85
