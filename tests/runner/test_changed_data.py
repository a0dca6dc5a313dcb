"""Data that change after a run, and splits that share images."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command import neco


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with an own data set: 8 images in two colours, and masks that divide them as the colours do."""
    folder = tmp_path / "halves"
    for number in range(8):
        mask = np.zeros((64, 64), np.uint8)
        mask[:, 24 + 8 * (number % 3) :] = 1
        image = np.where(mask[..., None] == 1, [200, 30, 30], [20, 180, 40]).astype(np.uint8)
        for name, array in (("images", image), ("masks", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / name / f"{number}.bmp")
    assert neco("data", "init", folder).code == 0
    return tmp_path


def _score(root: Path, *options: str) -> float:
    answer = neco(
        *("run", "--model", "baseline_rgb", "--task", "halves_knn", "--set", "input_size=64", "--data-root", root),
        *("--out", root / "results", "--json", *options),
    )
    assert answer.code == 0, answer.err
    return float(json.loads(answer.out)[0]["metrics"]["mIoU"])


@pytest.mark.slow
def test_masks_that_change_without_their_size_are_noticed(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The key of a result has names and sizes of files only, and masks are stored beside the features."""
    assert _score(root) > 0.9
    for name in (root / "halves" / "val.txt").read_text().split():
        path = root / "halves" / "masks" / f"{name}.bmp"
        Image.fromarray(1 - np.asarray(Image.open(path))).save(path)
        os.utime(path, (time.time() + 5,) * 2)
    assert "newer than the stored result" not in caplog.text
    assert _score(root) > 0.9
    assert "Files of halves (val) are newer than the stored result of baseline_rgb on halves_knn" in caplog.text
    assert _score(root, "--overwrite") < 0.1


def test_images_of_two_splits_are_an_error(root: Path) -> None:
    folder = root / "halves"
    (folder / "val.txt").write_text((folder / "train.txt").read_text())
    message = "6 of the 6 items of split val are also in split train: "
    answer = neco("run", "--model", "baseline_rgb", "--task", "halves_knn", "--data-root", root, "--out", root / "r")
    assert answer.code == 4
    assert f"error: halves: {message}" in answer.err
    check = neco("data", "check", "halves", "--data-root", root)
    assert check.code == 4
    assert message in check.out + check.err
