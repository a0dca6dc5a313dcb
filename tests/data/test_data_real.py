"""The readers on real samples, compared with reading the files directly."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neco_bench.data.integrity import check_dataset
from tests.typed import load_pairs, load_segmentation


def test_camvid(samples: Path) -> None:
    dataset = load_segmentation("camvid", "val", root=samples)
    assert len(dataset) == 101
    assert dataset.coverage is None
    sample = dataset[7]
    stored = np.array(Image.open(samples / "camvid" / "valannot" / f"{sample.id}.png"))
    assert sample.image.shape == (360, 480, 3)
    assert np.array_equal(sample.mask == 255, stored == 11)
    assert np.array_equal(sample.mask[stored < 11], stored[stored < 11])


def test_voc(samples: Path) -> None:
    counts = {split: len(load_segmentation("voc2012", split, root=samples)) for split in ("train", "trainaug", "val")}
    assert counts == {"train": 170, "trainaug": 270, "val": 200}
    dataset = load_segmentation("voc2012", "val", root=samples)
    path = samples / "voc2012" / "VOCdevkit" / "VOC2012" / "SegmentationClass" / f"{dataset.ids[0]}.png"
    stored = Image.open(path)
    assert np.array_equal(dataset[0].mask, np.array(stored))
    colours = np.array(stored.getpalette()).reshape(-1, 3)[:21]
    assert np.array_equal(dataset.palette, colours)


def test_spair(samples: Path) -> None:
    dataset = load_pairs("spair71k", "test", root=samples)
    assert len(dataset) == 20
    assert len(dataset.image_ids) == 26
    checked = 0
    for pair in dataset.pairs:
        # An independent source of the same points: the annotation of the single image.
        file = samples / "spair71k" / "ImageAnnotation" / f"{pair.source_id}.json"
        if file.is_file():
            points = json.loads(file.read_text())["kps"]
            assert [points[key] for key in pair.point_ids] == pair.source_points.tolist()
            checked += 1
    assert checked >= 5


@pytest.mark.slow
def test_checks_find_no_error(samples: Path) -> None:
    for name in ("camvid", "voc2012", "spair71k"):
        levels = Counter(finding.level for finding in check_dataset(name, samples))
        assert levels["error"] == 0
        assert levels["ok"] >= 1
        assert levels["warning"] >= 1  # they are subsets
