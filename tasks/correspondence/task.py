"""Semantic correspondence: find the keypoints of one image in another by the nearest patch feature, scored by PCK.

`pck-1` is the plain measurement: every pair, geometry without offsets. The others reproduce references: `probe3d-1` the
SPair-71k evaluation of probe3d (El Banani et al., *Probing the 3D Awareness of Visual Foundation Models*, CVPR 2024),
which NeCo cites; `sd-dino-1` that of *A Tale of Two Features* (Zhang et al., NeurIPS 2023); `geoaware-1` the zero-shot
one of *Telling Left from Right* (Zhang et al., CVPR 2024); `dift-1` that of *Emergent Correspondence from Image
Diffusion* (Tang et al., NeurIPS 2023). README.md lists their constants and quirks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator
from torch import Tensor

from neco_bench import distributed, statistics
from neco_bench.context import Context, Cost, Outcome
from neco_bench.correspondence import (
    box_side,
    cell_similarity,
    draw_pairs,
    nearest_cells,
    nearest_pixels,
    pck_averages,
    pck_hits,
    peak_cells,
    pixel_norms,
    sampled,
    window_softargmax,
)
from neco_bench.data.base import Pair, PairDataset
from neco_bench.encoders.base import Encoder
from neco_bench.errors import BadInputError
from neco_bench.features.extract import encode_within_memory, loading_threads
from neco_bench.features.patches import rescaled, unit_length
from neco_bench.features.transforms import to_tensor
from neco_bench.protocol import Settings as BaseSettings
from neco_bench.protocol import Temperature

Average = Literal["points", "pairs", "class_mean"]
# Of P points: predictions (P, 2), (x, y) in pixels of the original target image, and their errors (P,) there.
Match = tuple[np.ndarray, np.ndarray]


class Settings(BaseSettings):
    """Constants of a protocol and a card; sizes in pixels.

    geometry: "probe3d" (white padding right and bottom, integer keypoints, corner read-out, zero padding to the
    stride), "centres" (exact points, cell centres, padded cells never chosen), "padded_centre" (centred on black, the
    source cell that holds the point) or "squash" (aspect not kept, features upsampled to the original pixels).
    readout: "nearest" cell or pixel; for "padded_centre" also "window_softargmax" with half_window cells and
    temperature. centre_shift: added there to the cell centre that is the prediction. alphas: thresholds as shares of
    the longest side of the target box. average: of the primary metric, see `pck_averages`; None is "class_mean" where
    pairs are drawn, else "points". pairs_per_bin: None takes every pair.
    """

    geometry: Literal["probe3d", "centres", "padded_centre", "squash"]
    readout: Literal["nearest", "window_softargmax"] = "nearest"
    half_window: NonNegativeInt = 5
    temperature: Temperature = 0.02
    centre_shift: float = 0
    final_norm: bool
    alphas: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    strict: bool
    average: Average | None = None
    pairs_per_bin: PositiveInt | None = None
    draw_seed: NonNegativeInt = 0

    @field_validator("readout")
    @classmethod
    def _has_cells(cls, readout: str, info: ValidationInfo) -> str:
        if readout == "window_softargmax" and info.data.get("geometry") != "padded_centre":
            raise ValueError("'window_softargmax' needs geometry 'padded_centre'")
        return readout

    @field_validator("alphas")
    @classmethod
    def _name_scores(cls, alphas: tuple[float, ...]) -> tuple[float, ...]:
        if any(round(alpha, 2) != alpha for alpha in alphas) or len(set(alphas)) < len(alphas) or 0.1 not in alphas:
            raise ValueError("PCK@0.10 is the score: hundredths, each once, and 0.1 among them")
        return alphas

    @property
    def average_used(self) -> Average:
        return self.average or ("points" if self.pairs_per_bin is None else "class_mean")


@dataclass(frozen=True)
class View:
    """Features (D, h, w) of one image, of unit length but for "squash", and its width and height in original pixels."""

    map: Tensor
    width: int
    height: int

    @property
    def longest(self) -> int:
        return max(self.width, self.height)

    @cached_property
    def norms(self) -> Tensor:
        """(height, width) lengths of the features upsampled to the image, float64."""
        return pixel_norms(self.map, (self.height, self.width))


def cost(settings: Settings, data: dict[str, PairDataset], stride: int, dimension: int) -> Cost:
    """What `run` will take: every image once, about eight points a pair against every cell."""
    dataset = data["test"]
    size = settings.used_size(stride)
    cells, categories = (size // stride) ** 2, len({pair.category for pair in dataset.pairs})
    return Cost(
        images=len(dataset.image_ids),
        size=size,
        width=dimension,
        operations=2.0 * len(dataset) * (8 + 2 * 4) * cells * dimension,  # and both maps are normalised
        memory=4.0 * len(dataset.image_ids) / categories * cells * dimension,
    )


def run(encoder: Encoder, data: dict[str, PairDataset], settings: Settings, context: Context) -> Outcome:
    """PCK on data["test"]. Features are computed once per image; one category is held at a time.

    Several processes share the categories out.
    """
    dataset = data["test"]
    by_category: dict[str, list[Pair]] = defaultdict(list)
    for pair in dataset.pairs:
        if len(pair.source_points):
            by_category[pair.category].append(pair)
    if not by_category:
        raise BadInputError(
            f"No pair of {dataset.name!r} {dataset.split!r} has a common keypoint. Restore its annotations, or raise "
            f"--limit."
        )
    as_is = settings.geometry == "probe3d" and settings.tokens_per_side is None
    used = settings.input_size if as_is else settings.used_size(encoder.stride)
    prepare, match = _GEOMETRIES[settings.geometry]
    if settings.geometry == "padded_centre":
        match = partial(match_padded_centre, settings=settings)

    hits: dict[str, np.ndarray] = {}
    totals: dict[str, int] = {}
    bins: dict[str, list[list[Pair]]] = defaultdict(list)
    for number, category in enumerate(context.track(sorted(by_category), "pairs")):
        chosen = _bins(by_category[category], settings)
        for name, members in chosen.items():
            bins[name].append(members)
        if number % distributed.world() != distributed.rank():
            continue
        needed = {pair.id: pair for members in chosen.values() for pair in members}
        views = _views(encoder, dataset, needed.values(), used, prepare, settings, context)
        with context.phase("match"):
            by_target: dict[str, list[Pair]] = defaultdict(list)
            for pair in needed.values():
                by_target[pair.target_id].append(pair)
            for target, group in by_target.items():
                matches = match(group, [views[p.source_id] for p in group], views[target], used, encoder.stride)
                ends = np.cumsum([len(pair.source_points) for pair in group])[:-1]
                for pair, found, errors in zip(group, *(np.split(part, ends) for part in matches), strict=True):
                    limits = [alpha * box_side(pair.target_box) for alpha in settings.alphas]
                    hits[pair.id] = pck_hits(errors, limits, strict=settings.strict)
                    totals[pair.id] = len(errors)
                    if pair.id in context.watched:
                        context.seen[pair.id] = {"points": found, "errors": errors, "side": box_side(pair.target_box)}
    for of_process in distributed.gather((hits, totals)):
        hits |= of_process[0]
        totals |= of_process[1]
    return _outcome(dataset, bins, hits, totals, settings, context, used, encoder)


def _bins(pairs: Sequence[Pair], settings: Settings) -> dict[str, list[Pair]]:
    """Named groups of one category's pairs; "" is that of the primary metric, levels exist where pairs have them."""
    count = settings.pairs_per_bin

    def choose(attribute: str, level: int | None) -> list[Pair]:
        if count is not None:
            return draw_pairs(pairs, attribute, level, count, settings.draw_seed)
        return [pair for pair in pairs if level is None or pair.attributes[attribute] == level]

    groups = {"": choose("", None)}
    for attribute in ("viewpoint_variation", "scale_variation")[: 2 if count is None else 1]:
        if all(attribute in pair.attributes for pair in pairs):
            for level in (0, 1, 2):
                groups[f"/{attribute}={level}"] = choose(attribute, level)
    return groups


