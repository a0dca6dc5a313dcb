"""Writers of small images and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from neco_bench.data.io import voc_colours

CAMVID_SIZE = (360, 480)
PAIRS = ("000003-a-b:cat", "000001-b-a:cat")


def image_of(seed: int, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def save_indices(path: Path, array: np.ndarray) -> None:
    """A palette PNG, as VOC has them."""
    image = Image.fromarray(array)
    image.putpalette(voc_colours(256).tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
