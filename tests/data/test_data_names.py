"""Files under other names, in other places, in other lists: found, or told as what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from neco_bench.core.errors import BadInputError, MissingError
from neco_bench.core.protocol import all_cards
from neco_bench.data.folder import first_entry
from neco_bench.data.integrity import check_dataset, describe_datasets
from neco_bench.data.io import near_files
from tests.command import neco
from tests.data.data_helpers import image_of, save, save_indices
from tests.typed import load_folder, load_pairs, load_segmentation


def ade(root: Path, names: Sequence[str] = ("a", "b", "c")) -> tuple[Path, Path]:
    """ADE20K's val split; the two folders."""
    base = root / "ade20k" / "ADEChallengeData2016"
    for i, name in enumerate(names):
        save(base / "images" / "validation" / f"{name}.jpg", image_of(i))
        save(base / "annotations" / "validation" / f"{name}.png", np.full((20, 30), i + 1, np.uint8))
    return base / "images" / "validation", base / "annotations" / "validation"


def message(root: Path, name: str = "ade20k", split: str = "val") -> str:
    with pytest.raises(MissingError) as error:
        load_segmentation(name, split, root=root)
    text = str(error.value).partition("\n")[0]
    assert "unpack both" not in text
    return text


def test_another_suffix(tmp_path: Path) -> None:
    images, _ = ade(tmp_path)
    for path in list(images.iterdir()):
        path.rename(path.with_suffix(".JPEG"))
    assert "has 3 files such as 'a.JPEG'; NAME.jpg is expected" in message(tmp_path)
    assert any("'a.JPEG'" in finding.text for finding in check_dataset("ade20k", tmp_path) if finding.level == "error")


def test_one_file_with_another_suffix(tmp_path: Path) -> None:
    images, masks = ade(tmp_path)
    (images / "b.jpg").rename(images / "b.JPG")
    text = message(tmp_path)
    assert "1 of 3 files" in text
    assert "'b.JPG' is there instead: name it 'b.jpg'" in text
    (masks / "a.png").rename(masks / "a.PNG")
    (images / "b.JPG").rename(images / "b.jpg")
    assert "'a.PNG' is there instead: name it 'a.png'" in message(tmp_path)


@pytest.mark.parametrize("copy", ["b (1).jpg", "b(2).jpg", "b - Copy.jpg"])
def test_a_second_download(tmp_path: Path, copy: str) -> None:
    images, _ = ade(tmp_path)
    shutil.copy(images / "b.jpg", images / copy)
    text = message(tmp_path)
    assert f"whose names look like 'a.png': {copy}. {copy!r} looks like a second download" in text


def test_names_that_count_from_zero_and_from_one(tmp_path: Path) -> None:
    _, masks = ade(tmp_path, [f"ADE_val_{i:08d}" for i in range(4)])
    for i in reversed(range(4)):
        (masks / f"ADE_val_{i:08d}.png").rename(masks / f"ADE_val_{i + 1:08d}.png")
    assert "one counts from 0, the other from 1" in message(tmp_path)
    assert "ADE_val_00000000.jpg" in message(tmp_path)


def test_masks_one_folder_deeper(tmp_path: Path) -> None:
    _, masks = ade(tmp_path)
    shutil.move(masks, masks.with_name("moved"))
    shutil.move(masks.with_name("moved"), masks / "validation")
    assert "The same names are at different depths" in message(tmp_path)


def test_half_an_archive_is_told_as_such(tmp_path: Path) -> None:
    _, masks = ade(tmp_path)
    (masks / "b.png").unlink()
    with pytest.raises(MissingError, match=r"1 of 3 files .* look like 'a\.png': b\.jpg\. .*unpack both again"):
        load_segmentation("ade20k", "val", root=tmp_path)


def stuff(root: Path) -> Path:
    for i in range(2):
        save(root / "coco" / "images" / "val2017" / f"{i:012d}.jpg", image_of(i))
        save(root / "coco" / "stuffthingmaps" / "val2017" / f"{i:012d}.png", np.full((20, 30), i, np.uint8))
    return root / "coco" / "stuffthingmaps" / "val2017"


def test_train_ids_beside_stuffthingmaps_are_no_masks_without_images(tmp_path: Path) -> None:
    """Converters of other code bases write them there."""
    folder = stuff(tmp_path)
    for path in list(folder.iterdir()):
        shutil.copy(path, path.with_name(f"{path.stem}_labelTrainIds.png"))
    dataset = load_segmentation("coco_stuff27", "val", root=tmp_path)
    assert len(dataset) == 2
    (folder / "000000000001.png").unlink()
    assert "There is '000000000001_labelTrainIds.png' instead of '000000000001.png'" in message(
        tmp_path, "coco_stuff27"
    )


