"""`show`: draw the predictions of a stored result for some images or pairs, as a PNG grid and an HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from neco_bench.core.errors import UsageError
from neco_bench.core.files import slug, write_whole
from neco_bench.data.base import BoxDataset, PairDataset, SegmentationDataset
from neco_bench.data.dense import DenseDataset
from neco_bench.data.video import VideoDataset
from neco_bench.data.views import ViewDataset
from neco_bench.metrics import segmentation
from neco_bench.reports.compare import hits_column, item_scores
from neco_bench.reports.render import render
from neco_bench.results.schema import Result
from neco_bench.runner.execute import record_predictions
from neco_bench.runner.job import Job
from neco_bench.viz.diagnostics import principal_colours
from neco_bench.viz.draw import (
    BOX,
    NOT_SCORED,
    RIGHT,
    WHITE,
    WRONG,
    PictureRow,
    Tile,
    class_legend,
    clear,
    draw_attention,
    draw_boxes,
    draw_grid,
    draw_matches,
    draw_pair,
    draw_segmentation,
    encode_animation,
    encode_image,
    fitted,
    thumbnail,
)
from neco_bench.viz.draw_dense import dense_legend, draw_dense
from neco_bench.viz.draw_video import draw_clip


@dataclass(frozen=True)
class Shown:
    """Output of `show`; notebooks show the grid of pictures."""

    page: Path
    items: int  # number of images or pairs drawn
    differing: int  # items whose counts differ from the stored ones

    @property
    def grid(self) -> Path:
        """Path of all pictures as one PNG."""
        return self.page.with_name("grid.png")

    def _repr_png_(self) -> bytes:
        return self.grid.read_bytes()


def choose(scores: dict[str, float], worst: int, best: int, named: Sequence[str]) -> list[str]:
    """Return the named ids, or the `worst` ids with the lowest scores, then the `best` with the highest.

    Raises:
        UsageError: if a name has no score, or nothing is requested.
    """
    if named:
        absent = [name for name in named if name not in scores]
        if absent:
            raise UsageError(f"No scored item {absent[0]!r}. Ids look like {', '.join(map(repr, list(scores)[:3]))}.")
        return list(dict.fromkeys(named))
    order = sorted(scores, key=lambda name: (scores[name], name))
    ids = list(dict.fromkeys([*order[: max(0, worst)], *order[::-1][: max(0, best)]]))
    if not ids:
        raise UsageError("Nothing to show: give --worst or --best a number above 0, or name an --image.")
    return ids


def show(
    result: Result, arrays: dict[str, np.ndarray], job: Job, out: Path, *, worst: int, best: int, named: Sequence[str]
) -> Shown:
    """Run the job of a stored result again and draw its predictions for some items.

    Writes `index.html`, `grid.png` and `pictures/` into `out`. The predictions are counted and compared with the stored
    statistics.

    Args:
        result: the stored result.
        arrays: the statistics stored with it.
        job: its job, see `job_of`.
        out: folder of the page.
        worst: number of items with the lowest scores, or the largest errors.
        best: number of items with the highest scores, or the smallest errors.
        named: ids to draw instead.

    Raises:
        UsageError: if the task family records no predictions. Errors of the job are raised too.
    """
    scores, sign = _scores(result, arrays), result.metric().sign
    ids = choose({name: sign * score for name, score in scores.items()}, worst, best, named)
    recorded = record_predictions(job, ids)
    if any(name not in recorded for name in ids):
        raise UsageError(f"Task family {result.family!r} records no predictions that could be drawn.")
    predictions = {name: recorded[name] for name in ids}
    data = job.draws[0]
    dataset = data["test"] if "test" in data else data["val"]
    if isinstance(dataset, DenseDataset):
        drawn = _draw_dense(predictions, dataset.kind, result, arrays)
    elif isinstance(dataset, BoxDataset):
        drawn = _draw_boxes(dataset, predictions, result, scores)
    elif isinstance(dataset, ViewDataset):
        drawn = _draw_views(predictions, result, scores)
    elif isinstance(dataset, VideoDataset):
        drawn = _draw_clips(dataset, predictions, scores)
    elif isinstance(dataset, SegmentationDataset) and f"score/{result.primary_metric}" in arrays:
        drawn = _draw_attention(dataset, predictions, scores)
    elif isinstance(dataset, SegmentationDataset):
        drawn = _draw_images(dataset, predictions, scores, _stored_counts(result, arrays))
    else:
        assert isinstance(dataset, PairDataset)  # noqa: S101 - the only other kind
        drawn = _draw_pairs(dataset, predictions, result, _stored_counts(result, arrays))
    ends = ("lowest scores", "highest scores") if sign > 0 else ("largest errors", "smallest errors")
    order = "As named." if named else f"The {worst} items with the {ends[0]}, then the {best} with the {ends[1]}."
    if drawn.differing:
        counts = (
            f"The counts of {drawn.differing} of them differ from the stored ones: other versions, weights or data."
        )
    else:
        counts = "These predictions give the stored counts."
    several = "confusion" in arrays and arrays["confusion"].ndim > 3
    first = " Scores are means over several seeds or draws; the pictures show the first." if several else ""
    _write(out, result, drawn, f"{order} {counts}{first}")
    return Shown(out / "index.html", len(drawn.rows), drawn.differing)


@dataclass(frozen=True)
class _Drawn:
    """Pictures of items, their legend, and the number of items whose counts differ from the stored ones."""

    rows: list[PictureRow]
    legend: list[tuple[str, tuple[int, ...]]]
    differing: int


def _scores(result: Result, arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the scores for the selection of items; for boxes the IoU, which is more informative than hits."""
    form = next((f"score/{name}" for name in ("best_IoU", result.primary_metric) if f"score/{name}" in arrays), None)
    if form is None or "image_id" not in arrays:
        return item_scores(result, arrays)
    return dict(zip(arrays["image_id"].astype(str).tolist(), arrays[form].tolist(), strict=True))


