"""Geometric correspondence: surface points of an object are matched to another view of it by patch features.

Matches are scored by their distance in space, known from depth and pose. `probe3d-1` reproduces probe3d's evaluation on
NAVI (El Banani et al., *Probing the 3D Awareness of Visual Foundation Models*, CVPR 2024) with another list of pairs;
`clean-1` is the same measurement without its quirks. README.md lists constants and quirks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from neco_bench.tasks.geometric_correspondence.geometry import GEOMETRIES, Prepared, features_at
from neco_bench.tasks.geometric_correspondence.matching import PIXELS, match_points, moved, projected
from neco_bench.tasks.geometric_correspondence.score import MatchScore
from neco_bench.tasks.geometric_correspondence.settings import Settings
from torch import Tensor

from neco_bench.core import distributed
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.views import ViewDataset, ViewPair
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.loader import load_chunks


def cost(settings: Settings, data: dict[str, ViewDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: every view once; a third of the grid's points is compared with as many for each pair."""
    dataset = data["test"]
    size = settings.input_size_for(stride)
    points = settings.grid**2 / 3
    objects = len({pair.object for pair in dataset.pairs})
    return Cost(
        images=len(dataset.image_ids),
        size=size,
        width=dimension,
        operations=2.0 * len(dataset) * points**2 * dimension,
        memory=4.0 * len(dataset.image_ids) / objects * dimension * (points + (size // stride) ** 2),
        unstored=len(dataset.image_ids),
    )


def run(encoder: Encoder, data: dict[str, ViewDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the recall on data["test"], object by object; each view is encoded once."""
    dataset = data["test"]
    by_object: dict[str, list[ViewPair]] = defaultdict(list)
    for pair in dataset.pairs:
        by_object[pair.object].append(pair)
    as_is = settings.geometry == "probe3d" and settings.tokens_per_side is None and encoder.only_size is None
    size = settings.input_size if as_is else settings.input_size_for(encoder.stride)
    score = MatchScore(dataset, settings, context)
    mine = sorted(by_object)[distributed.rank() :: distributed.world()]
    for name in context.track(mine, "objects"):
        pairs = by_object[name]
        views = encode_views(encoder, dataset, sorted({v for p in pairs for v in (p.source_id, p.target_id)}), size,
                             settings, context)  # fmt: skip
        with context.phase("match"):
            for pair in pairs:
                score_pair(pair, views[pair.source_id], views[pair.target_id], settings, score)
    multiple = encoder.size_multiple or encoder.stride
    return score.outcome(used_size=size + -size % multiple)


def encode_views(
    encoder: Encoder,
    dataset: ViewDataset,
    view_ids: Sequence[str],
    size: int,
    settings: Settings,
    context: Context,
) -> dict[str, tuple[Prepared, Tensor]]:
    """Load, prepare and encode views: {view id: (prepared, features (N, D) of its points)}."""
    prepare, multiple = GEOMETRIES[settings.geometry], encoder.size_multiple or encoder.stride
    mean = settings.mean or encoder.mean

    def load(view_id: str) -> tuple[str, Prepared]:
        return view_id, prepare(view_id, dataset.read_view(view_id), size, multiple, mean, settings.grid)

    extractor = FeatureExtractor(encoder, context, final_norm=settings.final_norm, mean=settings.mean, std=settings.std)
    views: dict[str, tuple[Prepared, Tensor]] = {}
    for loaded in load_chunks(load, view_ids, context):
        with context.phase("encode"):
            maps = extractor.encode(torch.stack([view.image for _, view in loaded]))
            for (name, view), features in zip(loaded, maps, strict=True):
                views[name] = view, features_at(features, view, settings.grid, settings.geometry)
    return views


def score_pair(
    pair: ViewPair,
    source: tuple[Prepared, Tensor],
    target: tuple[Prepared, Tensor],
    settings: Settings,
    score: MatchScore,
) -> None:
    """Match the points of one view to those of another, and add their errors to the score."""
    (first, first_features), (second, second_features) = source, target
    matches = match_points(first_features, second_features, settings.matches)
    true = moved(first.points[matches.source], first.camera, second.camera)
    matched = second.points[matches.target]
    errors = np.linalg.norm(true - matched, axis=1)
    ends, places = (projected(points, second.focal) for points in (true, matched))
    score.add(pair, errors, np.linalg.norm(ends - places, axis=1) * PIXELS / second.side)

    def drawn() -> dict[str, np.ndarray]:
        """Return up to 30 matches, in pixels of the two crops: points, matched points and true positions."""
        some = np.unique(np.linspace(0, len(errors) - 1, min(30, len(errors))).astype(int))
        at = second.places[matches.target[some]] * second.side
        return {
            "starts": first.places[matches.source[some]] * first.side,
            "found": at,
            "ends": at + (ends - places)[some],
            "right": errors[some] < settings.bin_distance,
        }

    images = [(255 * view.image).round().byte().permute(1, 2, 0).numpy for view in (first, second)]
    score.context.record(pair.id, source=images[0], target=images[1], matches=drawn, errors=errors)
