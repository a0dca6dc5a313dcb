"""`show --layers`: the scores of `run --layers all` by layer, one picture and one page per task."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from neco_bench.core.errors import MissingError
from neco_bench.core.files import slug, write_whole
from neco_bench.core.metric import Metric
from neco_bench.reports.compare import is_named
from neco_bench.reports.grid import cells_of, runs_frame
from neco_bench.reports.render import render
from neco_bench.results.schema import Result
from neco_bench.viz.draw import RIGHT, WHITE, broken_lines, encode_image, font

# A single layer, also of an encoder that accepts one input size only.
_ONE_LAYER = re.compile(r"(?P<model>.*)\[layers=(?P<layer>\d+)\](\[input=\d+\])?")

BAND, LINES, INK, PALE = (200, 222, 238), (228, 228, 228), (0, 0, 0), (90, 90, 90)

WIDTH, HEIGHT = 960, 540
LEFT, END, TOP, BOTTOM = 76, WIDTH - 28, 84, HEIGHT - 62  # limits of the axes
SHARP = 3  # factor by which the plot is drawn larger, for smooth lines

TICKS = 8  # number of ticks of the scores (at most one more)


@dataclass(frozen=True)
class LayerScore:
    """The score of a layer, averaged over `repeats` seeds or draws; low and high are NaN without an interval."""

    layer: int
    value: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True)
class LayerCurve:
    """The scores of a model on a task (task@protocol), by layer. lacking: layers whose results failed or conflict."""

    model: str
    column: str
    primary_metric: str
    metric: Metric
    scores: Sequence[LayerScore]
    lacking: Sequence[int]

    @property
    def best(self) -> LayerScore:
        """The best score; the first layer in a tie."""
        return max(self.scores, key=lambda score: self.metric.sign * score.value)

    @property
    def axis(self) -> str:
        """The metric and its unit."""
        unit = self.metric.legend or ("%" if self.metric.unit == "percent" else "")
        return self.primary_metric + (f" ({unit})" if unit else "")

    @property
    def note(self) -> str:
        """The best layer, and the layers without a score."""
        text = f"best: layer {self.best.layer}, {self.metric.text(self.best.value)}"
        if self.lacking:
            text += f"; no score of layer{'s' * (len(self.lacking) > 1)} {', '.join(map(str, self.lacking))}"
        return text


def layer_curves(results: Iterable[Result], model: str, tasks: Sequence[str]) -> list[LayerCurve]:
    """Return the results of single layers of a model as curves, one per task, protocol and weights.

    Args:
        results: stored results of any models.
        model: the name of the model without layers.
        tasks: names or globs; all if empty.

    Raises:
        MissingError: if there are no results.
    """
    layers: dict[str, tuple[Result, int]] = {}
    for result in results:
        name = _ONE_LAYER.fullmatch(result.model)
        of_task = not tasks or any(is_named(result, task) for task in tasks)
        if name and name["model"] == model and of_task:
            layers[result.key] = result, int(name["layer"])
    groups: dict[tuple[str, str], list[tuple[int, Any]]] = defaultdict(list)
    for (_, _, name_in_tables, column), cell in cells_of(
        runs_frame(result for result, _ in layers.values())
    ).iterrows():
        layer = layers[cell.results[0].key][1]
        groups[name_in_tables.replace(f"[layers={layer}]", "", 1), column].append((layer, cell))
    curves = [_curve(*names, cells) for names, cells in sorted(groups.items())]
    curves = [curve for curve in curves if curve.scores]
    if not curves:
        raise MissingError(
            f"No results of single layers of {model!r}{' on these tasks' if tasks else ''}. Compute them: "
            f"neco-bench run --model {model} --task TASK --layers all"
        )
    return curves


def _curve(model: str, column: str, cells: list[tuple[int, Any]]) -> LayerCurve:
    by_layer = dict(sorted(cells, key=lambda own: own[0]))
    result = cells[0][1].results[0]
    scores = [
        LayerScore(layer, cell.value, cell.low, cell.high, int(cell.repeats))
        for layer, cell in by_layer.items()
        if not math.isnan(cell.value)
    ]
    lacking = [layer for layer, cell in by_layer.items() if math.isnan(cell.value)]
    return LayerCurve(model, column, result.primary_metric, result.metric(), scores, lacking)


def show_layers(curve: LayerCurve, out: Path) -> Path:
    """Write the page of a curve, `index.html`, and `layers.png` into a folder in `out`; return the page's path."""
    folder = out / slug(curve.model) / f"{slug(curve.column)}-layers"
    metric = curve.metric
    rows = [
        (score.layer, metric.text(score.value), metric.interval(score.low, score.high), score is curve.best)
        for score in curve.scores
    ]
    write_whole(folder / "layers.png", encode_image(draw_layers(curve), False))
    page = render("layers.html", curve=curve, rows=rows, width=WIDTH, height=HEIGHT)
    write_whole(folder / "index.html", page.encode())
    return folder / "index.html"


