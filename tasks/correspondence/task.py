"""Semantic correspondence: match keypoints of one image to another by the nearest patch feature, scored by PCK.

`pck-1` uses all pairs and geometry without offsets. The other protocols reproduce references: `probe3d-1`, probe3d's
evaluation on SPair-71k (El Banani et al., *Probing the 3D Awareness of Visual Foundation Models*, CVPR 2024), which
NeCo cites; `sd-dino-1`, *A Tale of Two Features* (Zhang et al., NeurIPS 2023); `geoaware-1`, the zero-shot evaluation
of *Telling Left from Right* (Zhang et al., CVPR 2024); `dift-1`, *Emergent Correspondence from Image Diffusion* (Tang
et al., NeurIPS 2023). README.md lists their constants and quirks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from neco_bench.tasks.correspondence.geometry import GEOMETRIES, View, match_padded_centre
from neco_bench.tasks.correspondence.matching import draw_pairs
from neco_bench.tasks.correspondence.score import Groups, PairScore
from neco_bench.tasks.correspondence.settings import Settings

from neco_bench.core import distributed
from neco_bench.core.errors import BadInputError
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import Pair, PairDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.loader import load_chunks
from neco_bench.features.patches import rescaled, unit_length


def cost(settings: Settings, data: dict[str, PairDataset], stride: int, dimension: int) -> Cost:
    """Estimate a run: every image once; about eight points per pair are compared with every cell."""
    dataset = data["test"]
    size = settings.input_size_for(stride)
    cells, categories = (size // stride) ** 2, len({pair.category for pair in dataset.pairs})
    return Cost(
        images=len(dataset.image_ids),
        size=size,
        width=dimension,
        operations=2.0 * len(dataset) * (8 + 2 * 4) * cells * dimension,  # including normalisation of both maps
        memory=4.0 * len(dataset.image_ids) / categories * cells * dimension,
        unstored=len(dataset.image_ids),
    )


def run(encoder: Encoder, data: dict[str, PairDataset], settings: Settings, context: Context) -> Outcome:
    """Measure the PCK on data["test"]; each image of a category is encoded once."""
    dataset = data["test"]
    groups = groups_by_category(dataset, settings)
    as_is = settings.geometry == "probe3d" and settings.tokens_per_side is None
    size = settings.input_size if as_is else settings.input_size_for(encoder.stride)
    prepare, match = GEOMETRIES[settings.geometry]
    prepare = partial(prepare, size=size, stride=encoder.stride, mean=settings.mean or encoder.mean)
    if settings.geometry == "padded_centre":
        match = partial(match_padded_centre, settings=settings)

    # "squash" interpolates features before it normalises them.
    normalise = partial(rescaled, dim=None) if settings.geometry == "squash" else partial(unit_length, dim=0)
    norm, mean, std = settings.final_norm, settings.mean, settings.std
    extractor = FeatureExtractor(encoder, context, final_norm=norm, mean=mean, std=std)
    score = PairScore(dataset, settings, context)
    mine = list(groups)[distributed.rank() :: distributed.world()]
    for category in context.track(mine, "pairs"):
        by_target: dict[str, list[Pair]] = defaultdict(list)
        for pair in {pair.id: pair for members in groups[category].values() for pair in members}.values():
            by_target[pair.target_id].append(pair)
        images = {i for pairs in by_target.values() for pair in pairs for i in (pair.source_id, pair.target_id)}
        views = encode_views(extractor, dataset, images, prepare, normalise)
        with context.phase("match"):
            for target, pairs in by_target.items():
                sources = [views[pair.source_id] for pair in pairs]
                points, errors = match(pairs, sources, views[target], size, encoder.stride)
                ends = np.cumsum([len(pair.source_points) for pair in pairs])[:-1]
                for pair, of_pair, errors_of_pair in zip(
                    pairs, np.split(points, ends), np.split(errors, ends), strict=True
                ):
                    score.add(pair, of_pair, errors_of_pair)
    return score.outcome(list(groups.values()), used_size=size + -size % encoder.stride)


def groups_by_category(dataset: PairDataset, settings: Settings) -> dict[str, Groups]:
    """Return named groups of each category's pairs, in order; levels of variation are groups if pairs have them.

    Raises BadInputError if no pair has a keypoint.
    """
    by_category: dict[str, list[Pair]] = defaultdict(list)
    for pair in dataset.pairs:
        if len(pair.source_points):
            by_category[pair.category].append(pair)
    if not by_category:
        raise BadInputError(
            f"No pair of {dataset.name!r} {dataset.split!r} has a common keypoint. Restore its annotations, or raise "
            f"--limit."
        )
    return {category: _groups(by_category[category], settings) for category in sorted(by_category)}


def _groups(pairs: Sequence[Pair], settings: Settings) -> Groups:
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


def encode_views(
    extractor: FeatureExtractor,
    dataset: PairDataset,
    image_ids: Iterable[str],
    prepare: Callable[[np.ndarray], torch.Tensor],
    normalise: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, View]:
    """Load, prepare and encode images, and normalise their features: {image id: view}."""

    def load(image_id: str) -> tuple[str, torch.Tensor, tuple[int, ...]]:
        image = dataset.read_image(image_id)
        return image_id, prepare(image), image.shape

    views: dict[str, View] = {}
    for loaded in load_chunks(load, sorted(image_ids), extractor.context):
        names, inputs, shapes = zip(*loaded, strict=True)
        with extractor.context.phase("encode"):
            features = extractor.encode(torch.stack(inputs))
        for name, feature, (height, width, _) in zip(names, features, shapes, strict=True):
            views[name] = View(normalise(feature), width, height)
    return views
