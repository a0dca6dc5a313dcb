"""ADE20K and the COCO sets: id tables against `protocols/neco.md` 3.3, 3.5 and 3.6, real samples, planted mistakes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neco_bench.core.errors import BadInputError, MissingError
from neco_bench.data.base import IGNORE
from neco_bench.data.coco import (
    CURATED,
    THINGS,
    CocoStuff,
    CocoStuff27,
    CocoStuff27Curated,
    CocoStuff171,
    CocoThings,
    CocoThingsShifted,
)
from neco_bench.data.integrity import check_dataset
from tests import typed
from tests.data.data_helpers import image_of, save
from tests.typed import load_folder, load_segmentation

# neco.md 3.5 and 3.6, ids only.
NECO_THINGS = {
    "accessory": [27, 28, 31, 32, 33],
    "animal": [16, 17, 18, 19, 20, 21, 22, 23, 24, 25],
    "appliance": [78, 79, 80, 81, 82],
    "electronic": [72, 73, 74, 75, 76, 77],
    "food": [52, 53, 54, 55, 56, 57, 58, 59, 60, 61],
    "furniture": [62, 63, 64, 65, 67, 70],
    "indoor": [84, 85, 86, 87, 88, 89, 90],
    "kitchen": [44, 46, 47, 48, 49, 50, 51],
    "outdoor": [10, 11, 13, 14, 15],
    "person": [1],
    "sports": [34, 35, 36, 37, 38, 39, 40, 41, 42, 43],
    "vehicle": [2, 3, 4, 5, 6, 7, 8, 9],
}
NECO_STUFF = {
    "building": [95, 96, 128, 151, 158, 166],
    "ceiling": [102, 103],
    "floor": [101, 114, 115, 116, 117, 118],
    "food-stuff": [121, 122, 153, 170],
    "furniture-stuff": [98, 107, 108, 110, 112, 123, 130, 133, 156, 161, 165],
    "ground": [111, 125, 126, 136, 140, 144, 145, 147, 149, 154, 159],
    "plant": [94, 97, 119, 124, 129, 134, 142, 163, 169],
    "raw-material": [100, 132, 139, 143],
    "sky": [106, 157],
    "solid": [127, 135, 150, 160, 162, 182],
    "structural": [99, 113, 138, 146, 164],
    "textile": [92, 93, 104, 105, 109, 131, 137, 141, 152, 167, 168],
    "wall": [171, 172, 173, 174, 175, 176, 177],
    "water": [120, 148, 155, 178, 179],
    "window": [180, 181],
}
VALUES = np.array([0, 1, 15, 26, 27, 30, 33, 43, 91, 115, 156, 181, 255], np.uint8)


def coco(root: Path, split: str, masks: np.ndarray, folder: str, count: int = 2) -> Path:
    """A COCO folder with `count` images whose masks, all the same, lie in `folder`."""
    for i in range(count):
        save(root / "coco" / "images" / f"{split}2017" / f"{i:012d}.jpg", image_of(i, masks.shape))
        save(root / "coco" / folder / f"{i:012d}.png", masks)
    return root


def table(dataset: str, root: Path, folder: str, values: Sequence[int]) -> dict[int, int]:
    """{file value: class id} as the reader maps it, one column of pixels per value."""
    coco(root, "val", np.tile(np.array(values, np.uint8), (8, 1)), folder, 1)
    return dict(zip(values, load_segmentation(dataset, "val", root=root)[0].mask[0].tolist(), strict=True))


def merged(groups: Mapping[str, Sequence[int]]) -> dict[int, int]:
    return {number: row for row, name in enumerate(sorted(groups)) for number in groups[name]}


def test_class_names_and_order() -> None:
    assert CocoThings.classes == tuple(sorted(NECO_THINGS))
    assert CocoStuff.classes == tuple(sorted(NECO_STUFF))
    assert CocoStuff27.classes == CocoThings.classes + CocoStuff.classes
    assert len(set(CocoStuff171.classes)) == 171
    assert CocoStuff171.classes[:2] == ("person", "bicycle")
    assert CocoStuff171.classes[80] == "banner"
    assert THINGS["person"] == {1: "person"}


def test_things_table_of_panoptic_semantic_maps(tmp_path: Path) -> None:
    stuff = [92, 95, 133, 181, 184, 200]
    ids = [0, *merged(NECO_THINGS), *stuff]
    found = table("coco_things", tmp_path, "annotations/panoptic_annotations/semantic_segmentation_val2017", ids)
    assert found == {0: 255, **merged(NECO_THINGS), **dict.fromkeys(stuff, 255)}


def test_stuff_table_of_pixelmaps_and_of_stuffthingmaps(tmp_path: Path) -> None:
    ids = [0, *merged(NECO_STUFF), 183]
    found = table("coco_stuff", tmp_path / "a", "annotations/stuff_annotations/stuff_val2017_pixelmaps", ids)
    assert found == {0: 255, 183: 255, **merged(NECO_STUFF)}
    values = [i - 1 for i in (*merged(NECO_THINGS), *merged(NECO_STUFF))] + [255]
    found = table("coco_stuff", tmp_path / "b", "stuffthingmaps/val2017", values)
    assert found == dict.fromkeys(values, 255) | {i - 1: row for i, row in merged(NECO_STUFF).items()}
    found = table("coco_stuff171", tmp_path / "b", "stuffthingmaps/val2017", values)
    assert sorted(set(found.values())) == [*range(171), 255]
    assert [found[v] for v in sorted(values)] == [*range(171), 255]


def test_official_pixelmaps_have_a_palette_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "images" / "val2017").mkdir(parents=True)
    folder = tmp_path / "annotations" / "stuff_annotations" / "stuff_val2017_pixelmaps"
    folder.mkdir(parents=True)
    Image.new("RGB", (3, 1)).save(tmp_path / "images" / "val2017" / "1.jpg")
    mask = Image.fromarray(np.array([[0, 92, 183]], np.uint8), "P")
    mask.putpalette([0] * 3 * 92 + [127, 0, 0] + [0] * 3 * 90 + [255] * 3)  # black things, coloured stuff
    mask.save(folder / "1.png")
    assert CocoStuff(tmp_path, "val").mask(0).tolist() == [[255, merged(NECO_STUFF)[92], 255]]


def test_the_off_by_one_trap_is_a_named_set_of_its_own(tmp_path: Path) -> None:
    values = sorted(i - 1 for i in (*merged(NECO_THINGS), *merged(NECO_STUFF)))
    right = table("coco_things", tmp_path, "annotations/val2017", values)
    assert right == {v: merged(NECO_THINGS).get(v + 1, 255) for v in values}
    wrong = table("coco_things_shifted", tmp_path, "annotations/val2017", values)
    assert wrong == {v: merged(NECO_THINGS).get(v, 255) for v in values}
    names = CocoThingsShifted.classes
    assert wrong[0] == wrong[26] == wrong[30] == 255  # person, backpack and handbag are void
    assert [names[wrong[v]] for v in (1, 27, 33, 43)] == ["person", "accessory", "accessory", "sports"]


def test_stuffthingmaps_of_the_sample(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "coco").symlink_to(samples / "coco_stuff_sample")
    for name in ("coco_things", "coco_things_shifted", "coco_stuff", "coco_stuff27", "coco_stuff171"):
        for split, count in (("train", 13), ("val", 8)):
            dataset = load_folder(name, split, root=tmp_path)
            assert len(dataset) == count
            assert dataset.source == "stuffthingmaps"
    stored = np.array(Image.open(samples / "coco_stuff_sample/annotations/val2017/000000000785.png"))
    things = load_segmentation("coco_things", "val", root=tmp_path)
    mask = things[things.ids.index("000000000785")].mask
    assert np.array_equal(mask == things.classes.index("person"), stored == 0)
    assert np.array_equal(mask == 255, stored > 89)
    assert not [f for f in check_dataset("coco_stuff27", tmp_path) if f.level == "error"]


def test_curated_images_are_those_of_a_list(tmp_path: Path) -> None:
    masks = np.tile(np.array([0, 91, 255], np.uint8), (8, 4))
    coco(tmp_path, "val", masks, "stuffthingmaps/val2017", 5)
    whole = load_segmentation("coco_stuff27", "val", root=tmp_path)
    with pytest.raises(MissingError, match=r"the split list .*Coco164kFull_Stuff_Coarse\.txt does not exist"):
        load_segmentation("coco_stuff27_curated", "val", root=tmp_path)
    assert not CocoStuff27Curated.has_images(tmp_path / "coco", "val")
    folder = tmp_path / "coco" / "curated" / "val2017"
    folder.mkdir(parents=True)
    (folder / CURATED).write_text(f"{3:012d}\n{1:012d}\n{77:012d}\n")  # not in order; one image is not here
    part = load_segmentation("coco_stuff27_curated", "val", root=tmp_path)
    assert part.ids == (f"{1:012d}", f"{3:012d}")
    assert part.coverage == {"found": 2, "expected": 4172}
    assert CocoStuff27Curated.has_images(tmp_path / "coco", "val")
    assert part.classes == whole.classes
    assert np.array_equal(part[1].image, whole[3].image)
    assert np.array_equal(part[1].mask, whole[3].mask)
    (folder / CURATED).write_text("COCO_val2014_000000000001\n")
    with pytest.raises(BadInputError, match=r"None of the 1 names .*'COCO_val2014_0+1', is the name of an image"):
        load_segmentation("coco_stuff27_curated", "val", root=tmp_path)


def test_instances_of_the_sample(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "coco").symlink_to(samples / "coco_instances_sample")
    dataset = load_folder("coco_things", "val", root=tmp_path)
    assert dataset.source == "instances"
    raw = json.loads((samples / "coco_instances_sample/annotations/instances_val2017.json").read_bytes())
    ids = {image["id"]: image["file_name"][:-4] for image in raw["images"]}
    for index, item in enumerate(dataset.ids):
        annotations = [a for a in raw["annotations"] if ids[a["image_id"]] == item]
        present = {merged(NECO_THINGS)[a["category_id"]] for a in annotations if a["area"] > 1000}
        sample = dataset[index]
        assert sample.mask.shape == sample.image.shape[:2]
        assert present - set(np.unique(sample.mask)) == set()
        # The masks cover about as much as the annotations say, overlaps apart.
        assert (sample.mask != 255).sum() <= sum(a["area"] for a in annotations) * 1.05
    before = dataset.fingerprint()
    assert before == load_segmentation("coco_things", "val", root=tmp_path).fingerprint()


@pytest.fixture
def panoptic(samples: Path, tmp_path: Path) -> Path:
    source = samples / "coco_panoptic_sample"
    target = tmp_path / "coco"
    shutil.copytree(source / "input_images", target / "val2017")
    shutil.copytree(source / "panoptic_examples", target / "annotations" / "panoptic_val2017")
    shutil.copy(source / "panoptic_examples.json", target / "annotations" / "panoptic_val2017.json")
    return tmp_path


def test_panoptic_of_the_sample(samples: Path, panoptic: Path) -> None:
    dataset = load_folder("coco_things", "val", root=panoptic)
    assert dataset.source == "panoptic"
    # An independent copy of the same annotation: category in red, instance in green.
    for index, item in enumerate(dataset.ids):
        other = np.array(Image.open(samples / "coco_panoptic_sample/panoptic_examples_2ch_format" / f"{item}.png"))
        expected = np.full(256, 255)
        expected[list(merged(NECO_THINGS))] = list(merged(NECO_THINGS).values())
        assert np.array_equal(dataset[index].mask, expected[other[..., 0]])
    path = panoptic / "coco" / "annotations" / "panoptic_val2017.json"
    raw = json.loads(path.read_bytes())
    raw["annotations"][0]["segments_info"].pop()
    path.write_text(json.dumps(raw))
    with pytest.raises(BadInputError, match=r"has segment \d+, for which the JSON"):
        list(typed.samples(load_segmentation("coco_things", "val", root=panoptic)))
    path.write_text("{}")
    with pytest.raises(BadInputError, match=r"panoptic_val2017\.json is not a COCO annotation file: KeyError"):
        load_segmentation("coco_things", "val", root=panoptic)


def test_confused_coco_maps_are_named(tmp_path: Path) -> None:
    coco(tmp_path / "a", "val", np.full((8, 8), 190, np.uint8), "stuffthingmaps/val2017")
    with pytest.raises(BadInputError, match="panoptic category ids"):
        load_segmentation("coco_stuff27", "val", root=tmp_path / "a")[0]
    folder = "annotations/panoptic_annotations/semantic_segmentation_val2017"
    coco(tmp_path / "b", "val", np.full((8, 8), 255, np.uint8), folder)
    with pytest.raises(BadInputError, match="is a stuffthingmap"):
        load_segmentation("coco_things", "val", root=tmp_path / "b")[0]
    with pytest.raises(MissingError, match="no annotation; one of pixelmaps, stuffthingmaps is needed"):
        load_segmentation("coco_stuff", "val", root=tmp_path / "b")


def test_half_extracted_coco(tmp_path: Path) -> None:
    coco(tmp_path, "val", np.zeros((8, 8), np.uint8), "stuffthingmaps/val2017", 4)
    for name in ("000000000001", "000000000003"):
        (tmp_path / "coco" / "stuffthingmaps" / "val2017" / f"{name}.png").unlink()
    with pytest.raises(MissingError, match=r"2 of 4 files in .*: 000000000001\.jpg, 000000000003\.jpg\. .*in part"):
        load_segmentation("coco_stuff27", "val", root=tmp_path)
    (tmp_path / "coco" / "images" / "val2017" / "000000000001.jpg").unlink()
    shutil.rmtree(tmp_path / "coco" / "stuffthingmaps")
    errors = [f for f in check_dataset("coco_stuff27", tmp_path) if f.level == "error"]
    assert [f.split for f in errors] == ["val"]


def ade(root: Path, values: Sequence[int] = (0, 1, 150), count: int = 3) -> Path:
    base = root / "ade20k" / "ADEChallengeData2016"
    for i in range(count):
        save(base / "images" / "training" / f"ADE_train_{i:08d}.jpg", image_of(i, (8, len(values))))
        save(base / "annotations" / "training" / f"ADE_train_{i:08d}.png", np.tile(np.array(values, np.uint8), (8, 1)))
    return base


def test_ade_in_both_forms(tmp_path: Path) -> None:
    ade(tmp_path, range(151))
    usual = load_segmentation("ade20k", "train", root=tmp_path)
    assert usual[0].mask[0].tolist() == [255, *range(150)]
    assert (len(usual.classes), usual.void_class) == (150, None)
    assert (usual.classes[0], usual.classes[149]) == ("wall", "flag")
    with_other = load_segmentation("ade20k_151", "train", root=tmp_path)
    assert with_other[0].mask[0].tolist() == [*range(151)]
    assert (with_other.classes[:2], with_other.void_class) == (("other", "wall"), 0)
    assert usual.fingerprint() != with_other.fingerprint()
    scored = load_segmentation("ade20k_151_scored", "train", root=tmp_path)
    assert scored.classes == with_other.classes
    for dataset, value in ((with_other, IGNORE), (scored, 0)):
        mask = dataset[0].mask
        assert mask[0].tolist() == [*range(151)]
        assert dataset.eval_mask(mask)[0].tolist() == [value, *range(1, 151)]


def test_ade_of_the_sample(samples: Path) -> None:
    names = [
        line.split("\t")[4]
        for line in (samples / "ade20k/ADEChallengeData2016/objectInfo150.txt").open()
        if "\t" in line
    ]
    dataset = load_segmentation("ade20k", "val", root=samples)
    assert all(full.startswith(short) for short, full in zip(dataset.classes, names[1:], strict=True))
    stored = np.array(Image.open(samples / f"ade20k/ADEChallengeData2016/annotations/validation/{dataset.ids[0]}.png"))
    assert np.array_equal(dataset[0].mask, np.where(stored == 0, 255, stored.astype(int) - 1))
    assert dataset.coverage == {"found": 3, "expected": 2000}


def test_ade_mistakes_are_named(tmp_path: Path) -> None:
    ade(tmp_path / "shifted", (0, 5, 149, 255))
    for name in ("ade20k", "ade20k_151"):
        with pytest.raises(BadInputError, match=r"values 255 .*already shifted to 0\.\.149"):
            load_segmentation(name, "train", root=tmp_path / "shifted")[0]
        errors = [f.text for f in check_dataset(name, tmp_path / "shifted") if f.level == "error"]
        assert "3 of 3" in errors[-1]
    base = ade(tmp_path / "colour")
    save(base / "annotations" / "training" / "ADE_train_00000001.png", image_of(1, (8, 3)))
    with pytest.raises(BadInputError, match="is a colour mask"):
        load_segmentation("ade20k", "train", root=tmp_path / "colour")[1]
    (base / "annotations" / "training" / "ADE_train_00000002.png").unlink()
    with pytest.raises(MissingError, match=r"1 of 3 files .*unpacked only in part"):
        load_segmentation("ade20k", "train", root=tmp_path / "colour")


@pytest.mark.parametrize(
    "place", ["ADE20K_2021_17_01/index_ade20k.pkl", "images/ADE/training/x.jpg", "images/training/a/abbey/x.jpg"]
)
def test_the_full_ade20k_is_refused(tmp_path: Path, place: str) -> None:
    path = tmp_path / "ade20k" / place
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(MissingError, match=r"full ADE20K.*ADEChallengeData2016\.zip"):
        load_segmentation("ade20k", "train", root=tmp_path)
    assert all("full ADE20K" in f.text for f in check_dataset("ade20k", tmp_path))