def _draw_attention(
    dataset: SegmentationDataset, predictions: dict[str, dict[str, Any]], scores: Mapping[str, float]
) -> _Drawn:
    rows = [draw_attention(dataset, name, own) for name, own in predictions.items()]
    differing = sum(abs(own["jaccard"] - scores[name]) > 1e-9 for name, own in predictions.items())
    return _Drawn(rows, class_legend(dataset, [own["truth"] for own in predictions.values()]), differing)


def _draw_boxes(
    dataset: BoxDataset, predictions: dict[str, dict[str, Any]], result: Result, scores: Mapping[str, float]
) -> _Drawn:
    least = result.provenance["settings"]["iou"]
    rows = [draw_boxes(dataset, name, own, own["iou"] >= least) for name, own in predictions.items()]
    differing = sum(abs(own["iou"] - scores[name]) > 1e-9 for name, own in predictions.items())
    return _Drawn(rows, [("object", WHITE), ("correct box", RIGHT), ("wrong: broken lines", WRONG)], differing)


def _stored_counts(result: Result, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the stored counts of each item: its confusion matrix (of the first seed or draw), or its hits."""
    if "confusion" in arrays:
        counts = arrays["confusion"].reshape(-1, *arrays["confusion"].shape[-3:])[0]
    else:
        counts = arrays["hits"][:, hits_column(result)]
    ids = arrays["image_id" if "image_id" in arrays else "pair_id"]
    return {str(name): count for name, count in zip(ids, counts, strict=True)}


def _draw_images(
    dataset: SegmentationDataset,
    predictions: dict[str, dict[str, Any]],
    scores: Mapping[str, float],
    stored: Mapping[str, np.ndarray],
) -> _Drawn:
    if all("features" in own for own in predictions.values()):
        colours = principal_colours(torch.stack([own["features"] for own in predictions.values()]))
        predictions = {
            name: {**own, "colours": colour} for (name, own), colour in zip(predictions.items(), colours, strict=True)
        }
    rows, differing = [], 0
    for name, own in predictions.items():
        rows.append(draw_segmentation(dataset, name, own, f"mIoU {100 * scores[name]:.1f}"))
        counts = segmentation.confusion_matrix(own["truth"], own["prediction"], len(stored[name]))
        differing += not np.array_equal(counts, stored[name])
    legend = class_legend(dataset, [own[kind] for own in predictions.values() for kind in ("truth", "prediction")])
    marks = [("errors: wrong", WRONG)]
    if any("neighbours" in own for own in predictions.values()):
        marks = [("neighbour of the same class", RIGHT), ("errors, neighbour of another class (with a cross)", WRONG)]
    return _Drawn(rows, [*legend, *marks], differing)


def _draw_pairs(
    dataset: PairDataset, predictions: dict[str, dict[str, Any]], result: Result, stored: Mapping[str, np.ndarray]
) -> _Drawn:
    settings = result.provenance["settings"]
    alpha = settings["alphas"][hits_column(result)]
    rows, differing = [], 0
    for name, own in predictions.items():
        limit = alpha * own["side"]
        hits = own["errors"] < limit if settings["strict"] else own["errors"] <= limit
        rows.append(draw_pair(dataset, name, own, hits))
        differing += int(hits.sum()) != stored[name]
    return _Drawn(rows, [("correct", RIGHT), ("wrong: broken lines (a ring at the true position)", WRONG)], differing)


def _draw_views(predictions: dict[str, dict[str, Any]], result: Result, scores: Mapping[str, float]) -> _Drawn:
    distances = result.provenance["settings"]["distances"]
    rows, differing = [], 0
    for name, own in predictions.items():
        recall = float(np.mean([(own["errors"] < limit).mean() for limit in distances]))
        matches = own["matches"]
        points = (matches["starts"], matches["found"], matches["ends"])
        pixels = draw_matches((own["source"], own["target"]), points, matches["right"], 2)
        rows.append(PictureRow(name, f"recall {100 * recall:.1f}", [Tile("source and target", pixels, "wide")]))
        differing += not np.isclose(recall, scores[name], atol=1e-4)
    limit = f"within {100 * result.provenance['settings']['bin_distance']:g} cm"
    return _Drawn(rows, [(limit, RIGHT), ("beyond: broken lines (a ring at the true position)", WRONG)], differing)


def _draw_clips(dataset: VideoDataset, predictions: dict[str, dict[str, Any]], scores: Mapping[str, float]) -> _Drawn:
    rows, differing = [], 0
    for name, own in predictions.items():
        score = own["scores"][0, :, : own["scored"]].mean()
        rows.append(draw_clip(dataset, name, own, f"J&F {100 * score:.1f}, objects: {len(own['scores'][0])}"))
        differing += not np.isclose(score, scores[name], atol=1e-4)
    return _Drawn(rows, [], differing)


def _draw_dense(
    predictions: dict[str, dict[str, Any]], kind: str, result: Result, arrays: Mapping[str, np.ndarray]
) -> _Drawn:
    metric = result.metric()
    stored = dict(zip(arrays["item_id"].tolist(), arrays[f"score/{result.primary_metric}"].tolist(), strict=True))
    rows, differing = [], 0
    for name, own in predictions.items():
        value = own["values"][result.primary_metric]
        rows.append(draw_dense(name, own, kind, f"{result.primary_metric} {metric.text(value)}"))
        differing += not np.isclose(value, stored[name], rtol=1e-4)
    return _Drawn(rows, dense_legend(kind), differing)


def _write(out: Path, result: Result, drawn: _Drawn, note: str) -> None:
    """Write the page, the grid, and the picture and thumbnail of each tile."""
    metric = result.primary_metric
    low, high = result.ci95.get(metric, (float("nan"), float("nan")))
    title = f"{result.model} on {result.task}@{result.protocol}"
    unit = result.metric()
    value = f"{metric}: {unit.text(result.metrics[metric])} [{unit.text(low) or 'nan'}, {unit.text(high) or 'nan'}]"
    for old in (out / "pictures").glob("[0-9][0-9][0-9]-*"):  # from an earlier call
        old.unlink()
    rows = [(row, [_write_tile(out, number, row, tile) for tile in row.tiles]) for number, row in enumerate(drawn.rows)]
    write_whole(out / "grid.png", encode_image(draw_grid(drawn.rows, f"{title}   {value}", drawn.legend), False))
    page = render("show.html", title=title, value=value, note=note, legend=drawn.legend, rows=rows, void=NOT_SCORED)
    write_whole(out / "index.html", page.encode())


def _write_tile(out: Path, number: int, row: PictureRow, tile: Tile) -> dict[str, Any]:
    """Write a tile of a numbered row and its thumbnail; return its values for the page."""
    stem = f"pictures/{number:03d}-{slug(tile.title)}"
    if tile.kind == "animation":
        small = np.stack([fitted(frame, BOX, Image.Resampling.LANCZOS) for frame in tile.pixels])
        write_whole(out / f"{stem}.gif", encode_animation(tile.pixels))
        write_whole(out / f"{stem}-small.gif", encode_animation(small))
        return _picture(tile, stem, ".gif", small.shape[1:3])
    photo = tile.kind == "photo" or (tile.kind == "wide" and len(row.tiles) == 1)
    ending = ".jpg" if photo else ".png"
    small = thumbnail(tile)
    write_whole(out / f"{stem}{ending}", encode_image(tile.pixels if photo else clear(tile), photo))
    write_whole(out / f"{stem}-small{ending}", encode_image(small, photo))
    return _picture(tile, stem, ending, small.shape[:2])


def _picture(tile: Tile, stem: str, ending: str, size: tuple[int, ...]) -> dict[str, Any]:
    height, width = size
    return {
        "title": tile.title,
        "file": f"{stem}{ending}",
        "small": f"{stem}-small{ending}",
        "width": width,
        "height": height,
    }