def test_cityscapes_of_two_kinds(tmp_path: Path) -> None:
    base = tmp_path / "cityscapes"
    for i, kind in enumerate(("labelIds", "labelTrainIds")):
        save(base / "leftImg8bit" / "val" / "ulm" / f"ulm_{i}_leftImg8bit.png", image_of(i))
        save(base / "gtFine" / "val" / "ulm" / f"ulm_{i}_gtFine_{kind}.png", np.full((20, 30), 7, np.uint8))
    text = message(tmp_path, "cityscapes")
    assert "There is 'ulm_1_gtFine_labelTrainIds.png' instead of 'ulm_1_gtFine_labelIds.png'" in text


def test_cityscapes_unpacked_into_a_folder_per_archive(tmp_path: Path) -> None:
    for root, places in (("official", ("", "")), ("apart", ("leftImg8bit_trainvaltest", "gtFine_trainvaltest"))):
        images, masks = (tmp_path / root / "cityscapes" / place for place in places)
        save(images / "leftImg8bit" / "val" / "ulm" / "1_leftImg8bit.png", np.zeros((1024, 2048, 3), np.uint8))
        save(masks / "gtFine" / "val" / "ulm" / "1_gtFine_labelIds.png", np.full((1024, 2048), 8, np.uint8))
    apart, official = (load_segmentation("cityscapes", "val", root=tmp_path / root) for root in ("apart", "official"))
    assert apart.mask(0)[0, 0] == 1
    assert apart.fingerprint() == official.fingerprint()


@pytest.mark.parametrize(
    "place", ["VOCdevkit/VOCdevkit/VOC2012", "VOC2012_train_val/VOC2012_train_val", "archive/VOC2012", "VOCdevkit"]
)
def test_nested_voc_is_found(voc: Path, tmp_path: Path, place: str) -> None:
    before = load_segmentation("voc2012", "val", root=voc)
    other = tmp_path / "other" / "voc2012"
    shutil.copytree(voc / "voc2012" / "VOCdevkit" / "VOC2012", other / place)
    (other / "VOC2012_test" / "VOC2012_test" / "ImageSets" / "Segmentation").mkdir(parents=True)  # Kaggle has it
    (other / "VOC2012_test" / "VOC2012_test" / "ImageSets" / "Segmentation" / "test.txt").write_text("x\n")
    dataset = load_folder("voc2012", "val", root=tmp_path / "other")
    assert dataset.folder == other / place
    assert dataset.fingerprint() == before.fingerprint()
    assert dataset[1].mask[1, 1] == 1
    assert any(str(other / place) in f.text for f in check_dataset("voc2012", tmp_path / "other") if f.level == "ok")


def test_voc_of_two_years_and_two_copies(voc: Path) -> None:
    devkit = voc / "voc2012" / "VOCdevkit"
    shutil.copytree(devkit / "VOC2012", devkit / "VOC2007")
    assert load_folder("voc2012", "val", root=voc).folder == devkit / "VOC2012"
    shutil.copytree(devkit / "VOC2012", devkit / "VOC2012-old")
    with pytest.raises(BadInputError, match=r"several copies: .*VOC2012, .*VOC2012-old"):
        load_segmentation("voc2012", "val", root=voc)


def test_other_nested_trees_are_found(tmp_path: Path, camvid: Path, spair: Path) -> None:
    ade(tmp_path)
    stuff(tmp_path)
    for folder, inner in (
        ("ade20k", "ADEChallengeData2016/ADEChallengeData2016"),
        ("camvid", "CamVid/CamVid"),
        ("spair71k", "SPair-71k/SPair-71k"),
        ("coco", "coco2017"),
    ):
        place = tmp_path / folder
        source = next((path for path in place.iterdir() if path.name in inner.split("/")), place)
        shutil.move(source, tmp_path / "moved")
        (place / inner).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(tmp_path / "moved", place / inner)
    assert len(load_pairs("spair71k", "val", root=tmp_path)) > 1
    for name, split in (("ade20k", "val"), ("camvid", "train"), ("coco_stuff27", "val")):
        assert len(load_segmentation(name, split, root=tmp_path)) > 1


def test_what_is_there_instead_of_a_data_set(voc: Path) -> None:
    with pytest.raises(MissingError, match=r"there is no folder .*/voc2012/voc2012\. .*voc2012 contains 'VOCdevkit'\."):
        load_segmentation("voc2012", "val", root=voc / "voc2012")  # the root is one folder too deep
    (voc / "VOC2012").mkdir()
    (voc / "voc2012").rename(voc / "away")
    with pytest.raises(MissingError, match=r"Did you mean 'VOC2012'"):
        load_segmentation("voc2012", "val", root=voc)


