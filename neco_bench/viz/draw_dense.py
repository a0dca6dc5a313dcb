"""Drawing of depth maps, normals and their errors."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from neco_bench.metrics.dense import angles
from neco_bench.viz.draw import LARGE, NOT_SCORED, SMALL, VOID, PictureRow, Tile, fitted, hatched

RELATIVE, ANGLE = 0.25, 45.0  # errors with the last colour of the scale: share of the depth, degrees


def depth_colours(depth: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return colours (H, W, 3) of depth (H, W) from `low` (bright) to `high` (dark); 0 is hatched."""
    share = 1 - np.clip((depth - low) / max(high - low, 1e-9), 0, 1)
    return hatched(scale_colours(share), depth <= 0)


def normal_colours(normals: np.ndarray, flip: bool) -> np.ndarray:
    """Return colours (H, W, 3) of directions (H, W, 3): red right, green up, blue to the camera; 0 is hatched.

    flip: y is down and z away from the camera in these numbers.
    """
    length = np.linalg.norm(normals, axis=2, keepdims=True)
    unit = np.divide(normals, length, out=np.zeros(normals.shape), where=length > 0)
    if flip:
        unit = unit * [1, -1, -1]
    return hatched(np.rint((unit + 1) * 127.5).astype(np.uint8), length[..., 0] <= 0)


def error_colours(error: np.ndarray, valid: np.ndarray, limit: float) -> np.ndarray:
    """Return colours (H, W, 3) of errors (H, W), dark at 0, bright from `limit` on; pixels not scored are hatched."""
    return hatched(scale_colours(np.clip(error / limit, 0, 1)), ~valid)


def scale_colours(share: np.ndarray) -> np.ndarray:
    """Return the colours of OpenCV's inferno (RGB) for numbers in [0, 1]."""
    import cv2  # imported here because it takes a tenth of a second

    levels = np.rint(255 * share).astype(np.uint8)
    colours: np.ndarray = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1]
    return colours


def draw_dense(name: str, predicted: dict[str, Any], kind: str, caption: str) -> PictureRow:
    """Draw image, ground truth, prediction and errors of one image.

    Args:
        name: its id.
        predicted: what the family recorded: `image`, `truth` and `prediction`.
        kind: "depth" or "normals".
        caption: text next to its name.
    """
    image, truth, prediction = (predicted[part] for part in ("image", "truth", "prediction"))
    if kind == "depth":
        valid = truth > 0
        low, high = np.percentile(truth[valid], [1, 99]) if valid.any() else (0.0, 1.0)
        maps = [depth_colours(values, low, high) for values in (truth, prediction)]
        error = np.divide(np.abs(prediction - truth), truth, out=np.zeros(truth.shape), where=valid)
        caption = f"{caption}; {low:.2f} to {high:.2f} m"
        limit = RELATIVE
    else:
        valid = truth.any(2)
        flip = bool(valid.any() and truth[valid][:, 2].mean() < 0)
        maps = [normal_colours(values, flip) for values in (truth, prediction)]
        error, limit = angles(prediction, truth), ANGLE
    maps.append(error_colours(error, valid, limit))
    side = min(max(SMALL, *image.shape[:2]), LARGE)
    photo = fitted(image, (side, side), Image.Resampling.BICUBIC)
    titles = ("ground truth", "prediction", "errors")
    tiles = [
        Tile(title, fitted(colours, (side, side), Image.Resampling.NEAREST), "map")
        for title, colours in zip(titles, maps, strict=True)
    ]
    return PictureRow(name, caption, [Tile("image", photo, "photo"), *tiles])


def dense_legend(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return the legend of the colours."""
    ends = scale_colours(np.array([[0.0, 1.0]]))[0].tolist()
    dark, bright = tuple(ends[0]), tuple(ends[1])
    if kind == "depth":
        maps = [("near", bright), ("far", dark), (f"error from {100 * RELATIVE:.0f} % of the depth", bright)]
    else:
        maps = [("to the right", (255, 128, 128)), ("up", (128, 255, 128)), ("to the camera", (128, 128, 255))]
        maps.append((f"error from {ANGLE:.0f} degrees", bright))
    return [*maps, ("no error", dark), (NOT_SCORED, VOID)]
