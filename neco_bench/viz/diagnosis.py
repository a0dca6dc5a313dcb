"""`diagnose`: an encoder's features of a few images of a data set, in numbers and in a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from neco_bench.core.errors import UsageError
from neco_bench.core.files import write_whole
from neco_bench.data.base import IGNORE, SegmentationDataset
from neco_bench.encoders.base import Encoder
from neco_bench.features.patches import majority_label, patchify
from neco_bench.features.transforms import resize_image, resize_nearest_pil
from neco_bench.viz import diagnostics

SHOWN, TILE, GAP = 8, 160, 4  # images in the picture, pixels of a tile, and between tiles


def diagnose(
    encoder: Encoder, data: SegmentationDataset, size: int, count: int, picture: Path | None = None
) -> list[dict[str, Any]]:
    """One row per diagnostic of the features of `count` images, spread evenly over `data`, at size x size pixels.

    picture: PNG with a row per image: the image, principal components as colours, norms. Raises UsageError for fewer
    than two images or a size below four patches.
    """
    size = encoder.only_size or size - size % (encoder.size_multiple or encoder.stride)
    indices = np.unique(np.linspace(0, len(data) - 1, max(count, 0)).astype(int))
    if len(indices) < 2 or size < 4 * encoder.stride:
        raise UsageError(
            f"diagnose needs two images and four patches a side; {len(indices)} at {size} pixels were given."
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
        write_whole(picture, _picture(images, features))
    values = {
        "norm outliers": (diagnostics.norm_outliers(features), "share of patches above 3 x the image's median norm"),
        "effective rank": (diagnostics.effective_rank(features), f"of {encoder.embed_dim} dimensions (RankMe)"),
        "positional leakage": (diagnostics.positional_leakage(features), "R² of a patch's place from its feature"),
        "neighbour purity": (
            diagnostics.neighbour_purity(features, truth, IGNORE),
            "share of nearest patches, of other images, of the same class",
        ),
        "shift sensitivity": (diagnostics.shift_sensitivity(features, moved), "1 - cosine after a shift by one patch"),
    }
    return [{"diagnostic": name, "value": round(value, 4), "meaning": text} for name, (value, text) in values.items()]


def _picture(images: list[np.ndarray], features: torch.Tensor) -> bytes:
    colours = diagnostics.principal_colours(features)
    shades = diagnostics.norm_shades(features)
    step = TILE + GAP
    canvas = np.full((len(images) * step - GAP, 3 * step - GAP, 3), 255, np.uint8)
    for row, image in enumerate(images):
        grey = np.repeat(shades[row][:, :, None], 3, axis=2)
        for column, tile in enumerate((image, colours[row], grey)):
            rule = Image.Resampling.NEAREST if column else Image.Resampling.BICUBIC
            resized = np.asarray(Image.fromarray(tile).resize((TILE, TILE), rule))
            canvas[row * step : row * step + TILE, column * step : column * step + TILE] = resized
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "PNG")
    return buffer.getvalue()