def _views(
    encoder: Encoder,
    dataset: PairDataset,
    pairs: Iterable[Pair],
    size: int,
    prepare: Callable,
    settings: Settings,
    context: Context,
) -> dict[str, View]:
    """{image id: view} of all images of the pairs."""
    ids = sorted({i for pair in pairs for i in (pair.source_id, pair.target_id)})
    views: dict[str, View] = {}
    with loading_threads() as pool:
        for start in range(0, len(ids), context.batch_size):
            chunk = ids[start : start + context.batch_size]
            with context.phase("load"):
                images = list(pool.map(dataset.read_image, chunk))
                ready = partial(prepare, size=size, stride=encoder.stride, mean=settings.mean or encoder.mean)
                batch = torch.stack(list(pool.map(ready, images)))
            with context.phase("encode"):
                features = encode_within_memory(
                    encoder, batch, context, final_norm=settings.final_norm, mean=settings.mean, std=settings.std
                )
            for name, image, feature in zip(chunk, images, features, strict=True):
                # "squash" mixes features of their own lengths before it compares directions.
                feature = rescaled(feature, None) if settings.geometry == "squash" else unit_length(feature, 0)
                views[name] = View(feature, image.shape[1], image.shape[0])
    return views


def prepare_probe3d(image: np.ndarray, size: int, stride: int, mean: Sequence[float]) -> Tensor:
    """(3, S', S') in [0, 1]: white right and bottom padding to a square, bicubic to `size`, padded to the stride.

    The last padding is zero after normalisation (the mean before it), the smaller half at the low side.
    """
    longest = max(image.shape[:2])
    square = np.full((longest, longest, 3), 255, np.uint8)
    square[: image.shape[0], : image.shape[1]] = image
    tensor = to_tensor(np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC)))
    extra = -size % stride
    colour = torch.tensor(mean).view(3, 1, 1)
    return F.pad(tensor - colour, (extra // 2, extra - extra // 2) * 2) + colour


def integer_points(points: np.ndarray, longest: int, size: int) -> Tensor:
    """(P, 2) float: integer pixels (P, 2) of an image whose longest side becomes `size`, truncated toward zero there.

    Multiplied first, then divided, in single precision: a factor size / longest would lose a pixel where it is exact.
    """
    return (torch.from_numpy(points).long() * size / longest).long().float()


def match_probe3d(pairs: Sequence[Pair], sources: Sequence[View], target: View, size: int, stride: int) -> Match:
    """By probe3d's integer points and corner read-out."""

    def scaled(points: np.ndarray, view: View) -> Tensor:
        return integer_points(points, view.longest, size) / size

    starts = [2 * scaled(pair.source_points, view) - 1 for pair, view in zip(pairs, sources, strict=True)]
    cells = nearest_cells(_at(sources, starts, align_corners=True), target.map)
    predicted = cells.cpu().float() / target.map.shape[-1]
    ends = torch.cat([scaled(pair.target_points, target) for pair in pairs])
    errors = (predicted - ends).norm(dim=1).double().numpy() * target.longest
    return predicted.double().numpy() * target.longest, errors


def _at(views: Sequence[View], grids: Sequence[Tensor], *, align_corners: bool) -> Tensor:
    """(P, D) features of views at points of each, see `sampled`."""
    return torch.cat(
        [sampled(view.map, grid, align_corners=align_corners) for view, grid in zip(views, grids, strict=True)]
    )


def prepare_centres(image: np.ndarray, size: int, stride: int, mean: Sequence[float]) -> Tensor:
    """(3, S, S) in [0, 1]: longer side to `size`, aspect kept, padded right and bottom with the mean."""
    height, width = image.shape[:2]
    scale = size / max(height, width)
    new = (max(1, round(width * scale)), max(1, round(height * scale)))
    tensor = to_tensor(np.asarray(Image.fromarray(image).resize(new, Image.Resampling.BICUBIC)))
    canvas = torch.tensor(mean).view(3, 1, 1).repeat(1, size, size)
    canvas[:, : new[1], : new[0]] = tensor
    return canvas


def match_centres(pairs: Sequence[Pair], sources: Sequence[View], target: View, size: int, stride: int) -> Match:
    """Pixel i spans [i, i + 1), a cell predicts its centre."""
    grids = [
        torch.from_numpy((pair.source_points + 0.5) / view.longest * 2 - 1).float()
        for pair, view in zip(pairs, sources, strict=True)
    ]
    scale = size / target.longest
    centres = (torch.arange(target.map.shape[-1]) + 0.5) * stride / scale
    valid = (centres < target.height)[:, None] & (centres < target.width)
    cells = nearest_cells(_at(sources, grids, align_corners=False), target.map, valid)
    predicted = (cells.cpu().double().numpy() + 0.5) * stride / scale - 0.5
    return predicted, np.linalg.norm(predicted - _ends(pairs), axis=1)


def _ends(pairs: Sequence[Pair]) -> np.ndarray:
    return np.concatenate([pair.target_points for pair in pairs])


def prepare_padded_centre(image: np.ndarray, size: int, stride: int, mean: Sequence[float]) -> Tensor:
    """(3, S, S) in [0, 1]: longer side to `size` (Lanczos), aspect kept, in the middle of a black square."""
    height, width = image.shape[:2]
    new_width, new_height = (_resized(side, max(height, width), size) for side in (width, height))
    canvas = np.zeros((size, size, 3), np.uint8)
    left, top = (size - new_width) // 2, (size - new_height) // 2
    canvas[top : top + new_height, left : left + new_width] = Image.fromarray(image).resize(
        (new_width, new_height), Image.Resampling.LANCZOS
    )
    return to_tensor(canvas)


def match_padded_centre(
    pairs: Sequence[Pair], sources: Sequence[View], target: View, size: int, stride: int, settings: Settings
) -> Match:
    """Points in single precision, as sd-dino has them."""

    def border(view: View) -> np.ndarray:
        return np.array(
            [(size - _resized(side, view.longest, size)) // 2 for side in (view.width, view.height)], np.float32
        )

    def placed(points: np.ndarray, view: View) -> np.ndarray:
        return points.astype(np.float32) * np.float32(size / view.longest) + border(view)

    side, points = target.map.shape[-1], []
    for pair, view in zip(pairs, sources, strict=True):
        start = placed(pair.source_points, view)
        x, y = torch.from_numpy((np.float32(side / size) * start).astype(np.int64).clip(0, side - 1)).T
        points.append(view.map[:, y, x].T)
    similarity = cell_similarity(torch.cat(points), target.map)
    if settings.readout == "nearest":
        found = peak_cells(similarity)
    else:
        found = window_softargmax(similarity, settings.half_window, settings.temperature)
    predicted = (found.cpu().double().numpy() + 0.5) * stride + settings.centre_shift
    scale, end = target.longest / size, placed(_ends(pairs), target)
    return (predicted - border(target)) * scale, np.linalg.norm(predicted - end, axis=1) * scale


def _resized(side: int, longest: int, size: int) -> int:
    """Pixels of a side of an image whose longest side becomes `size`; halves to even."""
    return max(1, round(size * side / longest))


def prepare_squash(image: np.ndarray, size: int, stride: int, mean: Sequence[float]) -> Tensor:
    """(3, S, S) in [0, 1]: both sides to `size` (bicubic), aspect not kept."""
    return to_tensor(np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)))


def match_squash(pairs: Sequence[Pair], sources: Sequence[View], target: View, size: int, stride: int) -> Match:
    """Integer points, the nearest of all pixels of the target; pair by pair, as all pixels take much memory."""
    found = []
    for pair, source in zip(pairs, sources, strict=True):
        limits = (source.width - 1, source.height - 1)
        start = torch.from_numpy(pair.source_points.astype(np.int64).clip(0, limits))
        sizes = (source.height, source.width), (target.height, target.width)
        found.append(nearest_pixels(source.map, target.map, start, *sizes, target.norms).cpu().numpy())
    predicted = np.concatenate(found)
    return predicted, np.linalg.norm(predicted - _ends(pairs), axis=1)


_GEOMETRIES: dict[str, tuple[Callable, Callable]] = {
    "probe3d": (prepare_probe3d, match_probe3d),
    "centres": (prepare_centres, match_centres),
    "padded_centre": (prepare_padded_centre, match_padded_centre),
    "squash": (prepare_squash, match_squash),
}
# The averages given beside the primary one; none where pairs are drawn, as in the reference.
_BESIDE = {
    "points": ("class_mean", "pairs"),
    "pairs": ("points", "class_mean"),
    "class_mean": ("pair_weighted", "points", "pairs"),
}
_SUFFIX = {
    "points": "per_point",
    "pairs": "per_image",
    "class_mean": "per_class_mean",
    "pair_weighted": "pair_weighted",
}


def _outcome(
    dataset: PairDataset,
    bins: dict[str, list[list[Pair]]],
    hits: dict[str, np.ndarray],
    totals: dict[str, int],
    settings: Settings,
    context: Context,
    used: int,
    encoder: Encoder,
) -> Outcome:
    metrics: dict[str, float] = {}
    per_class: dict[str, dict[str, float | None]] = {}
    ci95: dict[str, tuple[float, float] | None] = {}
    average = settings.average_used
    beside = _BESIDE[average] if settings.pairs_per_bin is None else ()
    categories = sorted({p.category for p in dataset.pairs})
    numbers = {name: i for i, name in enumerate(dataset.image_ids)}
    for name, groups in bins.items():
        members = [pair for group in groups for pair in group]
        if not members:
            continue
        table = np.stack([hits[p.id] for p in members])
        counts = np.array([totals[p.id] for p in members])
        classes = np.array([categories.index(p.category) for p in members])
        images = np.array([(numbers[p.source_id], numbers[p.target_id]) for p in members], np.int32)
        for column, alpha in enumerate(settings.alphas):
            key = f"PCK@{alpha:.2f}{name}"
            values = pck_averages(table[:, column], counts, classes)
            metrics[key] = values[average]
            metrics |= {f"{key}_{_SUFFIX[other]}": values[other] for other in beside}
            rates: dict[str, float | None] = dict.fromkeys(categories)
            for number in np.unique(classes):
                mine = classes == number
                within = pck_averages(table[mine, column], counts[mine], classes[mine])
                rates[categories[number]] = within["pairs" if average == "pairs" else "points"]
            per_class[key] = rates
            if name == "":
                ci95[key] = _interval(table[:, column], counts, classes, images, average, context.seed)
        if name == "":
            primary, stored = members, {"hits": table, "totals": counts, "category": classes, "images": images}

    context.notes |= {"pairs": len(primary), "keypoints": int(stored["totals"].sum()), "pairs_evaluated": len(hits)}
    return Outcome(
        metrics=metrics,
        per_class=per_class,
        ci95=ci95,
        n_images=len(primary),
        statistics={**stored, "pair_id": np.array([p.id for p in primary])},
        features={
            "input_size": settings.input_size,
            "used_size": used + -used % encoder.stride,
            "resize": settings.geometry,
            "final_norm": settings.final_norm,
        },
    )


def _interval(
    hits: np.ndarray, totals: np.ndarray, classes: np.ndarray, images: np.ndarray, average: Average, seed: int
) -> tuple[float, float] | None:
    """95 % interval of the average in use, pairs drawn anew, and wider as far as they share images."""
    if average == "pairs":
        return statistics.bootstrap_mean(hits / totals, images=images, seed=seed)
    groups = classes if average == "class_mean" else None
    return statistics.bootstrap_ratio(hits, totals, groups, images=images, seed=seed)
