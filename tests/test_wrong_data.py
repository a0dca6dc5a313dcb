"""A wrong data set never gives a number: each usual mistake is planted, and `run` ends with its code and the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command import neco

SIZE = (40, 60)
PAIR = "000001-a-b:cat"


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sound ADE20K, VOC 2012 (val and trainaug), COCO-Things and SPair-71k of a few noisy images each."""
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    ade, voc = data / "ade20k" / "ADEChallengeData2016", data / "voc2012" / "VOCdevkit" / "VOC2012"
    for i in range(3):
        image = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        for part in ("training", "validation"):
            save(ade / "images" / part / f"ADE_{i}.jpg", image)
            save(ade / "annotations" / part / f"ADE_{i}.png", rng.integers(0, 151, SIZE, dtype=np.uint8))
        mask = rng.integers(0, 21, SIZE, dtype=np.uint8)
        mask[0] = 255
        save(voc / "JPEGImages" / f"2007_00000{i}.jpg", image)
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            save(voc / folder / f"2007_00000{i}.png", mask)
        save(data / "coco" / "images" / "val2017" / f"{i:012d}.jpg", image)
        semantic = rng.choice(np.array([0, 1, 17, 44], np.uint8), SIZE)
        semantic_folder = data / "coco/annotations/panoptic_annotations/semantic_segmentation_val2017"
        save(semantic_folder / f"{i:012d}.png", semantic)
    lists = voc / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name in ("train", "trainaug", "val"):
        (lists / f"{name}.txt").write_text("".join(f"2007_00000{i}\n" for i in range(3)))
    spair = data / "spair71k" / "SPair-71k"
    for name in "ab":
        save(spair / "JPEGImages" / "cat" / f"{name}.jpg", rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    raw = {
        "src_imname": "a.jpg",
        "trg_imname": "b.jpg",
        "src_imsize": [60, 40, 3],
        "trg_imsize": [60, 40, 3],
        "src_bndbox": [1, 1, 50, 30],
        "trg_bndbox": [1, 1, 50, 30],
        "src_kps": [[5, 6], [20, 30]],
        "trg_kps": [[7, 8], [21, 29]],
        "kps_ids": ["0", "1"],
        "category": "cat",
        "viewpoint_variation": 0,
        "scale_variation": 0,
        "truncation": 0,
        "occlusion": 0,
    }
    (spair / "PairAnnotation" / "test").mkdir(parents=True)
    (spair / "PairAnnotation" / "test" / f"{PAIR}.json").write_text(json.dumps(raw))
    (spair / "Layout" / "large").mkdir(parents=True)
    (spair / "Layout" / "large" / "test.txt").write_text(f"{PAIR}\n")
    return data


def masks(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in folder.glob("*.png"):
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)


def full_ade20k(data: Path) -> None:
    (data / "ade20k" / "ADE20K_2021_17_01").mkdir()


def colour_masks(data: Path) -> None:
    masks(data / "voc2012/VOCdevkit/VOC2012/SegmentationClass", lambda mask: np.stack([mask] * 3, axis=2))


def ade_already_shifted(data: Path) -> None:
    masks(data / "ade20k/ADEChallengeData2016/annotations/validation", lambda mask: mask - np.uint8(1))


def black_and_white(data: Path) -> None:
    masks(
        data / "voc2012/VOCdevkit/VOC2012/SegmentationClass",
        lambda mask: np.where(mask % 2 == 0, np.uint8(0), np.uint8(255)),
    )


def void_turned_into_background(data: Path) -> None:
    masks(
        data / "voc2012/VOCdevkit/VOC2012/SegmentationClass",
        lambda mask: np.where(mask == 255, np.uint8(0), mask),
    )


def no_trainaug(data: Path) -> None:
    voc = data / "voc2012/VOCdevkit/VOC2012"
    shutil.rmtree(voc / "SegmentationClassAug")
    (voc / "ImageSets/Segmentation/trainaug.txt").unlink()


def colons_replaced(data: Path) -> None:
    folder = data / "spair71k/SPair-71k/PairAnnotation/test"
    (folder / f"{PAIR}.json").rename(folder / f"{PAIR.replace(':', '_')}.json")


def half_an_archive(data: Path) -> None:
    (data / "ade20k/ADEChallengeData2016/annotations/validation/ADE_1.png").unlink()


def stuff_maps_as_panoptic(data: Path) -> None:
    folder = data / "coco/annotations/panoptic_annotations/semantic_segmentation_val2017"
    masks(folder, lambda mask: np.where(mask == 0, np.uint8(255), mask - np.uint8(1)))


MISTAKES: list[tuple[Callable[[Path], None], str, int, str]] = [
    (full_ade20k, "ade20k_cluster_gt", 3, "Use ADEChallengeData2016.zip instead"),
    (colour_masks, "voc_cluster_gt@clean-1", 4, "colour"),
    (ade_already_shifted, "ade20k_cluster_gt", 4, "already shifted to 0..149"),
    (black_and_white, "voc_cluster_gt@clean-1", 4, "black-and-white"),
    (void_turned_into_background, "voc_cluster_gt@clean-1", 4, "Use the original SegmentationClass"),
    (no_trainaug, "voc_ic", 3, "data prepare voc_sbd"),
    (colons_replaced, "spair", 3, "Unpack the archive again on a file system that allows colons"),
    (half_an_archive, "ade20k_cluster_gt", 3, "unpack both again"),
    (stuff_maps_as_panoptic, "coco_things_cluster_gt", 4, "stuffthingmaps"),
]


def attempt(root: Path, task: str) -> tuple[int, str, list[Path]]:
    """Exit code, stderr and the results with a number."""
    out = root.parent / "results"
    quick = {"input_size": 32}
    if "cluster" in task:
        quick |= {"clusters": 5, "seeds": 1, "redos": 1, "iterations": 2}
    changes = [part for key, value in quick.items() for part in ("--set", f"{key}={value}")]
    options = ["--data-root", root, "--out", out, "--workers", 0, *changes]
    answer = neco("run", "--model", "baseline_rgb", "--task", task, *options)
    stored = [path for path in out.rglob("*.json") if json.loads(path.read_text())["metrics"]]
    return answer.code, answer.err, stored


@pytest.mark.parametrize("task", sorted({task for _, task, _, _ in MISTAKES}))
def test_the_sound_data_give_a_number(task: str, root: Path) -> None:
    code, message, stored = attempt(root, task)
    assert code == 0, message
    assert len(stored) == 1


@pytest.mark.parametrize(("plant", "task", "code", "fix"), MISTAKES)
def test_a_mistake_gives_none(plant: Callable[[Path], None], task: str, code: int, fix: str, root: Path) -> None:
    plant(root)
    exit_code, message, stored = attempt(root, task)
    assert (exit_code, stored) == (code, []), message
    assert fix in message
    assert "Traceback" not in message
