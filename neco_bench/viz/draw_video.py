"""Drawing of clips: frames over time as a strip, scores by frame, and an animated picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from neco_bench.data.base import IGNORE
from neco_bench.data.video import VideoDataset
from neco_bench.metrics.video import boundary_map
from neco_bench.viz.draw import GAP, PAPER, TEXT, WHITE, PictureRow, Tile, distinct_colours, fitted, font

FRAMES, ANIMATED = 6, 24  # maximum frames of a strip and of an animated picture


def object_colours(count: int) -> np.ndarray:
    """Return colours (count + 1, 3) uint8: background, then the objects in different hues."""
    return np.concatenate([np.zeros((1, 3), np.uint8), distinct_colours(count).reshape(-1, 3)])


def overlaid(image: np.ndarray, mask: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    """Return a frame (H, W, 3) with the objects of a mask (H, W) in colour, with white borders, fitted to a box."""
    small = fitted(image, box, Image.Resampling.BICUBIC)
    ids = np.asarray(Image.fromarray(mask).resize(small.shape[1::-1], Image.Resampling.NEAREST))
    ids = np.where(ids == IGNORE, np.uint8(0), ids)
    colours = object_colours(int(ids.max()))[ids]
    drawn = np.where((ids > 0)[..., None], 0.45 * small + 0.55 * colours, small).astype(np.uint8)
    for i in range(1, int(ids.max()) + 1):
        drawn[boundary_map(ids == i)] = WHITE
    return drawn


def draw_clip(dataset: VideoDataset, name: str, predicted: dict[str, Any], caption: str) -> PictureRow:
    """Draw a strip of ground truth above prediction, J&F by frame, and both side by side as an animation.

    Args:
        dataset: the data set of the clip.
        name: its id.
        predicted: what the family recorded: `truth` and `prediction`, masks of all frames; `scores` (2, objects, T),
            J&F after the first frame, of the prediction and of the unchanged first mask.
        caption: text next to its name.
    """
    clip = dataset.clip(dataset.ids.index(name))
    count = len(predicted["truth"])
    shown = np.unique(np.linspace(0, count - 1, FRAMES).round().astype(int))
    rows = []
    for part in ("truth", "prediction"):
        frames = [overlaid(clip[i].image, predicted[part][i], (200, 150)) for i in shown]
        rows.append(np.concatenate([_with_gap(frame) for frame in frames], 1))
    moving = []
    for i in np.unique(np.linspace(0, count - 1, ANIMATED).round().astype(int)):
        image = clip[i].image
        halves = [overlaid(image, predicted[part][i], (240, 360)) for part in ("truth", "prediction")]
        moving.append(np.concatenate(halves, 1))
    return PictureRow(
        name,
        caption,
        [
            Tile("truth above prediction", np.concatenate(rows), "wide"),
            Tile("J&F by frame (grey: first mask)", plot_scores(predicted["scores"]), "wide"),
            Tile("animated: truth, prediction", np.stack(moving), "animation"),
        ],
    )


def _with_gap(frame: np.ndarray) -> np.ndarray:
    """Return a frame with a gap to its right and below."""
    wide = np.full((frame.shape[0] + GAP, frame.shape[1] + GAP, 3), PAPER, np.uint8)
    wide[:-GAP, :-GAP] = frame
    return wide


def plot_scores(scores: np.ndarray) -> np.ndarray:
    """Plot the scores (2, objects, T) in [0, 1] over frames, in the objects' colours; the second set in grey."""
    width, height = 600, 150
    left, top, bottom = 34, 6, height - 18
    plot = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(plot)
    draw.fontmode = "1"  # without antialiasing, which would be visible on a dark page
    frames = scores.shape[2]

    def place(t: int, value: float) -> tuple[float, float]:
        return left + (width - left - 8) * t / max(1, frames - 1), bottom - (bottom - top) * value

    for level in (0.0, 0.5, 1.0):
        y = place(0, level)[1]
        draw.line((left, y, width - 8, y), fill=(190, 190, 190))
        draw.text((2, y - 7), f"{100 * level:.0f}", fill=TEXT, font=font(11))
    draw.text((left, bottom + 3), "frame 1", fill=TEXT, font=font(11))
    draw.text((width - 40, bottom + 3), f"{frames}", fill=TEXT, font=font(11))
    colours: Sequence[Any] = object_colours(scores.shape[1])[1:].tolist()
    for side, thickness in ((1, 2), (0, 3)):
        for number, values in enumerate(scores[side]):
            line = [place(t, float(value)) for t, value in enumerate(values)]
            draw.line(line, fill=(150, 150, 150) if side else tuple(colours[number]), width=thickness)
    return np.asarray(plot)
