"""`diagnose`: describe an encoder's features of a few images of a data set, in numbers and in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from neco_bench.core.errors import UsageError
from neco_bench.core.files import write_whole
from neco_bench.data.base import SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.patches import majority_label, patchify
from neco_bench.features.transforms import resize_image, resize_nearest_pil
from neco_bench.viz import diagnostics
from neco_bench.viz.draw import (
    WHITE,
    broken_lines,
    class_colours,
    class_legend,
    draw_keys,
    encode_image,
    enlarged,
    font,
    legend_keys,
)
from neco_bench.viz.draw_dense import scale_colours

SHOWN, TILE, GAP, LINE = 8, 160, 4, 18  # images in the picture; pixels of a tile, between tiles, of a line of text

EQUAL = 0.05  # norms that differ by less than this share of the median count as equal (normalised features)


def diagnose(
    encoder: Encoder, data: SegmentationDataset, size: int, count: int, picture: Path | None = None
) -> list[dict[str, Any]]:
    """Return one row per diagnostic of the features of `count` images of `data`, evenly spread, at size x size pixels.

    picture: PNG file to write, with a row per image: the image, its labels, principal components as colours, and norms
    if they differ. Raises UsageError for fewer than two images or a size below four patches.
    """
    size = encoder.only_size or size - size % (encoder.size_multiple or encoder.stride)
    indices = np.unique(np.linspace(0, len(data) - 1, max(count, 0)).astype(int))
    if len(indices) < 2 or size < 4 * encoder.stride:
        raise UsageError(
            f"diagnose needs two images and four patches per side; {len(indices)} at {size} pixels were given."
        )
    maps, shifted, labels, images = [], [], [], []
    for number, index in enumerate(indices):
        sample = data[int(index)]
        wide = resize_image(sample.image, size, size + encoder.stride)
        pair = torch.stack([wide[:, :, :size], wide[:, :, encoder.stride :]])
        before, after = encoder.encode(pair).map.cpu()
        maps.append(before)
        shifted.append(after)
        mask = data.eval_mask(resize_nearest_pil(sample.mask, size, size + encoder.stride)[:, :size])
        frequent = majority_label(patchify(mask, encoder.stride), len(data.classes), "loses ties")
        labels.append(frequent.view(before.shape[1:]))
        if number < SHOWN:
            images.append((pair[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    features, moved = torch.stack(maps), torch.stack(shifted)
    truth = torch.stack(labels).numpy()
    if picture is not None:
        title = f"{encoder.name} on {data.name}, {size} x {size} pixels, {len(features)} images"
        shown = [enlarged(ids, TILE, TILE) for ids in truth[: len(images)]]
        coloured = [class_colours(data, ids) for ids in shown]
        drawn = draw_diagnosis(images, coloured, features, title, class_legend(data, shown))
        write_whole(picture, encode_image(np.asarray(drawn), False))
    values = {
        "norm outliers": (diagnostics.norm_outliers(features), "share of patches above 3 x the image's median norm"),
        "effective rank": (diagnostics.effective_rank(features), f"of {encoder.embed_dim} dimensions (RankMe)"),
        "positional leakage": (
            diagnostics.positional_leakage(features),
            "R² of a patch's position predicted from its feature",
        ),
        "neighbour purity": (
            diagnostics.neighbour_purity(features, truth),
            "share of nearest patches, of other images, of the same class",
        ),
        "shift sensitivity": (diagnostics.shift_sensitivity(features, moved), "1 - cosine after a shift by one patch"),
    }
    return [{"diagnostic": name, "value": round(value, 4), "meaning": text} for name, (value, text) in values.items()]


def draw_diagnosis(
    images: list[np.ndarray],
    labels: list[np.ndarray],
    features: torch.Tensor,
    title: str,
    legend: Sequence[tuple[str, tuple[int, ...]]] = (),
) -> Image.Image:
    """Draw images, labels of their patches, principal components and norms, with headings and scales.

    Norms are left out if all are equal (normalised features), because the panel would show nothing.
    """
    norms = diagnostics.relative_norms(features)
    low, high = float(norms.min()), float(norms.max())
    shares = ", ".join(f"{100 * share:.0f} %" for share in diagnostics.principal_shares(features))
    panels = {"image": images, "labels": labels, "components": list(diagnostics.principal_colours(features))}
    notes = [f"components: red, green, blue are the first three of all patches, with {shares} of the variance"]
    if high - low > EQUAL:
        panels["norms"] = [scale_colours((own - low) / (high - low)) for own in norms]
        notes.append(f"norms: of each patch, relative to the median of its image, dark {low:.2f} to bright {high:.2f}")
    else:
        notes.append(
            f"norms: not drawn, because all are within {100 * EQUAL:.0f} % of each other (normalised features)"
        )
    step, width = TILE + GAP, len(panels) * (TILE + GAP) - GAP
    heading, words = broken_lines(title, width, 13), [line for note in notes for line in broken_lines(note, width, 13)]
    keys = legend_keys(legend, width)
    top = LINE * (len(heading) + 1)
    below = top + len(images) * step
    under = below + LINE * (keys[-1][0] + 1 if keys else 0)
    scale = LINE if "norms" in panels else 0
    canvas = Image.new("RGB", (width, under + scale + LINE * len(words) + GAP), WHITE)
    draw = ImageDraw.Draw(canvas)
    draw.text((2, 1), "\n".join(heading), fill=(0, 0, 0), font=font(13))
    for column, (name, tiles) in enumerate(panels.items()):
        draw.text((column * step + 2, top - LINE), name, fill=(90, 90, 90), font=font(13))
        for row, tile in enumerate(tiles[: len(images)]):
            rule = Image.Resampling.NEAREST if column else Image.Resampling.BICUBIC
            canvas.paste(Image.fromarray(tile).resize((TILE, TILE), rule), (column * step, top + row * step))
    draw_keys(canvas, keys, below)
    if scale:
        bar = scale_colours(np.tile(np.linspace(0, 1, TILE), (10, 1)))
        canvas.paste(Image.fromarray(bar), (width - TILE, under + 4))
        ends = f"norms {low:.2f}", f"{high:.2f}"
        draw.text((width - TILE - 6, under + 1), ends[0], fill=(0, 0, 0), font=font(13), anchor="ra")
        draw.text((width - 4, under + 1), ends[1], fill=(0, 0, 0), font=font(13), anchor="ra")
    draw.text((2, under + scale), "\n".join(words), fill=(0, 0, 0), font=font(13), spacing=3)
    return canvas