def test_a_listed_file_with_another_suffix(voc: Path) -> None:
    base = voc / "voc2012" / "VOCdevkit" / "VOC2012" / "JPEGImages"
    dataset = load_segmentation("voc2012", "val", root=voc)
    (base / "2007_000001.jpg").rename(base / "2007_000001.JPG")
    for read in (lambda: dataset[1], lambda: dataset.mask(1), dataset.fingerprint):
        with pytest.raises(MissingError, match=r"2007_000001\.jpg.* '2007_000001\.JPG' is there instead: name it"):
            read()
    (base / "2007_000001.JPG").rename(base / "2007_000001 (1).jpg")
    with pytest.raises(MissingError, match=r"'2007_000001 \(1\)\.jpg' is there, which looks like a second download"):
        dataset[1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize(
    "line", ["{}", "  {}  ", "{}.jpg", "C:\\data\\JPEGImages\\{}.jpg", "/my data/{}.jpg /x/{}.png"]
)
def test_lists_of_other_programs(voc: Path, encoding: str, line: str) -> None:
    path = voc / "voc2012" / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt"
    path.write_bytes("\r\n".join(line.format(f"2007_00000{i}", "y") for i in range(3)).encode(encoding))
    assert load_segmentation("voc2012", "val", root=voc).ids == ("2007_000000", "2007_000001", "2007_000002")


def test_a_split_file_of_another_program(voc: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("JPEGImages\\2007_000002.jpg\r\n  2007_000000 1\r\n".encode("utf-16"))
    part = load_segmentation("voc2012", "val", root=voc, split_file=path)
    assert part.ids == ("2007_000000", "2007_000002")


def test_names_with_spaces() -> None:
    assert first_entry("my image 1.png other.png") == "my image 1.png"
    assert first_entry("/a b/c.v2 d.JPG") == "/a b/c.v2 d.JPG"
    assert first_entry("2007_000032 1") == "2007_000032"


def test_nul_in_a_list(voc: Path) -> None:
    path = voc / "voc2012" / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt"
    path.write_bytes(b"2007_000000\n2007_0000\x0001\n")
    with pytest.raises(BadInputError, match=r"val\.txt is not a readable text file: .*NUL"):
        load_segmentation("voc2012", "val", root=voc)


def present(root: Path) -> dict[str, tuple[str, ...]]:
    return {row.name: row.present for row in describe_datasets(root)}


def test_a_set_is_present_where_its_splits_have_images(voc: Path, camvid: Path, spair: Path) -> None:
    """`voc` and the others share one root."""
    rows = present(voc)
    assert (rows["voc2012"], rows["camvid"], rows["spair71k"]) == (("val",), ("train",), ("val",))
    assert rows["ade20k"] == ()
    (voc / "ade20k" / "ADEChallengeData2016" / "images" / "validation").mkdir(parents=True)
    assert present(voc)["ade20k"] == ()
    ade(voc)
    stuff(voc)
    rows = present(voc)
    assert rows["ade20k"] == rows["ade20k_151"] == rows["coco_stuff27"] == ("val",)
    for path in voc.rglob("*.jpg"):
        path.unlink()
    described = {row.name: row for row in describe_datasets(voc)}
    assert all(described[name].present == () for name in ("voc2012", "spair71k", "ade20k"))
    assert "no images" in described["voc2012"].problem


def test_tasks_ask_for_their_own_splits(voc: Path) -> None:
    base = voc / "voc2012" / "VOCdevkit" / "VOC2012"

    def with_data() -> set[str]:
        return {row["task"] for row in json.loads(neco("tasks", "--data-root", voc, "--json").out) if row["data"]}

    cards = all_cards()[0]
    wanted = {
        name for name, card in cards.items() if card.dataset == "voc2012" and set(card.splits.values()) == {"val"}
    }
    found = with_data()
    assert found == wanted | {name for name, card in cards.items() if card.dataset.startswith("shapes")}
    shutil.copy(base / "ImageSets/Segmentation/val.txt", base / "ImageSets/Segmentation/trainaug.txt")
    save_indices(base / "SegmentationClassAug" / "2007_000000.png", np.zeros((20, 30), np.uint8))
    assert {"voc_ic", "voc_ic_1of8"} <= with_data() - found


def test_a_folder_is_no_file_with_another_ending(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert near_files(tmp_path / "train.txt") == ""
    (tmp_path / "val").touch()
    assert near_files(tmp_path / "val.txt") == "'val' is there instead: name it 'val.txt'."
    assert near_files(tmp_path / "Train").startswith("'train' is there instead")  # a folder with another case