def draw_layers(curve: LayerCurve) -> np.ndarray:
    """Draw a curve (H, W, 3) uint8: scores by layer, their 95 % intervals as a band, and a ring at the best one."""
    picture = Image.new("RGB", (SHARP * WIDTH, SHARP * HEIGHT), WHITE)
    draw = ImageDraw.Draw(picture)

    def text(x: float, y: float, content: str, anchor: str, size: int = 14, colour: tuple[int, ...] = INK) -> None:
        draw.text((SHARP * x, SHARP * y), content, fill=colour, font=font(SHARP * size), anchor=anchor)

    def line(points: Sequence[tuple[float, float]], colour: tuple[int, ...], width: float = 1) -> None:
        scaled = [(SHARP * x, SHARP * y) for x, y in points]
        draw.line(scaled, fill=colour, width=round(SHARP * width), joint="curve")

    def dot(x: float, y: float, radius: float, **style: Any) -> None:
        draw.ellipse(tuple(SHARP * side for side in (x - radius, y - radius, x + radius, y + radius)), **style)

    ticks = _ticks(curve)
    layers = [score.layer for score in curve.scores]
    first, last = layers[0], layers[-1]

    def across(layer: float) -> float:
        return LEFT + 16 + (END - LEFT - 32) * ((layer - first) / (last - first) if last > first else 0.5)

    def up(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (curve.metric.scale * value - ticks[0]) / (ticks[-1] - ticks[0])

    title = broken_lines(f"{curve.model} on {curve.column}", WIDTH - 32, 16)
    text(16, 12, title[0].strip() + (" ..." if len(title) > 1 else ""), "la", 16)
    band = ", with 95 % intervals" if any(not math.isnan(score.low) for score in curve.scores) else ""
    text(16, 38, f"{curve.axis} by layer{band}; {curve.note}", "la", 13, PALE)
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    for tick in ticks:
        y = up(tick / curve.metric.scale)
        line([(LEFT, y), (END, y)], LINES)
        text(LEFT - 8, y, f"{tick:.{digits}f}", "rm", 13, PALE)
    step = math.ceil((last - first + 1) / 24)
    for layer in range(first, last + 1, step):
        line([(across(layer), BOTTOM), (across(layer), BOTTOM + 5)], PALE)
        text(across(layer), BOTTOM + 10, str(layer), "ma", 13, PALE)
    text((LEFT + END) / 2, HEIGHT - 14, "layer", "ms", 14, PALE)

    for one, other in itertools.pairwise(curve.scores):  # a gap if a score has no interval
        ends = [(one.layer, one.low), (other.layer, other.low), (other.layer, other.high), (one.layer, one.high)]
        if other.layer == one.layer + 1 and not any(math.isnan(value) for _, value in ends):
            draw.polygon([(SHARP * across(layer), SHARP * up(value)) for layer, value in ends], fill=BAND)
    for one, other in itertools.pairwise(curve.scores):
        if other.layer == one.layer + 1:
            line([(across(s.layer), up(s.value)) for s in (one, other)], RIGHT, 2)
    for score in curve.scores:
        x = across(score.layer)
        if not math.isnan(score.low):
            line([(x, up(score.low)), (x, up(score.high))], RIGHT)
        dot(x, up(score.value), 4, fill=RIGHT)
    dot(across(curve.best.layer), up(curve.best.value), 8, outline=RIGHT, width=2 * SHARP)
    return np.asarray(picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))


def _ticks(curve: LayerCurve) -> list[float]:
    """Return round numbers, in the unit of the axis, that cover all intervals."""
    values = [v for score in curve.scores for v in (score.value, score.low, score.high) if not math.isnan(v)]
    low, high = (curve.metric.scale * end for end in (min(values), max(values)))
    least = 10.0**-curve.metric.digits  # the resolution of tables
    if high - low < least:
        low, high = low - least, high + least
    power = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if high - low <= power * factor * (TICKS - 1))
    return [step * number for number in range(math.floor(low / step), math.ceil(high / step) + 1)]
