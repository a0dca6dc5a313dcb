"""Miniature data sets in official layouts, and the folder of real samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.data_helpers import CAMVID_SIZE, PAIRS, image_of, save, save_indices

SAMPLES = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def samples(request: pytest.FixtureRequest) -> Path:
    """The folder of real samples; the test is skipped where they are absent."""
    if not SAMPLES.is_dir():
        pytest.skip("no real samples beside the repository (../shared/data)")
    return SAMPLES


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A root with a VOC 2012 of three val images; the folder that holds ImageSets is `voc2012/VOCdevkit/VOC2012`."""
    base = tmp_path / "voc2012" / "VOCdevkit" / "VOC2012"
    for i in range(3):
        save(base / "JPEGImages" / f"2007_00000{i}.jpg", image_of(i))
        mask = np.full((20, 30), i, np.uint8)
        mask[0] = 255
        save_indices(base / "SegmentationClass" / f"2007_00000{i}.png", mask)
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2007_000000\n2007_000001\n2007_000002\n")
    return tmp_path


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    base = tmp_path / "camvid"
    for i in range(2):
        save(base / "train" / f"a{i}.png", image_of(i, CAMVID_SIZE))
        save(base / "trainannot" / f"a{i}.png", np.full(CAMVID_SIZE, 10 + i, np.uint8))
    (base / "train.txt").write_text(
        "".join(f"/SegNet/train/a{i}.png /SegNet/trainannot/a{i}.png\r\n" for i in range(2))
    )
    return tmp_path


@pytest.fixture
def spair(tmp_path: Path) -> Path:
    base = tmp_path / "spair71k" / "SPair-71k"
    for name, size in (("a", (20, 30)), ("b", (40, 25))):
        save(base / "JPEGImages" / "cat" / f"{name}.jpg", image_of(1, size))
    layout = base / "Layout" / "large"
    layout.mkdir(parents=True)
    (layout / "val.txt").write_text("\n".join(PAIRS) + "\n")
    sizes = {"a": [30, 20, 3], "b": [25, 40, 3]}
    (base / "PairAnnotation" / "val").mkdir(parents=True)
    for name in PAIRS:
        source, target = name.partition(":")[0].split("-")[1:]
        raw = {
            "filename": name,
            "src_imname": f"{source}.jpg",
            "trg_imname": f"{target}.jpg",
            "src_imsize": sizes[source],
            "trg_imsize": sizes[target],
            "src_bndbox": [1, 2, 20, 19],
            "trg_bndbox": [2, 3, 24, 18],
            "category": "cat",
            "src_kps": [[3, 4], [5, 6]],
            "trg_kps": [[7, 8], [9, 10]],
            "kps_ids": ["0", "12"],
            "viewpoint_variation": 1,
            "scale_variation": 2,
            "truncation": 3,
            "occlusion": 0,
        }
        (base / "PairAnnotation" / "val" / f"{name}.json").write_text(json.dumps(raw))
    return tmp_path
