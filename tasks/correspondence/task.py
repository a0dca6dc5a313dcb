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
from functools import partial

import numpy as np
import torch
from neco_bench.tasks.correspondence.geometry import GEOMETRIES, View, match_padded_centre
from neco_bench.tasks.correspondence.matching import (
    draw_pairs,
)
from neco_bench.tasks.correspondence.settings import Average, Settings

from neco_bench.core import distributed
from neco_bench.core.errors import BadInputError
from neco_bench.core.task import Context, Cost, Outcome
from neco_bench.data.base import Pair, PairDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.extract import encode_within_memory
from neco_bench.features.loader import loading_threads
from neco_bench.features.patches import rescaled, unit_length
from neco_bench.metrics import bootstrap
from neco_bench.metrics.pck import box_side, pck_averages, pck_hits


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
    prepare, match = GEOMETRIES[settings.geometry]
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
        return bootstrap.bootstrap_mean(hits / totals, images=images, seed=seed)
    groups = classes if average == "class_mean" else None
    return bootstrap.bootstrap_ratio(hits, totals, groups, images=images, seed=seed)
