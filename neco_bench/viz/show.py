"""`show`: what an encoder did with some images or pairs of a stored result, as a PNG grid and an HTML page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from neco_bench.core.errors import UsageError
from neco_bench.core.files import slug, write_whole
from neco_bench.data.base import IGNORE, PairDataset, SegmentationDataset
from neco_bench.metrics import segmentation
from neco_bench.reports.compare import hits_column, item_scores
from neco_bench.results.schema import Result
from neco_bench.runner.execute import record_predictions
from neco_bench.runner.job import Job
from neco_bench.viz.diagnostics import principal_colours
from neco_bench.viz.draw import (
    RIGHT,
    WRONG,
    PictureRow,
    draw_grid,
    draw_hits,
    draw_pair,
    draw_segmentation,
    encode_image,
    thumbnail,
)


@dataclass(frozen=True)
class Shown:
    """What was written, of how many items, and of how many the counts are not the stored ones."""

    page: Path
    items: int
    differing: int


def choose(scores: dict[str, float], worst: int, best: int, named: Sequence[str]) -> list[str]:
    """Ids: those named, else the `worst` with the lowest scores, from the lowest on, then the `best`, from the highest.

    Raises UsageError for a name that is not there, or where nothing is asked for.
    """
    if named:
        absent = [name for name in named if name not in scores]
        if absent:
            raise UsageError(f"No scored item {absent[0]!r}. Ids look like {', '.join(map(repr, list(scores)[:3]))}.")
        return list(dict.fromkeys(named))
    order = sorted(scores, key=lambda name: (scores[name], name))
    chosen = list(dict.fromkeys([*order[: max(0, worst)], *order[::-1][: max(0, best)]]))
    if not chosen:
        raise UsageError("Nothing to show: give --worst or --best a number above 0, or name an --image.")
    return chosen


def show(
    result: Result, arrays: dict[str, np.ndarray], job: Job, out: Path, *, worst: int, best: int, named: Sequence[str]
) -> Shown:
    """Run the job of a stored result again and write `index.html`, `grid.png` and `pictures/` of some items into `out`.

    arrays: the statistics stored with the result; predictions are counted again and compared with them. Raises
    UsageError for a family that records no predictions, and what running the job raises.
    """
    scores = item_scores(result, arrays)
    chosen = choose(scores, worst, best, named)
    predictions = record_predictions(job, chosen)
    absent = [name for name in chosen if name not in predictions]
    if absent:
        raise UsageError(f"Task family {result.family!r} records no predictions to be shown (no `Context.record`).")
    data = job.draws[0]
    ids = [str(name) for name in arrays["image_id" if "image_id" in arrays else "pair_id"]]
    legend: list[tuple[str, tuple[int, int, int]]] = []
    dataset = data["test"] if "test" in data else data["val"]
    if isinstance(dataset, SegmentationDataset):
        if all("features" in predictions[name] for name in chosen):
            colours = principal_colours(torch.stack([predictions[name]["features"] for name in chosen]))
            for name, own in zip(chosen, colours, strict=True):
                predictions[name]["colours"] = own
        rows = [
            draw_segmentation(dataset, name, predictions[name], f"mIoU {100 * scores[name]:.1f}") for name in chosen
        ]
        stored = arrays["confusion"]
        stored = stored.reshape(-1, *stored.shape[-3:])[0]
        size = stored.shape[-1]
        differing = sum(
            not np.array_equal(
                segmentation.confusion_matrix(predictions[name]["truth"], predictions[name]["prediction"], size),
                stored[ids.index(name)],
            )
            for name in chosen
        )
        present = np.unique([c for name in chosen for c in np.unique(predictions[name]["truth"]) if c != IGNORE])
        legend = [(dataset.classes[c], tuple(dataset.palette[c].tolist())) for c in present]
    else:
        assert isinstance(dataset, PairDataset)
        column, settings = hits_column(result), result.provenance["settings"]
        hits = {name: draw_hits(predictions[name], settings["alphas"][column], settings["strict"]) for name in chosen}
        rows = [draw_pair(dataset, name, predictions[name], hits[name]) for name in chosen]
        differing = sum(int(hits[name].sum()) != arrays["hits"][ids.index(name), column] for name in chosen)
        legend = [("found", RIGHT), ("missed (a ring is where it should be)", WRONG)]
    several = "confusion" in arrays and arrays["confusion"].ndim > 3
    _write(out, result, rows, legend, _note(worst, best, named, differing, several))
    return Shown(out / "index.html", len(rows), differing)


def _note(worst: int, best: int, named: Sequence[str], differing: int, several: bool) -> str:
    order = "As named." if named else f"The {worst} with the lowest scores, then the {best} with the highest."
    same = "Counted again, these predictions give the stored counts."
    other = f"Counted again, {differing} of them differ from the stored counts: other versions, weights or data."
    first = " Scores are means over several seeds or draws; the pictures are of the first." if several else ""
    return f"{order} {other if differing else same}{first}"


STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 90rem; padding: 1rem; font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0; } h2 { font-size: 1rem; margin: 1.4rem 0 .3rem; } h2 span { font-weight: 400; }
.row { display: flex; flex-wrap: wrap; gap: .5rem; } figure { margin: 0; }
img { max-width: 100%; height: auto; display: block; } figcaption, .note { color: GrayText; font-size: .85em; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem .8rem; font-size: .85em; }
.legend i { display: inline-block; width: 1em; height: 1em; margin-right: .3em; vertical-align: -.15em; }
"""


