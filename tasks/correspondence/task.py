"""Semantic correspondence: find the keypoints of one image in another by the nearest patch feature, scored by PCK.

Two protocols. `probe3d-1` reproduces the SPair-71k evaluation of probe3d (El Banani et al., *Probing the 3D Awareness
of Visual Foundation Models*, CVPR 2024), which NeCo cites: 200 drawn pairs per class and viewpoint bin, features before
the final norm, cell corners. `pck-1` is the full-pair measurement: every pair, geometry without offsets. README.md
lists their constants and quirks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from neco_bench import statistics
from neco_bench.context import Context, Outcome
from neco_bench.correspondence import box_side, draw_pairs, nearest_cells, pck_hits
from neco_bench.data.base import Pair, PairDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import encode_within_memory
from neco_bench.features.transforms import fit_size, to_tensor
from neco_bench.protocol import Settings as BaseSettings


class Settings(BaseSettings):
    """Constants of a protocol and a card; sizes in pixels.

    geometry: "probe3d" (white padding right and bottom, integer keypoints, corner read-out, zero padding to the stride)
    or "centres" (exact points, cell centres, padded cells never chosen). alphas: thresholds as shares of the longest
    side of the target box. pairs_per_bin: None takes every pair.
    """

    input_size: PositiveInt
    geometry: Literal["probe3d", "centres"]
    final_norm: bool
    alphas: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    strict: bool
    pairs_per_bin: PositiveInt | None = None
    draw_seed: NonNegativeInt = 0


@dataclass(frozen=True)
class View:
    """Features (D, h, w) of one image, and its width and height in original pixels."""

    map: Tensor
    width: int
    height: int

    @property
    def longest(self) -> int:
        return max(self.width, self.height)


def run(encoder: Encoder, data: dict[str, PairDataset], settings: Settings, context: Context) -> Outcome:
    """PCK on data["test"]. Features are computed once per image; one category is held at a time."""
    dataset = data["test"]
    by_category: dict[str, list[Pair]] = defaultdict(list)
    for pair in dataset.pairs:
        by_category[pair.category].append(pair)
    used = settings.input_size if settings.geometry == "probe3d" else fit_size(settings.input_size, encoder.stride)
    prepare, match = _GEOMETRIES[settings.geometry]

    hits: dict[str, np.ndarray] = {}
    totals: dict[str, int] = {}
    bins: dict[str, list[list[Pair]]] = defaultdict(list)
    for pairs in context.track([by_category[name] for name in sorted(by_category)], "pairs"):
        chosen = _bins(pairs, settings)
        for name, members in chosen.items():
            bins[name].append(members)
        needed = {pair.id: pair for members in chosen.values() for pair in members}
        views = _views(encoder, dataset, needed.values(), used, prepare, settings, context)
        with context.phase("match"):
            for pair in needed.values():
                errors = match(pair, views[pair.source_id], views[pair.target_id], used, encoder.stride)
                limits = [alpha * box_side(pair.target_box) for alpha in settings.alphas]
                hits[pair.id] = pck_hits(errors, limits, strict=settings.strict)
                totals[pair.id] = len(errors)
    return _outcome(dataset, bins, hits, totals, settings, context, used, encoder)


def _bins(pairs: Sequence[Pair], settings: Settings) -> dict[str, list[Pair]]:
    """Named groups of one category's pairs; "" is the group of the primary metric."""
    if settings.pairs_per_bin is None:
        groups = {"": list(pairs)}
        for attribute in ("viewpoint_variation", "scale_variation"):
            for level in (0, 1, 2):
                groups[f"/{attribute}={level}"] = [p for p in pairs if p.attributes[attribute] == level]
        return groups
    count, seed = settings.pairs_per_bin, settings.draw_seed
    groups = {"": draw_pairs(pairs, "viewpoint_variation", None, count, seed)}
    for level in (0, 1, 2):
        groups[f"/viewpoint_variation={level}"] = draw_pairs(pairs, "viewpoint_variation", level, count, seed)
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
    for start in range(0, len(ids), context.batch_size):
        chunk = ids[start : start + context.batch_size]
        with context.phase("load"):
            images = [dataset.read_image(i) for i in chunk]
            batch = torch.stack(
                [prepare(image, size, encoder.stride, settings.mean or encoder.mean) for image in images]
            )
        with context.phase("encode"):
            features = encode_within_memory(
                encoder, batch, context, final_norm=settings.final_norm, mean=settings.mean, std=settings.std
            )
        for name, image, feature in zip(chunk, images, features, strict=True):
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


