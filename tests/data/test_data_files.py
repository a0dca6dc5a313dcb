"""Reading images, masks and the miniature data sets: what is accepted, and that every defect is named with its file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from neco_bench.core.errors import BadInputError, MissingError, UsageError
from neco_bench.data.integrity import check_dataset, describe_datasets
from neco_bench.data.io import id_table, read_image, read_mask
from neco_bench.data.load import list_datasets
from neco_bench.data.voc2012 import VOC2012
from tests.data.data_helpers import CAMVID_SIZE, PAIRS, image_of, save, save_indices
from tests.typed import load_pairs, load_segmentation


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "1", "LA"])
def test_images_of_every_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    original = Image.fromarray(image_of(0)).convert(mode)
    original.save(path)
    image = read_image(path)
    assert image.shape == (20, 30, 3)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert np.array_equal(image, np.array(original.convert("RGB")))


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    save(tmp_path / "x.jpg", image_of(0), exif=exif)
    assert read_image(tmp_path / "x.jpg").shape == (20, 30, 3)


def test_bad_images_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    with pytest.raises(MissingError, match=r"x\.jpg, which .*val\.txt names"):
        read_image(path, listed_in=Path("val.txt"))
    save(path, image_of(0, (200, 200)))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BadInputError, match=r"x\.jpg.*truncated"):
        read_image(path)
    path.write_text("no image")
    with pytest.raises(BadInputError, match=r"x\.jpg"):
        read_image(path)
    save(tmp_path / "deep.png", np.full((4, 4), 1000, np.uint16))
    with pytest.raises(BadInputError, match=r"deep\.png.*8 bits"):
        read_image(tmp_path / "deep.png")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=12), st.integers(1, 20), st.integers(20, 255))
def test_masks_read_back_or_name_the_wrong_values(
    tmp_path_factory: pytest.TempPathFactory, values: Sequence[int], classes: int, void: int
) -> None:
    path = tmp_path_factory.mktemp("masks") / "m.png"
    array = np.array([values], np.uint8)
    save_indices(path, array)
    table = id_table({**{i: i for i in range(classes)}, void: 255})
    wrong = sorted({v for v in values if v >= classes and v != void})
    if wrong:
        with pytest.raises(BadInputError, match=rf"m\.png holds the values {wrong[0]}\b"):
            read_mask(path, table=table)
    else:
        assert np.array_equal(read_mask(path, table=table), np.where(array == void, 255, array))


def test_voc_reads_indices_and_void(voc: Path) -> None:
    dataset = load_segmentation("voc2012", "val", root=voc)
    assert len(dataset) == 3
    assert dataset.coverage == {"found": 3, "expected": 1449}
    sample = dataset[2]
    assert sample.id == "2007_000002"
    assert set(sample.mask[0]) == {255}
    assert set(sample.mask[1:].ravel()) == {2}
    assert dataset.palette[[1, 2, 3, 20]].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 64, 128]]


@pytest.mark.parametrize("place", ["voc2012/VOC2012", "voc2012"])
def test_voc_is_found_in_other_places(voc: Path, tmp_path: Path, place: str) -> None:
    before = load_segmentation("voc2012", "val", root=voc).fingerprint()
    other = tmp_path / "other"
    shutil.copytree(voc / "voc2012" / "VOCdevkit" / "VOC2012", other / place)
    dataset = load_segmentation("voc2012", "val", root=other)
    assert dataset[1].mask[1, 1] == 1
    assert dataset.fingerprint() == before  # places do not matter


def _voc_file(root: Path, folder: str, name: str) -> Path:
    return root / "voc2012" / "VOCdevkit" / "VOC2012" / folder / name


def test_voc_defects_are_named(voc: Path) -> None:
    dataset = load_segmentation("voc2012", "val", root=voc)
    mask = _voc_file(voc, "SegmentationClass", "2007_000001.png")
    save(mask, np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(BadInputError, match=r"2007_000001\.png is a colour mask"):
        dataset[1]
    save_indices(mask, np.zeros((20, 31), np.uint8))
    with pytest.raises(BadInputError, match=r"2007_000001\.png is 31x20 .* its image is 30x20"):
        dataset[1]
    save_indices(mask, np.full((20, 30), 77, np.uint8))
    with pytest.raises(BadInputError, match=r"2007_000001\.png holds the values 77 in 600 pixels.*mapping"):
        dataset[1]
    save(mask, image_of(0)[..., 0])
    with pytest.raises(BadInputError, match=r"2007_000001\.png holds the values 21, .*interpolation"):
        dataset[1]
    mask.unlink()
    with pytest.raises(MissingError, match=r"2007_000001\.png, which .*val\.txt names"):
        dataset[1]
    with pytest.raises(MissingError, match=r"2007_000001\.png"):
        dataset.fingerprint()
    _voc_file(voc, "JPEGImages", "2007_000000.jpg").unlink()
    found = {f.text for f in check_dataset("voc2012", voc) if f.level == "error"}
    assert len(found) == 3  # two items and the sum
    assert any("2 of 3" in text for text in found)


def test_voc_trainaug_asks_for_its_masks(voc: Path) -> None:
    lists = _voc_file(voc, "ImageSets", "Segmentation")
    shutil.copy(lists / "val.txt", lists / "trainaug.txt")
    with pytest.raises(MissingError, match="SegmentationClassAug"):
        load_segmentation("voc2012", "trainaug", root=voc)


def test_wrong_lists(voc: Path) -> None:
    file = _voc_file(voc, "ImageSets", "Segmentation/val.txt")
    file.write_text("\n \n")
    with pytest.raises(BadInputError, match=r"val\.txt is empty"):
        load_segmentation("voc2012", "val", root=voc)
    file.write_text("a\nb\na\n")
    with pytest.raises(BadInputError, match=r"names 'a' more than once"):
        load_segmentation("voc2012", "val", root=voc)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInputError, match=r"not a readable text file"):
        load_segmentation("voc2012", "val", root=voc)
    file.unlink()
    (finding,) = check_dataset("voc2012", voc)
    assert finding.level == "error"
    assert "ImageSets/Segmentation/train.txt" in finding.text


def test_missing_roots_show_the_tree_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NECO_BENCH_DATA", raising=False)
    for root in (None, tmp_path):
        with pytest.raises(
            MissingError, match=r"(?s)trainannot/.*neco-bench data check camvid --data-root DIR"
        ) as error:
            load_segmentation("camvid", "train", root=root)
        assert error.value.exit_code == 3
    monkeypatch.setenv("NECO_BENCH_DATA", str(tmp_path))
    with pytest.raises(MissingError, match="there is no folder"):
        load_segmentation("camvid", "train")


def test_wrong_names(voc: Path) -> None:
    with pytest.raises(UsageError, match="voc2012"):
        load_segmentation("voc2021", "val")
    with pytest.raises(UsageError, match=r"train, trainaug, val, trainaug_1of\{128,64,8\}_\{0\.\.4\}"):
        load_segmentation("voc2012", "test", root=voc)
    with pytest.raises(UsageError, match="1 or more"):
        load_segmentation("voc2012", "val", root=voc, limit=0)


def test_camvid_void_and_base_names(camvid: Path) -> None:
    dataset = load_segmentation("camvid", "train", root=camvid)
    assert dataset.ids == ("a0", "a1")
    assert set(dataset[0].mask.ravel()) == {10}
    assert set(dataset[1].mask.ravel()) == {255}
    assert len(dataset.classes) == len(dataset.palette) == 11
    save(camvid / "camvid" / "trainannot" / "a1.png", np.full(CAMVID_SIZE, 255, np.uint8))
    with pytest.raises(BadInputError, match=r"values 255.*void was rewritten from 11 to 255"):
        dataset[1]


def test_limited_and_fingerprint(camvid: Path) -> None:
    dataset = load_segmentation("camvid", "train", root=camvid)
    first = dataset.head(1)
    assert first.ids == dataset.ids[:1]
    assert len(dataset) == 2
    assert load_segmentation("camvid", "train", root=camvid, limit=1).fingerprint() == first.fingerprint()
    assert first.fingerprint() != dataset.fingerprint()
    before = dataset.fingerprint()
    assert pickle.loads(pickle.dumps(dataset)).fingerprint() == before
    with (camvid / "camvid" / "train" / "a1.png").open("ab") as file:
        file.write(b"x")
    assert dataset.fingerprint() != before
    assert first.fingerprint() == load_segmentation("camvid", "train", root=camvid, limit=1).fingerprint()


def test_fingerprint_asks_each_file_for_its_size_and_opens_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "voc2012"
    for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (base / folder).mkdir(parents=True)
        for i in range(50):
            (base / folder / f"{i}.{ending}").touch()
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text("".join(f"{i}\n" for i in range(50)))
    dataset = VOC2012(base, "val")
    asked: list[Path] = []
    stat = Path.stat

    def counted(path: Path, **options: Any) -> os.stat_result:
        asked.append(path)
        return stat(path, **options)

    def refused(path: object, *_: object, **__: object) -> None:
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(Path, "stat", counted)
    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr("io.open", refused)
    dataset.fingerprint()
    assert len(asked) == len(set(asked)) == 100


def test_spair_pairs_sorted_and_as_annotated(spair: Path) -> None:
    dataset = load_pairs("spair71k", "val", root=spair)
    assert dataset.ids == tuple(sorted(PAIRS))
    sample = dataset[0]
    pair = sample.pair
    assert (pair.source_id, pair.target_id, pair.category) == ("cat/b", "cat/a", "cat")
    assert pair.source_points.tolist() == [[3, 4], [5, 6]]
    assert pair.target_points.dtype == np.float64
    assert pair.point_ids == ("0", "12")
    assert pair.target_box == (2, 3, 24, 18)
    assert pair.attributes == {"viewpoint_variation": 1, "scale_variation": 2, "truncation": 3, "occlusion": 0}
    assert sample.source_image.shape == (40, 25, 3)
    assert sample.target_image.shape == (20, 30, 3)
    assert dataset.image_ids == ("cat/a", "cat/b")
    part = dataset.head(1)
    assert (len(part), len(part.pairs)) == (1, 1)
    assert part.fingerprint() != dataset.fingerprint()
    assert pickle.loads(pickle.dumps(dataset)).fingerprint() == dataset.fingerprint()


def test_spair_defects_are_named(spair: Path) -> None:
    base = spair / "spair71k" / "SPair-71k"
    dataset = load_pairs("spair71k", "val", root=spair)
    save(base / "JPEGImages" / "cat" / "a.jpg", image_of(0, (10, 15)))
    with pytest.raises(BadInputError, match=r"a\.jpg is 15x10 pixels, but its annotations are for 30x20"):
        dataset[0]
    (base / "JPEGImages" / "cat" / "b.jpg").unlink()
    with pytest.raises(MissingError, match=r"b\.jpg"):
        dataset[0]
    with pytest.raises(MissingError, match=r"b\.jpg"):
        dataset.fingerprint()
    annotation = base / "PairAnnotation" / "val" / f"{PAIRS[0]}.json"
    raw = json.loads(annotation.read_text())
    annotation.write_text(json.dumps(raw | {"trg_kps": [[1, 2]]}))
    with pytest.raises(BadInputError, match="2 source points, 1 target points"):
        load_pairs("spair71k", "val", root=spair)
    annotation.write_text("{")
    with pytest.raises(BadInputError, match=r"cat\.json is not a pair annotation of SPair-71k: JSONDecodeError"):
        load_pairs("spair71k", "val", root=spair)
    annotation.rename(annotation.with_name(annotation.name.replace(":", "_")))
    with pytest.raises(MissingError, match="the ':' in file names was replaced"):
        load_pairs("spair71k", "val", root=spair)
    assert any(f.level == "error" and "':'" in f.text for f in check_dataset("spair71k", spair))
    annotation.with_name(annotation.name.replace(":", "_")).unlink()
    with pytest.raises(MissingError, match=r"val\.txt names it"):
        load_pairs("spair71k", "val", root=spair)


def test_check_finds_points_outside(spair: Path) -> None:
    annotation = spair / "spair71k" / "SPair-71k" / "PairAnnotation" / "val" / f"{PAIRS[0]}.json"
    raw = json.loads(annotation.read_text())
    annotation.write_text(json.dumps(raw | {"trg_kps": [[1, 2], [300, 3]]}))
    errors = [f for f in check_dataset("spair71k", spair) if f.level == "error"]
    assert len(errors) == 1
    assert PAIRS[0] in errors[0].text


def test_check_reports_progress_counts_and_fractions(camvid: Path) -> None:
    calls = []

    def progress(items: Sequence[Any], desc: str) -> Sequence[Any]:
        calls.append((desc, len(items)))
        return items

    findings = check_dataset("camvid", camvid, progress=progress)
    assert calls == [("camvid train", 2)]
    assert not [f for f in findings if f.level == "error"]
    (values,) = [f.values for f in findings if f.values]
    assert values["Bicyclist"] == values["void"] == 0.5
    assert {f.split for f in findings if "split list" in f.text} == {"val", "test"}
    assert any("2 of the 367" in f.text for f in findings)


def test_listing_reads_no_image(voc: Path) -> None:
    for file in voc.rglob("*.jpg"):
        file.write_bytes(b"")
    rows = {row.name: row for row in describe_datasets(voc)}
    assert set(rows) >= {"shapes", "shapes_pairs", "camvid", "voc2012", "spair71k"}
    assert rows["voc2012"].present == ("val",)
    assert rows["shapes"].present == ("train", "val")
    assert not rows["camvid"].present
    assert rows["spair71k"].kind == "pairs"
    assert rows["spair71k"].expected["test"] == 12234
    assert set(rows) == set(list_datasets())


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, neco_bench.data as d, neco_bench.data.integrity as i; i.describe_datasets(); "
        "bad = {'torch', 'cv2', 'faiss'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
