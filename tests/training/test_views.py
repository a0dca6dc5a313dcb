"""Crops, boxes, colours and ROI-align: worked values, and agreement of views of one image."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torchvision.transforms.functional import normalize

from neco_bench.core.errors import BadInputError, UsageError
from neco_bench.core.rng import item_rng
from neco_bench.encoders import load_encoder
from neco_bench.training import views
from neco_bench.training.batches import Item, TrainBatch, collate
from neco_bench.training.regions import align
from neco_bench.training.views import ViewSettings, make_views, random_crop, sample_crops, shared_boxes, vary_colours

SMALL = ViewSettings(global_size=56, local_size=28)
PLAIN = ViewSettings(jitter_probability=0, gray_probability=0, blur_probability=0)


def picture(width: int = 160, height: int = 120) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_worked_boxes() -> None:
    """The example of protocols/neco.md 1.3."""
    crops = np.array(
        [
            (100, 50, 400, 350),
            (200, 100, 600, 400),
            (250, 150, 350, 250),
            (180, 120, 300, 220),
            (300, 200, 420, 320),
            (210, 110, 260, 160),
        ]
    )
    gc, every = shared_boxes(crops, (224, 224, 98, 98, 98, 98))
    assert gc.shape == (2, 6, 4)
    assert every.shape == (6, 2, 4)
    worked = [
        (gc[0, 1], (74.6667, 37.3333, 224, 224)),
        (gc[0, 2], (112, 74.6667, 186.6667, 149.3333)),
        (gc[0, 4], (149.3333, 112, 224, 201.6)),
        (gc[1, 0], (0, 0, 112, 186.6667)),
        (gc[1, 3], (0, 14.9333, 56, 89.6)),
        (every[0, 1], (74.6667, 37.3333, 224, 224)),
        (every[1, 0], (0, 0, 112, 186.6667)),
        (every[3, 0], (0, 0, 98, 98)),
        (every[3, 1], (16.3333, 0, 98, 98)),
        (every[4, 0], (0, 0, 81.6667, 98)),
    ]
    for got, expected in worked:
        np.testing.assert_allclose(got, expected, atol=6e-5)
    for i in range(2):
        np.testing.assert_array_equal(gc[i, i], (0, 0, 224, 224))
        np.testing.assert_array_equal(every[i, i], (0, 0, 224, 224))


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 700), st.integers(20, 700), st.integers(0, 2**32))
def test_crops_lie_inside_and_overlap(width: int, height: int, seed: int) -> None:
    if max(width, height) > 6 * min(width, height):
        return
    crops = sample_crops(width, height, SMALL, np.random.default_rng(seed))
    assert crops.shape == (6, 4)
    assert (crops[:, :2] >= 0).all()
    assert (crops[:, 2:] <= (width, height)).all()
    assert (crops[:, 2:] > crops[:, :2]).all()
    least = math.floor(0.01 * width * height)
    for view in range(1, 6):
        for other in range(min(view, 2)):
            low = np.maximum(crops[view, :2], crops[other, :2])
            sides = np.minimum(crops[view, 2:], crops[other, 2:]) - low
            assert (sides > 0).all()
            assert sides.prod() > (2 * least if view == 1 else least)


def test_crop_areas_and_aspects_follow_their_distribution() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop(4000, 4000, (0.05, 0.25), (3 / 4, 4 / 3), rng) for _ in range(4000)])
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    area = w * h / 4000**2
    assert 0.049 < area.min() < 0.052
    assert 0.248 < area.max() < 0.251
    assert area.mean() == pytest.approx(0.15, abs=0.004)
    assert np.log(w / h).mean() == pytest.approx(0, abs=0.012)
    assert np.abs(np.log(w / h)).max() == pytest.approx(math.log(4 / 3), abs=0.005)
    x, y = (boxes[:, :2] / (4000 - np.stack((w, h), 1))).mean(0)
    assert (x, y) == (pytest.approx(0.5, abs=0.02), pytest.approx(0.5, abs=0.02))


def test_a_crop_that_never_fits_falls_back_to_the_centre() -> None:
    rng = np.random.default_rng(0)
    assert random_crop(1000, 60, (1.0, 1.0), (3 / 4, 4 / 3), rng) == (460, 0, 540, 60)
    assert random_crop(60, 1000, (1.0, 1.0), (3 / 4, 4 / 3), rng) == (0, 460, 60, 540)


def test_an_image_too_thin_to_crop_is_refused() -> None:
    with pytest.raises(BadInputError, match="no crops of this 1000 x 1 image overlap enough"):
        make_views(picture(1000, 1), SMALL, np.random.default_rng(0))


def test_views_have_their_shapes_and_depend_on_the_item_alone() -> None:
    first, again, other = (make_views(picture(), SMALL, item_rng(0, 3, name)) for name in ("a", "a", "b"))
    assert first.global_views.shape == (2, 3, 56, 56)
    assert first.local_views.shape == (4, 3, 28, 28)
    assert first.gc.shape == (2, 6, 4)
    assert first.all.shape == (6, 2, 4)
    assert {first.global_views.dtype, first.local_views.dtype} == {torch.uint8}
    assert {first.gc.dtype, first.all.dtype} == {torch.float32}
    assert torch.equal(first.global_views, again.global_views)
    assert torch.equal(first.local_views, again.local_views)
    assert torch.equal(first.gc, again.gc)
    assert not torch.equal(first.gc, other.gc)


def test_views_without_local_crops() -> None:
    views = make_views(picture(), ViewSettings(global_size=28, local_size=14, locals=0), np.random.default_rng(0))
    assert (views.local_views.shape, views.local_views.dtype) == ((0, 3, 14, 14), torch.uint8)
    assert views.all.shape == (2, 2, 4)


def test_colours_are_left_alone_without_the_pipeline_and_normalised_as_by_torchvision() -> None:
    images = np.full((50, 60, 3), 128, dtype=np.uint8), picture()
    made = collate([Item(make_views(image, PLAIN, np.random.default_rng(0)), "", []) for image in images])
    assert isinstance(made, TrainBatch)
    assert (made.global_views[0] == 128).all()
    encoder = load_encoder("baseline_rgb", device="cpu")
    ready = made.normalised(encoder, torch.device("cpu"))
    for name in ("global_views", "local_views"):
        pixels = getattr(made, name)
        assert pixels.is_contiguous()
        expected = normalize(pixels.float().div(255), list(encoder.mean), list(encoder.std))
        assert torch.equal(getattr(ready, name), expected)


def test_colour_steps_happen_as_often_as_they_should() -> None:
    image = Image.fromarray(picture(24, 24))
    rng = np.random.default_rng(0)
    results = [np.asarray(vary_colours(image, SMALL, rng)).astype(int) for _ in range(600)]
    untouched = np.mean([(r == np.asarray(image)).all() for r in results])
    gray = np.mean([(r[..., 0] == r[..., 1]).all() and (r[..., 0] == r[..., 2]).all() for r in results])
    assert untouched == pytest.approx(0.2 * 0.8 * 0.5, abs=0.04)
    assert gray == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize(
    ("strength", "spread", "hue"), [(1.0, (0.2, 1.8), 0.2), (0.5, (0.6, 1.4), 0.1), (4.0, (0.0, 4.2), 0.5)]
)
def test_colours_vary_within_the_bounds_of_the_protocol(
    strength: float, spread: tuple[float, float], hue: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """protocols/neco.md 1.2: factors U(1 - 0.8 s, 1 + 0.8 s), hue U(-0.2 s, 0.2 s), blur of U(0.1, 2.0) pixels."""
    drawn: dict[str, list[float]] = {}
    bounds = dict.fromkeys(("brightness", "contrast", "saturation"), spread) | {"hue": (-hue, hue)}

    def noting(name: str) -> Callable[..., Image.Image]:
        def adjust(image: Image.Image, factor: float) -> Image.Image:
            drawn.setdefault(name, []).append(factor)
            return image

        return adjust

    for name in bounds:
        monkeypatch.setattr(views.tf, f"adjust_{name}", noting(name))
    image = Image.fromarray(picture(4, 4))
    of = ViewSettings(jitter_probability=1, jitter_strength=strength, gray_probability=0, blur_probability=0)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        vary_colours(image, of, rng)
    for name, (low, high) in bounds.items():
        assert low <= min(drawn[name]) < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < max(drawn[name]) <= high
        assert np.mean(drawn[name]) == pytest.approx((low + high) / 2, abs=0.03 * (high - low))


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_blur_radius_follows_its_distribution(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    radii: list[float] = []

    def blur(radius: float) -> ImageFilter.Filter:
        radii.append(radius)
        return ImageFilter.BoxBlur(0)

    monkeypatch.setattr(views.ImageFilter, "GaussianBlur", blur)
    of = ViewSettings(jitter_probability=0, gray_probability=0, blur_probability=1, blur_strength=strength)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        vary_colours(Image.fromarray(picture(4, 4)), of, rng)
    assert min(radii) == pytest.approx(0.1 * strength, abs=0.01 * strength)
    assert max(radii) == pytest.approx(2 * strength, rel=0.01)


def test_align_by_hand() -> None:
    """A box over a 14 x 14 map, 7 x 7 cells: each is the mean of 2 x 2 tokens. Its right half: of 2 x 1 tokens."""
    features = torch.arange(196.0).view(1, 1, 14, 14)
    boxes = torch.tensor([[[0.0, 0, 196, 196], [98, 0, 196, 196]]])
    whole, half = align(features, boxes, 14)[0, :, :, 0]
    means = features[0, 0].unfold(0, 2, 2).unfold(1, 2, 2).mean((2, 3))
    torch.testing.assert_close(whole, means.flatten())
    torch.testing.assert_close(half, features[0, 0, :, 7:].unfold(0, 2, 2).mean(2).flatten())


@pytest.mark.parametrize("seed", range(5))
def test_aligned_features_of_two_views_agree(seed: int) -> None:
    """Features that are the place in the image, linear in it, are the same whichever view they are taken from."""
    width, height, stride = 160, 120, 1
    crops = sample_crops(width, height, SMALL, np.random.default_rng(seed))
    gc, every = (torch.from_numpy(boxes)[None] for boxes in shared_boxes(crops, SMALL.sizes))
    maps = []
    for (x1, y1, x2, y2), size in zip(crops.tolist(), SMALL.sizes, strict=True):
        centre = (torch.arange(size // stride, dtype=torch.float64) + 0.5) * stride / size
        x, y = (x1 + centre * (x2 - x1)).expand(len(centre), -1), (y1 + centre * (y2 - y1)).expand(len(centre), -1).T
        maps.append(torch.stack((x, y))[None])
    for c in range(2):
        teacher = align(maps[c], gc[:, c], stride)
        assert teacher.shape == (1, 6, 49, 2)
        for v in range(6):
            student = align(maps[v], every[:, v, c][:, None], stride)[:, 0]
            # Samples in the outer half token are held at the border: a quarter of a token, and one view's scale.
            scale = max((crops[k, 2:] - crops[k, :2]).max() / SMALL.sizes[k] for k in (c, v))
            torch.testing.assert_close(student, teacher[:, v], atol=0.5 * scale, rtol=0)
            inner = torch.arange(49).view(7, 7)[2:5, 2:5].flatten()
            shared = gc[0, c, v, 2:] - gc[0, c, v, :2], every[0, v, c, 2:] - every[0, v, c, :2]
            if min(sides.min() for sides in shared) >= 7:  # then the inner cells are away from all borders
                torch.testing.assert_close(student[:, inner], teacher[:, v, inner], atol=1e-9, rtol=0)


def test_align_tells_wrong_boxes() -> None:
    with pytest.raises(UsageError, match=r"boxes must be \(1, regions, 4\), not \(4,\)"):
        align(torch.zeros(1, 2, 4, 4), torch.zeros(4), 1)
