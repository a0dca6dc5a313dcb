"""sd-dino-1, geoaware-1 and dift-1: geometry, read-outs and averages by hand, and against plain loops on real pairs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from neco_bench.tasks.correspondence import task
from neco_bench.tasks.correspondence.geometry import (
    GEOMETRIES,
    View,
    match_padded_centre,
    match_squash,
    prepare_padded_centre,
    prepare_squash,
)
from neco_bench.tasks.correspondence.matching import nearest_pixels, window_softargmax
from neco_bench.tasks.correspondence.settings import Settings
from PIL import Image
from torch import Tensor

import neco_bench
from neco_bench.core.errors import BadInputError, UsageError
from neco_bench.core.protocol import find_tasks
from neco_bench.core.task import Context, Outcome
from neco_bench.data.base import Pair, PairDataset
from neco_bench.encoders import DenseFeatures, Encoder
from neco_bench.metrics.pck import pck_averages
from neco_bench.results.store import ResultStore
from tests.typed import load_pairs

PROTOCOLS = ("sd-dino-1", "geoaware-1", "dift-1")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def settings_of(protocol: str, **changes: Any) -> Settings:
    (task,) = find_tasks([f"shapes_correspondence@{protocol}"], changes)
    return task.settings()  # type: ignore[return-value]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_pair(source: list, target: list, box: float = 10, name: str = "p", category: str = "c") -> Pair:
    starts, ends = (np.array(p, float).reshape(-1, 2) for p in (source, target))
    ids = tuple(map(str, range(len(source))))
    return Pair(name, "a", "b", starts, ends, ids, (0, 0, box, box), (0, 0, box, box / 2), category)


# Geometry


def test_the_image_lies_in_the_middle_of_black() -> None:
    image = np.random.default_rng(0).integers(1, 256, (33, 100, 3), dtype=np.uint8)
    wide = prepare_padded_centre(image, 50, 14, IMAGENET[0])
    resized = np.asarray(Image.fromarray(image).resize((50, 16), Image.Resampling.LANCZOS))  # 16.5 to the even 16
    assert wide.shape == (3, 50, 50)
    np.testing.assert_array_equal((wide[:, 17:33] * 255).round().numpy(), resized.transpose(2, 0, 1))
    assert not wide[:, :17].any()
    assert not wide[:, 33:].any()
    tall = prepare_padded_centre(image.transpose(1, 0, 2), 51, 14, IMAGENET[0])  # 16.83 to 17
    assert [i for i in range(51) if tall[:, :, i].any()] == list(range(17, 34))


def test_squashing_keeps_no_aspect() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 70, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    out = prepare_squash(image, 48, 16, IMAGENET[0])
    np.testing.assert_array_equal((out * 255).round().numpy(), expected)


@pytest.mark.parametrize(("protocol", "shift"), [("sd-dino-1", -0.5), ("geoaware-1", 0)])
@pytest.mark.parametrize(("point", "cell"), [((30, 10), (1, 1)), ((100, 10), (3, 1)), ((0, 0), (0, 1))])
def test_padded_centre_by_hand(protocol: str, shift: float, point: tuple, cell: tuple) -> None:
    """4 x 4 cells of 14; 100 x 40 pixels become 56 x 22, 17 below the top: (30, 10) is at (16.8, 22.6).

    x = 100, the width, is at 56, beyond the last cell: that one is taken.
    The tall target of 60 x 150 pixels becomes 22 x 56, 17 to the right.
    """
    source, target = F.normalize(noise(512, 4, 4), dim=0), F.normalize(noise(512, 4, 4, seed=1), dim=0)
    target[:, 2, 3] = source[:, cell[1], cell[0]]
    _, errors = match_padded_centre(
        [make_pair([point], [(20, 90)])], [View(source, 100, 40)], View(target, 60, 150), 56, 14, settings_of(protocol)
    )
    predicted = np.array([3 * 14 + 7 + shift, 2 * 14 + 7 + shift])
    expected = np.linalg.norm(predicted - (20 * 56 / 150 + 17, 90 * 56 / 150)) * 150 / 56
    assert errors == pytest.approx([expected], abs=1e-3)


def test_dift_points_are_whole_pixels_inside_the_image() -> None:
    """One column of cells upsampled to 1 x 8 pixels: each pixel of a border block ties, and the first is chosen."""
    view = View(torch.eye(2).view(2, 1, 2), 8, 1)  # pixels 0..1 mix nothing, 2..5 both cells, 6..7 nothing
    pair = make_pair([(0.9, 0), (1, 0), (3.9, 0), (6, 0), (8, 1)], [(0, 0), (0, 0), (3, 0), (6, 0), (6, 0)])
    np.testing.assert_array_equal(match_squash([pair], [view], view, 32, 16)[1], 0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_identical_images(protocol: str) -> None:
    """Every cell differs: dift-1 finds the pixel itself, the others the cell of the point, to its middle."""
    view, settings = View(noise(512, 4, 4), 64, 64), settings_of(protocol)
    points = [(x, y) for x in range(8, 56, 3) for y in range(8, 56, 5)]
    pair = make_pair(points, points)
    if protocol == "dift-1":
        np.testing.assert_array_equal(match_squash([pair], [view], view, 64, 16)[1], 0)
        return
    _, errors = match_padded_centre([pair], [view], view, 64, 16, settings)
    middle = np.array(points) // 16 * 16 + 8 + settings.centre_shift
    np.testing.assert_allclose(errors, np.linalg.norm(middle - points, axis=1), atol=1e-3)


@pytest.mark.parametrize("geometry", ["probe3d", "centres", "padded_centre", "window_softargmax", "squash"])
def test_pairs_of_one_target_are_matched_as_each_alone(geometry: str) -> None:
    views = [
        View(F.normalize(noise(32, 6, 6, seed=seed), dim=0), *size) for seed, size in enumerate([(96, 60), (50, 96)])
    ]
    target = View(F.normalize(noise(32, 6, 6, seed=9), dim=0), 80, 96)
    rng = np.random.default_rng(0)
    pairs = [make_pair(*(rng.uniform(0, 50, (2, count, 2)))) for count in (3, 1)]
    if geometry in ("padded_centre", "window_softargmax"):
        match: Callable[..., Any] = partial(
            match_padded_centre,
            settings=settings_of("sd-dino-1" if geometry == "padded_centre" else "geoaware-1"),
        )
    else:
        match = GEOMETRIES[geometry][1]
    together = match(pairs, views, target, 96, 16)
    alone = [match([pair], [view], target, 96, 16) for pair, view in zip(pairs, views, strict=True)]
    for whole, *parts in zip(together, *alone, strict=True):
        np.testing.assert_allclose(whole, np.concatenate(parts), rtol=0, atol=1e-4)


# Read-outs


def softargmax_by_loops(similarity: np.ndarray, half: int, temperature: float, outside: float) -> tuple[float, float]:
    height, width = similarity.shape
    row, column = np.unravel_index(similarity.argmax(), similarity.shape)
    inside = np.full_like(similarity, outside)
    for y in range(max(0, row - half), min(height, row + half + 1)):
        for x in range(max(0, column - half), min(width, column + half + 1)):
            inside[y, x] = similarity[y, x]
    weights = np.exp((inside - inside.max()) / temperature)
    weights /= weights.sum()
    return float((weights.sum(0) * np.arange(width)).sum()), float((weights.sum(1) * np.arange(height)).sum())


@pytest.mark.parametrize(("half", "temperature"), [(5, 0.02), (1, 0.1), (0, 0.5), (20, 0.3)])
def test_window_softargmax(half: int, temperature: float) -> None:
    """Peaks in the middle and at all borders; the last map is negative everywhere, so that the zeros outside win."""
    similarity = torch.tanh(noise(6, 14, 17)).double() * 0.3
    for i, (y, x) in enumerate([(7, 8), (0, 0), (13, 16), (0, 9), (13, 2)]):
        similarity[i, y, x] = 0.4
    similarity[5] -= 0.5
    pixels = window_softargmax(similarity, half, temperature).numpy()
    zeros, cut = (
        np.array([softargmax_by_loops(s, half, temperature, outside) for s in similarity.numpy()])
        for outside in (0.0, -np.inf)
    )
    np.testing.assert_allclose(pixels, zeros, atol=1e-9)
    if half < 14:
        assert np.abs(pixels - cut).max() > 0.1


def nearest_pixels_by_upsampling(
    source: Tensor, target: Tensor, points: Tensor, source_size: tuple, target_size: tuple
) -> Tensor:
    """Both maps upsampled whole; of pixels equal up to rounding the first."""
    sources, targets = (
        F.normalize(F.interpolate(m.double()[None], size, mode="bilinear")[0], dim=0)
        for m, size in ((source, source_size), (target, target_size))
    )
    cosine = sources[:, points[:, 1], points[:, 0]].T @ targets.flatten(1)
    best = (cosine > cosine.amax(1, keepdim=True) - 1e-12).int().argmax(1)
    return torch.stack([best % target_size[1], best // target_size[1]], 1)


@pytest.mark.parametrize("depth", [2, 6, 64])
@pytest.mark.parametrize(
    ("source_size", "target_size"), [((17, 23), (29, 13)), ((9, 9), (40, 31)), ((5, 30), (2, 3)), ((4, 5), (4, 5))]
)
def test_nearest_pixels_are_those_of_the_upsampled_maps(depth: int, source_size: tuple, target_size: tuple) -> None:
    source, target = noise(depth, 4, 5), noise(depth, 4, 5, seed=1)
    points = torch.cartesian_prod(torch.arange(source_size[1]), torch.arange(source_size[0]))
    pixels = nearest_pixels(source, target, points, source_size, target_size)
    expected = nearest_pixels_by_upsampling(source, target, points, source_size, target_size)
    assert len(pixels.unique(dim=0)) > 4
    assert torch.equal(pixels, expected)


def test_the_first_of_equal_pixels() -> None:
    """Constant features: all pixels tie exactly, whatever the rounding of the shares. So do two equal maxima."""
    flat = torch.full((7, 5, 3), 0.3)
    points = torch.tensor([[0, 0], [30, 20]])
    assert nearest_pixels(flat, flat, points, (37, 53), (41, 67)).tolist() == [[0, 0], [0, 0]]
    source, target = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    source[0], target[1], target[0, 2, 0], target[0, 1, 2] = 1, 1, 5, 5  # (row, column): (1, 2) comes first
    (pixels,) = nearest_pixels(source, target, points[:1], (8, 8), (12, 12))  # cell (1, 2) is centred on pixel (7, 4)
    assert pixels.tolist() == [7, 4]


# Averages and comparison: all features are equal, so that every prediction is that of the first cell or pixel


class Blind(Encoder):
    name, weights_id = "blind", "0"
    embed_dim, stride = 4, 14

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        height, width = images.shape[-2:]
        return DenseFeatures(images.new_ones(len(images), 4, height // 14, width // 14), 14)


class Pairs(PairDataset):
    """Given pairs of two grey images of 56 x 56 pixels: 4 x 4 cells of Blind, in which nothing is resized."""

    name, split, splits = "pairs", "test", ("test",)

    def __init__(self, *pairs: Pair) -> None:
        self.pairs, self.ids = pairs, tuple(pair.id for pair in pairs)

    def read_image(self, image_id: str) -> np.ndarray:
        return np.full((56, 56, 3), 90, np.uint8)

    def fingerprint(self) -> str:
        return "0"


def measure(protocol: str, *pairs: Pair, **changes: Any) -> Outcome:
    return task.run(Blind(), {"test": Pairs(*pairs)}, settings_of(protocol, input_size=56, **changes), Context())


FIRST = {"sd-dino-1": 6.5, "dift-1": 0.0}  # where the first cell or pixel is


@pytest.mark.parametrize(("protocol", "counts"), [("sd-dino-1", False), ("dift-1", True)])
def test_an_error_equal_to_the_threshold(protocol: str, counts: bool) -> None:
    """3 pixels of error against 0.1 x 30."""
    x = FIRST[protocol]
    on, below = (make_pair([(9, 9)], [(x + 3, x)], box=box) for box in (30, 31))
    assert measure(protocol, on).metrics["PCK@0.10"] == counts
    assert measure(protocol, below).metrics["PCK@0.10"] == 1
    assert measure(protocol, on, strict=counts).metrics["PCK@0.10"] != counts


def test_geoaware_of_equal_features() -> None:
    """The window holds all 16 cells, so the mean cell is (1.5, 1.5) and the prediction (28, 28); compared strictly."""
    on, below = (make_pair([(9, 9)], [(31, 28)], box=box) for box in (29.9, 30.1))
    assert (measure("geoaware-1", on).metrics["PCK@0.10"], measure("geoaware-1", below).metrics["PCK@0.10"]) == (0, 1)
    peak = make_pair([(9, 9)], [(7, 7)], box=1)
    assert measure("geoaware-1", peak, half_window=0, temperature=0.01).metrics["PCK@0.01"] == 1
    assert settings_of("geoaware-1").strict


HITS, TOTALS = np.array([1, 0, 1]), np.array([1, 4, 2])  # two pairs of class a, one of b
AVERAGES = {"points": 2 / 7, "pairs": 0.5, "class_mean": 0.35, "pair_weighted": 0.3}


def test_averages_by_hand() -> None:
    assert pck_averages(HITS, TOTALS, np.array([0, 0, 1])) == pytest.approx(AVERAGES, rel=1e-12)


@pytest.mark.parametrize(
    ("protocol", "average", "beside"),
    [
        ("sd-dino-1", "class_mean", {"pair_weighted": "pair_weighted", "per_point": "points", "per_image": "pairs"}),
        ("geoaware-1", "pairs", {"per_point": "points", "per_class_mean": "class_mean"}),
        ("dift-1", "points", {"per_image": "pairs", "per_class_mean": "class_mean"}),
    ],
)
def test_each_protocol_has_its_average(protocol: str, average: str, beside: dict[str, str]) -> None:
    first, times = FIRST.get(protocol, 28), 5  # the same pairs five times have the same averages
    hits, totals, classes = np.tile(HITS, times), np.tile(TOTALS, times), np.tile([0, 0, 1], times)
    pairs = [
        make_pair([(9, 9)] * n, [(first, first)] * h + [(55, 0)] * (n - h), name=f"{i}", category="ab"[c])
        for i, (h, n, c) in enumerate(zip(hits, totals, classes, strict=True))
    ]
    outcome = measure(protocol, *pairs, make_pair([], [], name="no common point", category="b"))
    expected = {f"PCK@{alpha}": AVERAGES[average] for alpha in ("0.01", "0.05", "0.10")}
    expected |= {f"{key}_{suffix}": AVERAGES[name] for key in expected for suffix, name in beside.items()}
    assert outcome.metrics == pytest.approx(expected, rel=1e-12)  # and no metric per level: these pairs have none
    assert outcome.per_class["PCK@0.10"] == pytest.approx({"a": 0.5 if average == "pairs" else 0.2, "b": 0.5})
    assert (outcome.n_images, outcome.statistics["totals"].sum()) == (3 * times, 7 * times)

    order = np.argsort(classes, kind="stable")  # categories one after the other, as they are stored
    assert (outcome.statistics["hits"] == hits[order][:, None]).all()
    assert (outcome.statistics["totals"] == totals[order]).all()
    assert (outcome.statistics["category"] == classes[order]).all()


def test_no_common_point_at_all() -> None:
    with pytest.raises(BadInputError, match="No pair of 'pairs' 'test' has a common keypoint"):
        measure("dift-1", make_pair([], []))


@pytest.mark.parametrize("alphas", [[0.05], [0.1, 0.1], [0.1, 0.104]])
def test_thresholds_name_their_scores(alphas: list[float]) -> None:
    with pytest.raises(UsageError, match=r"PCK@0\.10 is the score"):
        settings_of("probe3d-1", alphas=alphas)


def test_a_readout_needs_its_geometry() -> None:
    with pytest.raises(UsageError, match="readout: 'window_softargmax' needs geometry 'padded_centre'"):
        settings_of("dift-1", readout="window_softargmax")


# Real pairs, measured again by plain loops


def errors_by_loops(protocol: str, pair: Pair, images: tuple, encoder: Encoder, size: int) -> list[float]:
    """Pixel errors in the original target image."""
    maps, sizes = [], [image.shape[:2] for image in images]
    for image in map(Image.fromarray, images):
        if protocol == "dift-1":
            square = image.resize((size, size), Image.Resampling.BICUBIC)
            statistics_of_input: dict[str, Any] = {}
        else:
            longest = max(image.size)
            small = image.resize(
                (int(np.around(size * image.width / longest)), int(np.around(size * image.height / longest))),
                Image.Resampling.LANCZOS,
            )
            square = Image.new("RGB", (size, size))
            square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
            statistics_of_input = {"mean": IMAGENET[0], "std": IMAGENET[1]}
        tensor = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 255
        maps.append(encoder.encode(tensor, final_norm=protocol == "dift-1", **statistics_of_input).map[0])
    if protocol == "dift-1":
        start = torch.from_numpy(pair.source_points).long()
        start[:, 0].clamp_(max=sizes[0][1] - 1)
        start[:, 1].clamp_(max=sizes[0][0] - 1)
        pixels = nearest_pixels_by_upsampling(maps[0], maps[1], start, sizes[0], sizes[1]).tolist()
        return [float(np.hypot(f[0] - t[0], f[1] - t[1])) for f, t in zip(pixels, pair.target_points, strict=True)]
    errors = []
    source, target = (F.normalize(m, dim=0) for m in maps)
    side = size // encoder.stride
    for a, b in zip(pair.source_points, pair.target_points, strict=True):
        placed = []
        for point, (height, width) in zip((a, b), sizes, strict=True):
            scale = size / max(height, width)
            short = [(size - int(np.around(size * n / max(height, width)))) // 2 for n in (width, height)]
            placed.append((point[0] * scale + short[0], point[1] * scale + short[1]))
        column, row = (min(side - 1, int(side / size * c)) for c in placed[0])
        similarity = torch.einsum("d,dyx->yx", source[:, row, column], target).numpy()
        if protocol == "sd-dino-1":
            y, x = map(float, np.unravel_index(similarity.argmax(), similarity.shape))
            predicted = (encoder.stride * (x + 0.5) - 0.5, encoder.stride * (y + 0.5) - 0.5)
        else:
            x, y = softargmax_by_loops(similarity, 5, 0.02, 0.0)
            predicted = (encoder.stride * (x + 0.5), encoder.stride * (y + 0.5))
        error = np.hypot(predicted[0] - placed[1][0], predicted[1] - placed[1][1])
        errors.append(float(error) * max(sizes[1]) / size)
    return errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "protocol"),
    [*(("spair", p) for p in PROTOCOLS), *(("pf_willow", p) for p in ("pck-1", "sd-dino-1", "dift-1"))],
)
def test_real_pairs(name: str, protocol: str, real_data: Path, tmp_path: Path) -> None:
    folder = {"spair": "spair71k"}.get(name, name)
    if not (real_data / folder).is_dir():
        pytest.skip(f"no {folder} among the real samples")
    changes, limit = {"input_size": 112}, 5
    result = neco_bench.run(
        "baseline_hog",
        f"{name}@{protocol}",
        data_root=real_data,
        limit=limit,
        workers=0,
        device="cpu",
        changes=changes,
        out=tmp_path,
    )
    arrays = ResultStore(tmp_path).statistics(result)
    data = load_pairs(folder, "test", root=real_data, limit=limit)
    assert result.n_images == limit
    assert any("/viewpoint_variation=" in key for key in result.metrics) == (name == "spair")
    if name == "pf_willow":  # ten points in every pair: pairs, points and classes have the same weight
        assert arrays["totals"].tolist() == [10] * limit
        assert result.metrics["PCK@0.10"] == pytest.approx(result.metrics["PCK@0.10_per_image"], rel=1e-12)
    if protocol == "pck-1":
        return
    encoder = neco_bench.load_encoder("baseline_hog", device="cpu")
    for sample, hits, number in zip((data[i] for i in range(limit)), arrays["hits"], arrays["pair_id"], strict=True):
        pair, images = sample.pair, (sample.source_image, sample.target_image)
        assert pair.id == number
        errors = np.array(errors_by_loops(protocol, pair, images, encoder, 112))
        x1, y1, x2, y2 = pair.target_box
        for alpha, count in zip((0.01, 0.05, 0.10), hits, strict=True):
            limit_px = alpha * max(x2 - x1, y2 - y1)
            assert count == ((errors <= limit_px) if protocol == "dift-1" else (errors < limit_px)).sum()
    assert 0 < arrays["hits"][:, 2].sum() < arrays["totals"].sum()
