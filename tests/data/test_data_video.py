"""DAVIS in its official layout, in miniature: what is read, what `data check` says, and wrong copies."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neco_bench.data.davis import DAVIS2017
from neco_bench.data.integrity import check_dataset
from neco_bench.data.load import load_dataset
from neco_bench.data.prepare import prepare
from neco_bench.data.video import VideoDataset, object_count
from tests.command import neco

SIZE = (480, 64)  # the height of all frames; narrow, to be quick
SEQUENCES = {"train": ("bear", "boat"), "val": ("dog", "gold-fish")}


def palette() -> list[int]:
    """The first colours of DAVIS: 191 where VOC has 192."""
    colours = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128], [0, 128, 128]]
    colours += [[128, 128, 128], [64, 0, 0], [191, 0, 0], [64, 128, 0]]
    return [level for colour in colours for level in colour]


def write_frame(base: Path, sequence: str, number: int, mask: np.ndarray, size: tuple[int, int] = SIZE) -> None:
    image = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    for folder, ending in (("JPEGImages", ".jpg"), ("Annotations", ".png")):
        (base / folder / "480p" / sequence).mkdir(parents=True, exist_ok=True)
        path = base / folder / "480p" / sequence / f"{number:05d}{ending}"
        if ending == ".jpg":
            Image.fromarray(image).save(path)
        else:
            picture = Image.fromarray(mask)
            picture.putpalette(palette())
            picture.save(path)


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    """The folder `DAVIS` below a data root, with two sequences of four frames in each split, of one and ten objects."""
    base = tmp_path / "davis2017" / "DAVIS"
    (base / "ImageSets" / "2017").mkdir(parents=True)
    for split, names in SEQUENCES.items():
        (base / "ImageSets" / "2017" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for objects, name in zip((1, 10), names, strict=True):
            for number in range(4):
                mask = np.zeros(SIZE, np.uint8)
                for i in range(objects):
                    mask[20 + 40 * i : 50 + 40 * i, 5 + 3 * number : 35 + 3 * number] = i + 1
                write_frame(base, name, number, mask)
    return base


def opened(base: Path, split: str = "val", name: str = "davis2017") -> VideoDataset:
    dataset = load_dataset(name, split, root=base.parents[1])
    assert isinstance(dataset, VideoDataset)
    return dataset


def test_sequences_frames_and_objects(davis: Path) -> None:
    dataset = opened(davis)
    assert dataset.ids == ("dog", "gold-fish")
    assert dataset.coverage == {"found": 2, "expected": 30}
    clip = dataset.clip(1)
    assert (len(clip), clip.size) == (4, SIZE)
    assert clip.ids[2] == "gold-fish/00002"
    sample = clip[2]
    assert sample.image.shape == (*SIZE, 3)
    assert object_count(sample.mask) == 10  # palette index 9 has DAVIS's own red
    assert sample.mask[30, 20] == 1
    assert dataset.head(1).ids == ("dog",)
    assert opened(davis, "train").ids == ("bear", "boat")
    assert clip.fingerprint() != dataset.clip(0).fingerprint()


def test_the_official_archive_is_unpacked(davis: Path, tmp_path: Path) -> None:
    archive = tmp_path / "DAVIS-2017-trainval-480p.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(davis.rglob("*")):
            file.write(path, Path("DAVIS") / path.relative_to(davis))
    root = tmp_path / "other"
    root.mkdir()
    (done,) = prepare("davis2017", root, source=archive)
    assert done.written == 2 * 2 * 2 * 4 + 2
    assert load_dataset("davis2017", "val", root=root).fingerprint() == opened(davis).fingerprint()


def test_data_check_says_what_is_there(davis: Path) -> None:
    findings = check_dataset("davis2017", davis.parents[1])
    assert {finding.level for finding in findings} == {"ok", "warning"}
    (facts,) = [f for f in findings if f.split == "val" and "frames" in f.values]
    assert facts.values == {"frames": 8, "objects": 11, "void pixels": 0}
    assert "64x480 in 2 sequences" in facts.text


def test_davis_2016_has_one_object_and_needs_no_list(davis: Path, tmp_path: Path) -> None:
    base = tmp_path / "davis2016"
    for name in ("dog", "bear"):
        for number in range(3):
            write_frame(base, name, number, np.zeros(SIZE, np.uint8))
            mask = np.zeros(SIZE, np.uint8)
            mask[100:200, 20:40] = 255
            Image.fromarray(mask).save(base / "Annotations" / "480p" / name / f"{number:05d}.png")
    dataset = load_dataset("davis2016", "val", root=tmp_path)
    assert isinstance(dataset, VideoDataset)
    assert dataset.ids == ("dog",)
    assert set(np.unique(dataset.clip(0)[1].mask)) == {0, 1}
    assert load_dataset("davis2016", "train", root=tmp_path).ids == ("bear",)
    (base / "ImageSets" / "480p").mkdir(parents=True)
    lines = [f"/JPEGImages/480p/dog/{i:05d}.jpg /Annotations/480p/dog/{i:05d}.png\n" for i in range(3)]
    (base / "ImageSets" / "480p" / "val.txt").write_text("".join(lines))
    assert load_dataset("davis2016", "val", root=tmp_path).ids == ("dog",)


def test_the_sample_of_davis_2016(real_data: Path) -> None:
    dataset = load_dataset("davis2016", "val", root=real_data)
    assert isinstance(dataset, VideoDataset)
    assert dict(zip(dataset.ids, map(len, map(dataset.clip, range(4))), strict=True)) == {
        "car-shadow": 40,
        "dog": 60,
        "kite-surf": 50,
        "scooter-black": 43,
    }
    assert dataset.clip(1).size == (480, 854)


def every_mask(base: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in (base / "Annotations").rglob("*.png"):
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)


def colour_masks(base: Path) -> None:
    every_mask(base, lambda mask: np.stack([100 * mask] * 3, axis=2))


def swapped_lists(base: Path) -> None:
    lists = base / "ImageSets" / "2017"
    texts = {name: (lists / f"{name}.txt").read_text() for name in ("train", "val")}
    (lists / "train.txt").write_text(texts["val"])
    (lists / "val.txt").write_text(texts["train"])


def resized(base: Path) -> None:
    for path in [*base.rglob("*.jpg"), *base.rglob("*.png")]:
        with Image.open(path) as image:
            small = image.resize((32, 240), Image.Resampling.NEAREST)
        small.save(path)


def resized_images_alone(base: Path) -> None:
    for path in base.rglob("*.jpg"):
        with Image.open(path) as image:
            wide = image.resize((SIZE[1] + 1, SIZE[0]))
        wide.save(path)


def first_masks_alone(base: Path) -> None:
    for path in (base / "Annotations").rglob("*.png"):
        if path.stem != "00000":
            path.unlink()


def other_resolution(base: Path) -> None:
    for folder in ("JPEGImages", "Annotations"):
        (base / folder / "480p").rename(base / folder / "Full-Resolution")


def empty_first_masks(base: Path) -> None:
    for path in (base / "Annotations").rglob("00000.png"):
        with Image.open(path) as image:
            empty = Image.fromarray(np.zeros_like(np.asarray(image)))
        empty.putpalette(palette())
        empty.save(path)


MISTAKES: list[tuple[Callable[[Path], None], int, str]] = [
    (colour_masks, 4, "is a colour mask, but class ids are needed"),
    (swapped_lists, 4, "were swapped or mixed"),
    (resized, 4, "it was resized, or has another resolution"),
    (resized_images_alone, 4, "One of the two was resized"),
    (first_masks_alone, 3, "has masks of the first frames only"),
    (other_resolution, 3, "has no frames"),
    (empty_first_masks, 4, "has no object. Restore the original masks"),
]


@pytest.mark.parametrize(("plant", "code", "told"), MISTAKES)
def test_wrong_copies_end_in_one_clear_error(plant: Callable[[Path], None], code: int, told: str, davis: Path) -> None:
    plant(davis)
    root = davis.parents[1]
    options: list[Any] = ["--data-root", root, "--out", root / "results", "--workers", 0, "--set", "input_size=64"]
    answer = neco("run", "--model", "baseline_rgb", "--task", "davis_vos@clean-1", *options)
    assert answer.code == code, answer.err
    assert told in answer.err
    assert "Traceback" not in answer.err
    assert any(finding.level == "error" for finding in check_dataset("davis2017", root))


def test_a_sound_copy_gives_a_number(davis: Path) -> None:
    root = davis.parents[1]
    shutil.rmtree(root / "results", ignore_errors=True)
    options: list[Any] = ["--data-root", root, "--out", root / "results", "--workers", 0, "--set", "input_size=64"]
    for protocol in ("clean-1", "dino-1"):
        answer = neco("run", "--model", "baseline_rgb", "--task", f"davis_vos@{protocol}", *options)
        assert answer.code == 0, answer.err
    assert DAVIS2017.sampling_unit == "sequence"
