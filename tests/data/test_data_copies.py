"""Copies of a data set that would give wrong numbers: other palettes, other sizes, shifted ids. None is scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neco_bench.core.errors import BadInputError
from neco_bench.data.ade20k import ADE20K
from neco_bench.data.base import SegmentationDataset
from neco_bench.data.cityscapes import LABEL_IDS, Cityscapes
from neco_bench.data.integrity import check_dataset
from neco_bench.data.io import id_table, read_mask, voc_colours
from neco_bench.data.voc2012 import VOC2012
from tests.data.data_helpers import CAMVID_SIZE, image_of, save, save_indices
from tests.typed import load_folder, load_segmentation

CITY_SIZE = (1024, 2048)


def compact(path: Path) -> None:
    """Save a mask again as a program does that keeps colours, but only those in use."""
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path)


def test_a_compacted_palette_is_refused(voc: Path) -> None:
    """Ids 0, 5, 8, 255 become 0..3, all allowed, while the colours stay right."""
    folder = voc / "voc2012" / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    for path in folder.iterdir():
        mask = np.array([0, 5, 8, 255], np.uint8).repeat(150).reshape(20, 30)
        save_indices(path, mask)
        before = np.array(Image.open(path).convert("RGB"))
        compact(path)
        assert np.array_equal(np.array(Image.open(path).convert("RGB")), before)
        assert np.array(Image.open(path)).max() == 3
    dataset = load_segmentation("voc2012", "val", root=voc)
    with pytest.raises(
        BadInputError, match=r"2007_000000\.png is a palette image whose colours are not those of .*index"
    ):
        dataset[0]
    with pytest.raises(BadInputError, match="palette image"):
        dataset.mask(1)
    assert any("palette image" in finding.text for finding in check_dataset("voc2012", voc))


def test_a_palette_copy_of_a_grey_set(tmp_path: Path) -> None:
    base = tmp_path / "ade20k"
    mask = np.array([0, 4, 30, 150], np.uint8).repeat(150).reshape(20, 30)
    save(base / "images" / "validation" / "a.jpg", image_of(0))
    path = base / "annotations" / "validation" / "a.png"
    save(path, mask)
    Image.open(path).convert("P").save(path)  # keeps indices, with grey colours
    dataset = load_segmentation("ade20k", "val", root=tmp_path)
    assert sorted(set(dataset[0].mask.ravel().tolist())) == [3, 29, 149, 255]
    compact(path)
    with pytest.raises(BadInputError, match=r"a\.png is a palette image"):
        dataset[0]


@pytest.mark.parametrize("white_border", [False, True])
def test_known_palettes_are_read(tmp_path: Path, white_border: bool) -> None:
    """VOC's colours, also with a white border; a set's own colours; a palette that is too short."""
    mask = np.array([[0, 1, 20, 255]], np.uint8)
    table = id_table({**{i: i for i in range(21)}, 255: 255})
    image = Image.fromarray(mask)
    colours = voc_colours(256)
    if white_border:
        colours[255] = 255
    image.putpalette(colours.tobytes())
    image.save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png", table=table), mask)
    image.putpalette(colours[:15].tobytes())
    image.save(tmp_path / "m.gif")
    own = Image.fromarray(np.array([[7, 8]], np.uint8))
    city = np.zeros((256, 3), np.uint8)
    city[list(LABEL_IDS)] = Cityscapes.class_colours
    own.putpalette(city.tobytes())
    own.save(tmp_path / "c.png")
    table = id_table({7: 0, 8: 1})
    assert read_mask(tmp_path / "c.png", table=table, colours=city).tolist() == [[0, 1]]
    with pytest.raises(BadInputError, match="index 7 has the colour"):
        read_mask(tmp_path / "c.png", table=table)


def resized(path: Path, size: tuple[int, int]) -> None:
    Image.open(path).resize(size[::-1], Image.Resampling.NEAREST).save(path)


def test_resized_copies_of_sets_with_one_size(camvid: Path, tmp_path: Path) -> None:
    dataset = load_segmentation("camvid", "train", root=camvid)
    for folder in ("train", "trainannot"):
        for path in (camvid / "camvid" / folder).iterdir():
            resized(path, (180, 240))
    for read in (dataset.__getitem__, dataset.mask):
        with pytest.raises(
            BadInputError, match=r"a0\.png is 240x180 .*all images of camvid are 480x360: it was resized"
        ):
            read(0)
    assert any("480x360" in f.text for f in check_dataset("camvid", camvid) if f.level == "error")
    base = tmp_path / "nyuv2"
    save(base / "test_rgb" / "0001.png", image_of(0))
    save(base / "test_labels_13" / "new_nyu_class13_0001.png", np.zeros((20, 30), np.uint8))
    with pytest.raises(BadInputError, match="all images of nyuv2_13 are 640x480"):
        load_segmentation("nyuv2_13", "test", root=tmp_path)[0]


def test_enlarged_copies(voc: Path, tmp_path: Path) -> None:
    base = voc / "voc2012" / "VOCdevkit" / "VOC2012"
    for path in (base / "JPEGImages" / "2007_000000.jpg", base / "SegmentationClass" / "2007_000000.png"):
        resized(path, (400, 600))
    with pytest.raises(BadInputError, match="no image of voc2012 has a side longer than 500"):
        load_segmentation("voc2012", "val", root=voc)[0]
    for folder in ("images", "stuffthingmaps"):
        save(
            tmp_path / "coco" / folder / "val2017" / f"1.{'jpg' if folder == 'images' else 'png'}",
            image_of(0, (700, 9)),
        )
    with pytest.raises(BadInputError, match="no image of coco_stuff27 has a side longer than 640"):
        load_segmentation("coco_stuff27", "val", root=tmp_path)[0]


def test_copies_resized_to_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 16 images on, equal sizes in a whole set whose sizes differ are no chance."""
    base = tmp_path / "ade20k"
    for i in range(16):
        save(base / "images" / "validation" / f"{i}.jpg", image_of(i))
        save(base / "annotations" / "validation" / f"{i}.png", image_of(i)[..., 0] % 150)
    dataset = load_segmentation("ade20k", "val", root=tmp_path)
    assert not dataset.sample_sanity_check()
    monkeypatch.setattr(ADE20K, "expected", {"val": 16})
    assert any("All images are 30x20 pixels" in text for text in dataset.sample_sanity_check())
    assert not dataset.head(15).sample_sanity_check()
    for folder, ending in (("images", "jpg"), ("annotations", "png")):
        resized(base / folder / "validation" / f"7.{ending}", (21, 30))
    assert not dataset.sample_sanity_check()