def _write(
    out: Path, result: Result, rows: Sequence[PictureRow], legend: Iterable[tuple[str, tuple[int, ...]]], note: str
) -> None:
    """The grid, the page, and of each tile a thumbnail and the picture."""
    metric = result.primary_metric
    low, high = result.ci95.get(metric, (float("nan"), float("nan")))
    title = f"{result.model} on {result.task}@{result.protocol}"
    value = f"{metric}: {100 * result.metrics[metric]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    for old in (out / "pictures").glob("[0-9][0-9][0-9]-*"):  # of an earlier call
        old.unlink()
    sections = []
    for number, row in enumerate(rows):
        figures = []
        for tile in row.tiles:
            photo = tile.kind == "photo" or (tile.kind == "wide" and len(row.tiles) == 1)
            ending = ".jpg" if photo else ".png"
            stem = f"pictures/{number:03d}-{slug(tile.title)}"
            small = thumbnail(tile)
            write_whole(out / f"{stem}{ending}", encode_image(tile.pixels, photo))
            write_whole(out / f"{stem}-small{ending}", encode_image(small, photo))
            height, width = small.shape[:2]
            text = html.escape(f"{tile.title} of {row.name}", quote=True)
            figures.append(
                f'<figure><a href="{stem}{ending}"><img loading="lazy" width="{width}" height="{height}" '
                f'src="{stem}-small{ending}" alt="{text}"></a>'
                f"<figcaption>{html.escape(tile.title)}</figcaption></figure>"
            )
        name, caption = html.escape(row.name), html.escape(row.caption)
        sections.append(f'<h2>{name} <span>{caption}</span></h2>\n<div class="row">{"".join(figures)}</div>')
    swatches = "".join(
        f'<span><i style="background:rgb{colour}"></i>{html.escape(name)}</span>' for name, colour in legend
    )
    page = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title>{html.escape(title)}</title>\n<link rel="icon" href="data:,">',
        f"<style>{STYLE}</style>\n</head>\n<body>",
        f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(value)}</p>\n<p class=note>{html.escape(note)}</p>",
        f'<div class="legend">{swatches}</div>',
        *sections,
        "</body>\n</html>\n",
    ]
    write_whole(out / "grid.png", encode_image(draw_grid(rows, f"{title}   {value}"), False))
    write_whole(out / "index.html", "\n".join(page).encode())