def match_probe3d(pair: Pair, source: View, target: View, size: int, stride: int) -> np.ndarray:
    """(P,) pixel errors in the original target image, by probe3d's integer points and corner read-out."""
    start, end = (
        # Integer tensors there: scaled, then truncated toward zero, then divided by the side.
        (torch.from_numpy(points).long() * (size / view.longest)).long().float() / size
        for points, view in ((pair.source_points, source), (pair.target_points, target))
    )
    cells = nearest_cells(source.map, target.map, 2 * start - 1, align_corners=True)
    predicted = cells.cpu().float() / target.map.shape[-1]
    return (predicted - end).norm(dim=1).double().numpy() * target.longest


def prepare_centres(image: np.ndarray, size: int, stride: int, mean: Sequence[float]) -> Tensor:
    """(3, S, S) in [0, 1]: longer side to `size`, aspect kept, padded right and bottom with the mean."""
    height, width = image.shape[:2]
    scale = size / max(height, width)
    new = (max(1, round(width * scale)), max(1, round(height * scale)))
    tensor = to_tensor(np.asarray(Image.fromarray(image).resize(new, Image.Resampling.BICUBIC)))
    canvas = torch.tensor(mean).view(3, 1, 1).repeat(1, size, size)
    canvas[:, : new[1], : new[0]] = tensor
    return canvas


def match_centres(pair: Pair, source: View, target: View, size: int, stride: int) -> np.ndarray:
    """(P,) pixel errors in the original target image; pixel i spans [i, i + 1), a cell predicts its centre."""
    grid = torch.from_numpy((pair.source_points + 0.5) / source.longest * 2 - 1).float()
    scale = size / target.longest
    centres = (torch.arange(target.map.shape[-1]) + 0.5) * stride / scale
    valid = (centres < target.height)[:, None] & (centres < target.width)
    cells = nearest_cells(source.map, target.map, grid, align_corners=False, valid=valid)
    predicted = (cells.cpu().double().numpy() + 0.5) * stride / scale - 0.5
    return np.linalg.norm(predicted - pair.target_points, axis=1)


_GEOMETRIES = {"probe3d": (prepare_probe3d, match_probe3d), "centres": (prepare_centres, match_centres)}


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
    macro = settings.pairs_per_bin is not None
    for name, groups in bins.items():
        for column, alpha in enumerate(settings.alphas):
            rates = {
                group[0].category: sum(int(hits[p.id][column]) for p in group) / sum(totals[p.id] for p in group)
                for group in groups
                if group
            }
            if not rates:
                continue
            members = [pair for group in groups for pair in group]
            per_point = sum(int(hits[p.id][column]) for p in members) / sum(totals[p.id] for p in members)
            by_class = float(np.mean(list(rates.values())))
            key = f"PCK@{alpha:.2f}{name}"
            metrics[key] = by_class if macro else per_point
            if not macro:
                metrics[f"{key}_per_class_mean"] = by_class
                metrics[f"{key}_per_image"] = float(np.mean([hits[p.id][column] / totals[p.id] for p in members]))
            per_class[key] = {category: rates.get(category) for category in sorted({p.category for p in dataset.pairs})}

    primary = [pair for group in bins[""] for pair in group]
    categories = {name: i for i, name in enumerate(sorted({p.category for p in primary}))}
    table = np.stack([hits[p.id] for p in primary])
    counts = np.array([totals[p.id] for p in primary])
    groups_of = np.array([categories[p.category] for p in primary])
    ci95 = {
        f"PCK@{alpha:.2f}": statistics.bootstrap_ratio(
            table[:, column], counts, groups_of if macro else None, seed=context.seed
        )
        for column, alpha in enumerate(settings.alphas)
    }
    context.notes |= {"pairs": len(primary), "keypoints": int(counts.sum()), "pairs_evaluated": len(hits)}
    return Outcome(
        metrics=metrics,
        per_class=per_class,
        ci95=ci95,
        n_images=len(primary),
        statistics={
            "hits": table,
            "totals": counts,
            "category": groups_of,
            "pair_id": np.array([p.id for p in primary]),
        },
        features={
            "input_size": settings.input_size,
            "used_size": used + -used % encoder.stride,
            "resize": settings.geometry,
            "final_norm": settings.final_norm,
        },
    )
