"""Cityscapes, Pascal Context, NYUv2, Proposal Flow, the NeCo layout of VOC, fractions and split files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from neco_bench.core.errors import BadInputError, MissingError, UsageError
from neco_bench.data.cityscapes import LABEL_IDS
from neco_bench.data.integrity import check_dataset, describe_datasets
from neco_bench.data.load import DATASETS, load_dataset
from neco_bench.data.voc2012 import VOC2012
from tests.data.data_helpers import image_of, save
from tests.typed import load_folder, load_pairs, load_segmentation

ROW = np.arange(34, dtype=np.uint8)


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path: Path, kind: str) -> None:
    base = tmp_path / "cityscapes"
    values = ROW if kind == "labelIds" else np.where(np.isin(ROW, LABEL_IDS), np.searchsorted(LABEL_IDS, ROW), 255)
    for city in ("bonn", "aachen"):
        name = f"{city}/{city}_000000_000019"
        save(base / "leftImg8bit" / "train" / f"{name}_leftImg8bit.png", np.zeros((1024, 2048, 3), np.uint8))
        mask = np.zeros((1024, 2048), np.uint8)
        mask[:, :34] = values
        save(base / "gtFine" / "train" / f"{name}_gtFine_{kind}.png", mask)
        save(base / "gtFine" / "train" / f"{name}_gtFine_color.png", image_of(1, (4, 34)))
    dataset = load_folder("cityscapes", "train", root=tmp_path)
    assert dataset.ids == ("aachen/aachen_000000_000019", "bonn/bonn_000000_000019")
    assert dataset.source == kind
    # neco.md 3.3
    expected = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
    expected |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    assert dataset[0].mask[0, :34].tolist() == [expected.get(value, 255) for value in ROW.tolist()]
    (base / "lists.txt").write_text("bonn_000000_000019\n")
    assert load_segmentation("cityscapes", "train", root=tmp_path, split_file=base / "lists.txt").ids == dataset.ids[1:]
    assert not [f for f in check_dataset("cityscapes", tmp_path) if f.level == "error"]
    if kind == "labelIds":
        save(base / "gtFine" / "train" / f"{dataset.ids[0]}_gtFine_labelIds.png", mask + np.uint8(222))
        with pytest.raises(BadInputError, match="train ids"):
            dataset[0]


def test_cityscapes_classes_of_the_official_table(samples: Path) -> None:
    rows = [line.split(",") for line in (samples / "class_lists/cityscapes/labels.csv").read_text().splitlines()[1:]]
    scored = sorted((int(row[2]), int(row[1]), row[0]) for row in rows if 0 <= int(row[2]) < 255)
    dataset = load_dataset.__globals__["DATASETS"].load("cityscapes")
    assert tuple(row[1] for row in scored) == LABEL_IDS
    assert tuple(row[2] for row in scored) == dataset.classes


def test_pascal_context(tmp_path: Path) -> None:
    base = tmp_path / "pascal_context" / "VOCdevkit" / "VOC2010"
    save(base / "JPEGImages" / "2008_000002.jpg", image_of(0, (4, 60)))
    mask = base / "SegmentationClassContext" / "2008_000002.png"
    save(mask, np.tile(np.arange(60, dtype=np.uint8), (4, 1)))
    lists = base / "ImageSets" / "SegmentationContext"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2008_000002\n")
    usual, with_background = (
        load_segmentation(name, "val", root=tmp_path) for name in ("pascal_context", "pascal_context60")
    )
    assert usual[0].mask[0].tolist() == [255, *range(59)]
    assert with_background[0].mask[0].tolist() == [*range(60)]
    assert (len(set(usual.classes)), with_background.classes[0]) == (59, "background")
    save(mask, np.full((4, 60), 255, np.uint8))
    with pytest.raises(BadInputError, match=r"already shifted to 0\.\.58"):
        usual[0]
    save(mask, np.full((4, 60), 300, np.uint16))
    with pytest.raises(BadInputError, match="pixel format"):
        usual[0]


def test_nyuv2_sample_with_13_classes(samples: Path) -> None:
    dataset = load_segmentation("nyuv2_13", "test", root=samples)
    assert dataset.coverage == {"found": 10, "expected": 654}
    stored = np.array(Image.open(samples / "nyuv2/test_labels_13/new_nyu_class13_0001.png")).astype(int)
    assert dataset.ids[0] == "0001"
    assert np.array_equal(dataset[0].mask, np.where(stored == 0, 255, stored - 1))
    official = loadmat(samples / "nyuv2/class13Mapping.mat")["classMapping13"][0, 0]["classNames"]
    assert tuple(str(name[0]) for name in official.ravel()) == dataset.classes
    assert not [f for f in check_dataset("nyuv2_13", samples) if f.level == "error"]
    with pytest.raises(MissingError, match="10 of 10 files"):
        load_segmentation("nyuv2", "test", root=samples)


def test_nyuv2_with_40_and_13_classes_from_either_kind_of_mask(samples: Path, tmp_path: Path) -> None:
    mapping = loadmat(samples / "nyuv2/classMapping40.mat")
    base = tmp_path / "nyuv2"
    raw = np.zeros((480, 640), np.uint16)
    raw[:2] = np.resize(np.arange(895, dtype=np.uint16), (2, 640))
    save(base / "train_rgb" / "0003.png", image_of(0, raw.shape))
    save(base / "train_labels_894" / "0003.png", raw)
    dataset = load_segmentation("nyuv2", "train", root=tmp_path)
    of_40 = mapping["mapClass"].ravel().astype(int)
    assert dataset[0].mask.ravel()[:895].tolist() == [255, *(of_40 - 1)]
    assert tuple(str(name[0]) for name in mapping["className"].ravel()) == dataset.classes
    of_13 = loadmat(samples / "nyuv2/class13Mapping.mat")["classMapping13"][0, 0]["labels13"].ravel().astype(int)
    small = load_segmentation("nyuv2_13", "train", root=tmp_path)
    assert small[0].mask.ravel()[:895].tolist() == [255, *(of_13[of_40 - 1] - 1)]
    save(base / "train_labels_40" / "new_nyu_class40_0003.png", np.full(raw.shape, 40, np.uint8))
    again = load_segmentation("nyuv2", "train", root=tmp_path)
    assert set(again[0].mask.ravel()) == {39}
    assert again.fingerprint() != dataset.fingerprint()


def test_pf_willow(samples: Path) -> None:
    dataset = load_pairs("pf_willow", "test", root=samples)
    assert len(dataset) == len(set(dataset.ids)) == 900
    assert dataset.coverage is None
    pair = dataset.pairs[-1]
    stored = loadmat(samples / "pf_willow/PF-dataset-WILLOW" / f"{pair.target_id}.mat")["pts_coord"]
    assert np.allclose(pair.target_points, stored.T - 1)
    assert np.allclose(pair.target_box, (*(stored.min(1) - 1), *(stored.max(1) - 1)))
    assert pair.source_id.split("/")[0] == pair.target_id.split("/")[0] == pair.category
    assert dataset[0].source_image.shape[2] == 3
    assert not [f for f in check_dataset("pf_willow", samples) if f.level == "error"]


def test_pf_willow_defects(tmp_path: Path) -> None:
    base = tmp_path / "pf_willow" / "car(G)"
    points = np.arange(20.0).reshape(2, 10)
    for name in "ab":
        save(base / f"{name}.png", image_of(0))
        savemat(base / f"{name}.mat", {"pts_coord": points})
    assert load_pairs("pf_willow", "test", root=tmp_path).ids == ("a-b:car(G)", "b-a:car(G)")
    points[0, 3] = np.nan
    for wrong in ({"pts_coord": np.full((2, 9), 3.0)}, {"pts_coord": np.full((2, 10), 3.0)}, {"pts_coord": points}, {}):
        savemat(base / "b.mat", wrong)
        with pytest.raises(BadInputError, match=r"b\.mat is no readable annotation of PF-WILLOW: \w+: .*(pts|area)"):
            load_pairs("pf_willow", "test", root=tmp_path)
    (base / "b.mat").write_text("no MATLAB file")
    with pytest.raises(BadInputError, match=r"b\.mat is no readable annotation"):
        load_pairs("pf_willow", "test", root=tmp_path)
    (base / "b.mat").unlink()
    with pytest.raises(MissingError, match=r"car\(G\)/b has a \.png or a \.mat"):
        load_pairs("pf_willow", "test", root=tmp_path)


def test_pf_pascal(tmp_path: Path) -> None:
    base = tmp_path / "pf_pascal" / "PF-dataset-PASCAL"
    seen = np.array([[1, 2], [3, 4], [5, 6], [7, 8.5]])
    for name, hidden in (("2008_a", 1), ("2009_b", 2)):
        save(base / "JPEGImages" / f"{name}.jpg", image_of(0))
        points = seen.copy()
        points[hidden] = np.nan
        (base / "Annotations" / "cat").mkdir(parents=True, exist_ok=True)
        savemat(base / "Annotations" / "cat" / f"{name}.mat", {"kps": points, "bbox": [[2, 3, 20, 19]]})
    (base / "test_pairs.csv").write_text(
        "source_image,target_image,class,XA,YA,XB,YB\n"
        "PF-dataset-PASCAL/JPEGImages/2009_b.jpg,PF-dataset-PASCAL/JPEGImages/2008_a.jpg,8,1;7,2;8,1;7,2;8\n"
    )
    dataset = load_pairs("pf_pascal", "test", root=tmp_path)
    (pair,) = dataset.pairs
    assert (pair.source_id, pair.target_id, pair.category) == ("2009_b", "2008_a", "cat")
    assert pair.point_ids == ("0", "3")
    assert pair.source_points.tolist() == pair.target_points.tolist() == [[0, 1], [6, 7.5]]
    assert pair.target_box == (1, 2, 19, 18)
    assert dataset.coverage == {"found": 1, "expected": 299}
    assert not [f for f in check_dataset("pf_pascal", tmp_path) if f.level == "error"]
    (base / "test_pairs.csv").write_text("source_image,target_image,class\na.jpg,b.jpg,77\n")
    with pytest.raises(BadInputError, match=r"test_pairs\.csv needs the columns"):
        load_pairs("pf_pascal", "test", root=tmp_path)
    (base / "test_pairs.csv").write_text("source_image,target_image,class\na.jpg,b.jpg,8\n")
    with pytest.raises(MissingError, match=r"cat/a\.mat"):
        load_pairs("pf_pascal", "test", root=tmp_path)


def test_voc_in_the_layout_of_neco(tmp_path: Path) -> None:
    base = tmp_path / "voc2012" / "VOCSegmentation"
    (base / "sets").mkdir(parents=True)
    for i, split in enumerate(("train", "trainaug", "val")):
        (base / "sets" / f"{split}.txt").write_text(f"im{i}\n")
        save(base / "images" / f"im{i}.jpg", image_of(i))
        save(
            base / f"SegmentationClass{'' if split == 'val' else 'Aug'}" / f"im{i}.png", np.full((20, 30), i, np.uint8)
        )
    (base / "SegmentationClass").mkdir(exist_ok=True)
    for i, split in enumerate(("train", "trainaug", "val")):
        assert set(load_segmentation("voc2012", split, root=tmp_path)[0].mask.ravel()) == {i}


def test_voc_without_trainaug_says_how_to_make_it(voc: Path) -> None:
    with pytest.raises(MissingError, match=r"trainaug\.txt does not exist.*neco-bench data prepare voc_sbd") as error:
        load_segmentation("voc2012", "trainaug", root=voc)
    assert error.value.exit_code == 3
    found = [f for f in check_dataset("voc2012", voc) if f.split == "trainaug"]
    assert "prepare voc_sbd" in found[0].text


def test_voc_masks_without_borders_or_in_black_and_white(voc: Path) -> None:
    folder = voc / "voc2012" / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    for path in folder.iterdir():
        save(path, np.full((20, 30), 5, np.uint8))
    assert any("255 was changed to background" in f.text for f in check_dataset("voc2012", voc) if f.level == "error")
    for path in folder.iterdir():
        save(path, np.tile(np.array([0, 255], np.uint8), (20, 15)))
    assert any("black-and-white" in f.text for f in check_dataset("voc2012", voc) if f.level == "error")


def test_fractions_of_the_official_list(samples: Path, tmp_path: Path) -> None:
    """Counts of the reference; nested for equal draw; five different draws; a rule that nothing but ids decides."""
    base = tmp_path / "voc2012"
    (base / "SegmentationClassAug").mkdir(parents=True)
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    words = (samples / "class_lists/voc2012/trainaug.txt").read_text().split()
    (lists / "trainaug.txt").write_text("\n".join(words))
    draws = {
        (parts, draw): load_segmentation("voc2012", f"trainaug_1of{parts}_{draw}", root=tmp_path)
        for parts in (128, 64, 8)
        for draw in range(5)
    }
    for (parts, draw), dataset in draws.items():
        assert len(dataset) == {128: 80, 64: 160, 8: 1320}[parts]
        assert dataset.split == f"trainaug_1of{parts}_{draw}"
        assert dataset.coverage is None
        assert set(dataset.ids) <= set(words)
        if parts > 8:
            assert set(dataset.ids) <= set(draws[parts // {128: 2, 64: 8}[parts], draw].ids)
    for a, b in itertools.combinations(range(5), 2):
        assert len(set(draws[128, a].ids) & set(draws[128, b].ids)) < 10
    assert draws[128, 0].ids[:3] == ("2007_006704", "2007_006900", "2007_007398")  # the same on every machine
    (lists / "trainaug.txt").write_text("\n".join(sorted(words, reverse=True)))
    again = load_segmentation("voc2012", "trainaug_1of64_3", root=tmp_path)
    assert set(again.ids) == set(draws[64, 3].ids)


def test_fractions_of_a_subset_are_marked(samples: Path) -> None:
    dataset = load_segmentation("voc2012", "trainaug_1of8_0", root=samples)
    assert len(dataset) == round(270 * 1320 / 10582)
    assert dataset.coverage == {"found": 34, "expected": 1320}
    assert load_segmentation("voc2012", "trainaug_1of8_0", root=samples, limit=2).coverage == dataset.coverage
    rows = {row.name: row for row in describe_datasets(samples)}
    assert rows["ade20k_151"].fractions == ("train_1of{128,64,8}_{0..4}",)
    assert rows["coco_things"].fractions == ("train_1of{10}_{0..4}",)


@pytest.mark.parametrize("split", ["trainaug_1of128_5", "trainaug_1of1_0", "val_1of8_0", "trainaug_1of7_0", "1of8_0"])
def test_wrong_fractions(split: str) -> None:
    with pytest.raises(UsageError, match="trainaug_1of"):
        load_segmentation("voc2012", split)


def test_split_files(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    full = VOC2012(samples / "voc2012", "trainaug")
    path.write_text(f"{full.ids[7]}\n{full.ids[2]}.jpg\n")
    part = load_segmentation("voc2012", "trainaug", root=samples, split_file=path)
    assert part.ids == (full.ids[2], full.ids[7])
    assert part.coverage == {"found": 2, "expected": 10582}
    assert part[1].id == full.ids[7]
    path.write_text("nowhere\n2011_nothing\n")
    with pytest.raises(
        BadInputError, match=r"2 ids are not in split 'trainaug' of 'voc2012': 'nowhere', '2011_nothing'"
    ):
        load_segmentation("voc2012", "trainaug", root=samples, split_file=path)
    path.unlink()
    with pytest.raises(MissingError, match=r"mine\.txt does not exist"):
        load_segmentation("voc2012", "trainaug", root=samples, split_file=path)


def test_split_files_of_pairs(spair: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("000003-a-b:cat\n")
    part = load_pairs("spair71k", "val", root=spair, split_file=path)
    assert part.ids == ("000003-a-b:cat",)
    assert part.pairs[0].id == part.ids[0]


def test_part_of_a_set_without_a_known_size_is_marked(voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VOC2012, "expected", {})
    whole = load_segmentation("voc2012", "val", root=voc)
    assert whole.coverage is None
    assert whole.subset(whole.ids[:2]).coverage == {"found": 2, "expected": 3}


@pytest.mark.parametrize(
    "wrong",
    [
        {"src_kps": [[float("nan"), 1], [5, 6]]},
        {"trg_kps": [[7, 8], [9, float("inf")]]},
        {"trg_kps": [[7, 8], [9, 10**400]]},
        {"trg_bndbox": [5, 5, 5, 9]},
        {"trg_bndbox": [1, 2, float("nan"), 9]},
        {"src_bndbox": [9, 9, 5, 5]},
        {"src_bndbox": [1, 2, 3]},
        {"category": "\ud800"},
        {"src_imname": "a\0.jpg"},
        {"scale_variation": 10**30},
        {"trg_imsize": [float("inf"), 40, 3]},
    ],
)
def test_pairs_with_values_that_no_score_can_use(spair: Path, wrong: dict[str, Any]) -> None:
    """NaN, infinite points, boxes without area, ...: refused with the file's name where they would be scored."""
    path = next((spair / "spair71k").rglob("PairAnnotation/val/*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(BadInputError, match=rf"{path.name} is not a pair annotation of SPair-71k"):
        load_pairs("spair71k", "val", root=spair)
    assert any(path.name in f.text for f in check_dataset("spair71k", root=spair) if f.level == "error")


@pytest.mark.parametrize("value", [print, dict])
def test_a_plugin_that_is_no_data_set_hides_no_other(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load = DATASETS.load
    monkeypatch.setattr(DATASETS, "load", lambda name: value if name == "camvid" else load(name))
    rows = {row.name: row.problem for row in describe_datasets()}
    assert "is not a Dataset class" in rows["camvid"]
    assert "is not a Dataset class" not in rows["voc2012"]
    with pytest.raises(BadInputError, match="is not a Dataset class"):
        load_segmentation("camvid", "val")


def test_a_frame_listed_twice_under_two_paths(tmp_path: Path) -> None:
    (tmp_path / "camvid").mkdir()
    (tmp_path / "camvid" / "val.txt").write_text("a/x0.png b\nc/x0.png d\n")
    with pytest.raises(BadInputError, match="names 'x0' more than once"):
        load_segmentation("camvid", "val", root=tmp_path)


def test_small_layout_of_spair(samples: Path) -> None:
    small = load_pairs("spair71k", "test_small", root=samples)
    large = load_pairs("spair71k", "test", root=samples)
    assert set(small.ids) <= set(large.ids)
    assert small[0].pair.source_points.shape[1] == 2
    assert small.fingerprint() != large.fingerprint()