def test_copies_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, so that no side is as long as most are in the originals."""
    base = tmp_path / "voc2012" / "VOCdevkit" / "VOC2012"
    monkeypatch.setattr(VOC2012, "expected", {"val": 16})
    for i in range(16):
        save(base / "JPEGImages" / f"2007_{i:06d}.jpg", image_of(i, (150 + i, 250)))
        save(base / "SegmentationClass" / f"2007_{i:06d}.png", np.full((150 + i, 250), i, np.uint8))
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text("".join(f"2007_{i:06d}\n" for i in range(16)))
    dataset = load_segmentation("voc2012", "val", root=tmp_path)
    fact = "No image has a side of 500 pixels, but most of voc2012 do; the longest is 250: they were resized"
    assert any(fact in problem for problem in dataset.sample_sanity_check())
    for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        resized(base / folder / f"2007_000007.{ending}", (333, 500))
    assert not any("resized" in problem for problem in dataset.sample_sanity_check())


def dataset_of(name: str, root: Path, split: str, masks: Sequence[np.ndarray]) -> SegmentationDataset:
    """ADE20K or Pascal Context with these masks."""
    for i, mask in enumerate(masks):
        if name.startswith("ade20k"):
            save(root / "ade20k" / "images" / "validation" / f"{i}.jpg", image_of(i))
            save(root / "ade20k" / "annotations" / "validation" / f"{i}.png", mask)
        else:
            save(root / "pascal_context" / "JPEGImages" / f"{i}.jpg", image_of(i))
            save(root / "pascal_context" / "SegmentationClassContext" / f"{i}.png", mask)
    if name.startswith("pascal"):
        lists = root / "pascal_context" / "ImageSets" / "SegmentationContext"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / "val.txt").write_text("".join(f"{i}\n" for i in range(len(masks))))
    return load_segmentation(name, split, root=root)


@pytest.mark.parametrize(
    ("name", "classes"), [("ade20k", 150), ("ade20k_151", 150), ("pascal_context", 59), ("pascal_context60", 59)]
)
def test_ids_from_zero_with_void_at_the_end(tmp_path: Path, name: str, classes: int) -> None:
    """0..149 with other = 150: every value is allowed, and every class wrong."""
    rng = np.random.default_rng(0)
    right = [rng.integers(0, 30, (20, 30), dtype=np.uint8) for _ in range(6)]
    assert not dataset_of(name, tmp_path / "right", "val", right).sample_sanity_check()
    shifted = [np.where(mask == 0, classes, mask - 1).astype(np.uint8) for mask in right]
    (problem,) = dataset_of(name, tmp_path / "shifted", "val", shifted).sample_sanity_check()
    assert "100 % of the masks have" in problem
    assert "shifted by one" in problem


def camvid_of(root: Path, masks: Sequence[np.ndarray]) -> SegmentationDataset:
    base = root / "camvid"
    for i, mask in enumerate(masks):
        save(base / "val" / f"{i}.png", np.zeros((*CAMVID_SIZE, 3), np.uint8))
        save(base / "valannot" / f"{i}.png", mask)
    (base / "val.txt").write_text("".join(f"val/{i}.png valannot/{i}.png\n" for i in range(len(masks))))
    return load_segmentation("camvid", "val", root=root)


def test_camvid_with_void_as_zero(tmp_path: Path) -> None:
    mask = np.zeros(CAMVID_SIZE, np.uint8)  # sky
    mask[180:] = 3  # road
    mask[170:180] = 4  # pavement
    assert not camvid_of(tmp_path / "right", [mask] * 4).sample_sanity_check()
    (problem,) = camvid_of(tmp_path / "shifted", [mask + np.uint8(1)] * 4).sample_sanity_check()
    assert "more 'Pavement' than 'Road'" in problem


def city_of(root: Path, masks: Sequence[np.ndarray], kind: str = "labelIds") -> SegmentationDataset:
    base = root / "cityscapes"
    for i, mask in enumerate(masks):
        save(base / "leftImg8bit" / "val" / "ulm" / f"{i}_leftImg8bit.png", np.zeros((*CITY_SIZE, 3), np.uint8))
        save(base / "gtFine" / "val" / "ulm" / f"{i}_gtFine_{kind}.png", mask)
    return load_segmentation("cityscapes", "val", root=root)


def test_cityscapes_label_ids_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cityscapes, "image_size", (20, 30))
    monkeypatch.setitem(globals(), "CITY_SIZE", (20, 30))
    right = np.full(CITY_SIZE, 7, np.uint8)
    right[:3], right[3:6], right[18:] = 23, 26, 1  # sky, cars, the own car
    assert not city_of(tmp_path / "right", [right] * 4).sample_sanity_check()
    full = np.where(right == 1, np.uint8(7), right)
    (problem,) = city_of(tmp_path / "full", [full] * 4).sample_sanity_check()
    assert "No mask has void pixels" in problem
    train_ids = np.select([right == value for value in LABEL_IDS], range(19), 4).astype(np.uint8)
    problems = city_of(tmp_path / "train", [train_ids] * 4).sample_sanity_check()
    assert any("train ids (0..18) are in files of label ids" in problem for problem in problems)
    train_ids[right == 1] = 255
    assert not city_of(tmp_path / "named", [train_ids] * 4, "labelTrainIds").sample_sanity_check()
    (problem,) = city_of(tmp_path / "swapped", [np.where(right == 7, np.uint8(8), right)] * 4).sample_sanity_check()
    assert "more 'sidewalk' than 'road'" in problem


def test_nyuv2_with_void_at_the_end(samples: Path, tmp_path: Path) -> None:
    right = load_folder("nyuv2_13", "test", root=samples)
    assert not right.sample_sanity_check()
    for image, mask in map(right.files, right.ids[:4]):
        target = tmp_path / "nyuv2" / mask.parent.name / mask.name
        values = np.array(Image.open(mask))
        save(target, np.where(values == 0, 13, values - 1).astype(np.uint8))
        (tmp_path / "nyuv2" / "test_rgb").mkdir(exist_ok=True)
        (tmp_path / "nyuv2" / "test_rgb" / image.name).symlink_to(image)
    (problem,) = load_segmentation("nyuv2_13", "test", root=tmp_path).sample_sanity_check()
    assert "borders of the masks" in problem


def test_voc_without_background(voc: Path) -> None:
    folder = voc / "voc2012" / "VOCdevkit" / "VOC2012"
    for name in ("2007_000003", "2007_000004"):
        save(folder / "JPEGImages" / f"{name}.jpg", image_of(1))
    names = [f"2007_00000{i}" for i in range(5)]
    for name in names:
        mask = np.ones((20, 30), np.uint8)
        mask[0] = 255
        save_indices(folder / "SegmentationClass" / f"{name}.png", mask)
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(names))
    (problem,) = load_segmentation("voc2012", "val", root=voc).sample_sanity_check()
    assert "No mask has background" in problem


def test_real_samples_raise_no_doubt(samples: Path) -> None:
    for name, split in (("camvid", "val"), ("voc2012", "val"), ("voc2012", "trainaug"), ("ade20k", "val")):
        assert not load_segmentation(name, split, root=samples).sample_sanity_check()
