"""Data sets with object boxes, on miniature copies in the official layout, and on wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neco_bench.core.errors import BadInputError, MissingError
from neco_bench.data.base import BoxDataset
from neco_bench.data.integrity import check_dataset
from neco_bench.data.load import load_dataset
from neco_bench.data.shapes import segmentation_scene

OBJECT = """<object><name>person</name><truncated>1</truncated><difficult>{hard}</difficult>
<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""


def picture(path: Path, size: tuple[int, int] = (60, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 60)).save(path)


def boxes_of(name: str, split: str, root: Path) -> BoxDataset:
    data = load_dataset(name, split, root=root)
    assert isinstance(data, BoxDataset)
    return data


@pytest.fixture(params=["2007", "2012"])
def voc(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    year = request.param
    folder = tmp_path / f"voc{year}" / "VOCdevkit" / f"VOC{year}"
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("000012\n000007\n")
    for name, objects in (("000012", [(1, 1, 60, 40)]), ("000007", [(3, 4, 10, 20), (11, 5, 12, 6)])):
        picture(folder / "JPEGImages" / f"{name}.jpg")
        texts = [OBJECT.format(*box, hard=i % 2) for i, box in enumerate(objects)]
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{''.join(texts)}</annotation>")
    return f"voc{year}_boxes", tmp_path, folder


def test_voc_boxes_are_half_open_and_all_objects_count(voc: tuple[str, Path, Path]) -> None:
    name, root, _ = voc
    data = boxes_of(name, "trainval", root)
    assert data.ids == ("000012", "000007")
    assert data[0].boxes.tolist() == [[0, 0, 60, 40]]  # the whole image
    assert data.boxes("000007").tolist() == [[2, 3, 10, 20], [10, 4, 12, 6]]  # a difficult one too, and no part
    assert data[1].image.shape == (40, 60, 3)
    assert data.coverage == {"found": 2, "expected": {"voc2007_boxes": 5011, "voc2012_boxes": 11540}[name]}
    levels = [finding.level for finding in check_dataset(name, root)]
    assert "error" not in levels
    assert "warning" in levels  # two of all images


def test_wrong_voc_annotations(voc: tuple[str, Path, Path]) -> None:
    name, root, folder = voc
    before = boxes_of(name, "trainval", root).fingerprint()
    path = folder / "Annotations" / "000012.xml"
    for text in ("<annotation><object>", OBJECT.format(5, 5, 4, 9, hard=0), OBJECT.format("a", 5, 9, 9, hard=0)):
        path.write_text(text)
        with pytest.raises(BadInputError, match=r"000012\.xml"):
            boxes_of(name, "trainval", root).boxes("000012")
    assert boxes_of(name, "trainval", root).fingerprint() != before
    assert any("000012" in f.text for f in check_dataset(name, root) if f.level == "error")
    path.unlink()
    with pytest.raises(MissingError, match=r"000012\.xml"):
        boxes_of(name, "trainval", root).boxes("000012")
    path.write_text(f"<annotation>{OBJECT.format(1, 1, 90, 90, hard=0)}</annotation>")
    assert any("outside" in f.text for f in check_dataset(name, root) if f.level == "error")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    folder = tmp_path / "coco"
    names = [f"COCO_train2014_{number:012d}" for number in (9, 25, 30)]
    for name in names[:2]:
        picture(folder / "images" / "train2014" / f"{name}.jpg")
    (folder / "coco_20k_filenames.txt").write_text("".join(f"train2014/{name}.jpg\n" for name in names[:2]))
    boxes = [(25, 0, [1.5, 2.25, 10, 20.5]), (25, 1, [0, 0, 60, 40]), (9, 1, [0, 0, 5, 5]), (30, 0, [0, 0, 5, 5])]
    document = {
        "images": [{"id": int(name[-12:]), "file_name": f"{name}.jpg"} for name in names],
        "annotations": [{"image_id": i, "iscrowd": crowd, "bbox": box} for i, crowd, box in boxes],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_train2014.json").write_text(json.dumps(document))
    return tmp_path


def test_coco20k_reads_its_list_and_leaves_crowds_out(coco: Path) -> None:
    data = boxes_of("coco20k", "train", coco)
    assert data.ids == ("COCO_train2014_000000000009", "COCO_train2014_000000000025")
    assert data[1].boxes.tolist() == [[1.5, 2.25, 11.5, 22.75]]
    assert data[0].boxes.shape == (0, 4)  # crowds alone
    assert data.coverage == {"found": 2, "expected": 19817}
    assert any("no object" in finding.text for finding in check_dataset("coco20k", coco))


def test_the_line_of_the_official_list_has_42_bytes() -> None:
    """Its 19,817 lines are then the 832,314 bytes that the file has in the repository of TokenCut."""
    assert len("train2014/COCO_train2014_000000429991.jpg\n") * 19817 == 832314


def test_wrong_coco20k_lists(coco: Path) -> None:
    path = coco / "coco" / "coco_20k_filenames.txt"
    path.write_text("train2014/COCO_train2014_000000000031.jpg\n")
    with pytest.raises(MissingError, match="000000000031"):
        boxes_of("coco20k", "train", coco).boxes("COCO_train2014_000000000031")
    path.write_text("train2017/000000000009.jpg\n")
    with pytest.raises(BadInputError, match="lines look like train2014/COCO_train2014_"):
        boxes_of("coco20k", "train", coco)
    path.unlink()
    with pytest.raises(MissingError, match="coco_20k_filenames"):
        boxes_of("coco20k", "train", coco)


def test_boxes_of_shapes_hold_what_is_visible() -> None:
    data = load_dataset("shapes_boxes", "val", limit=6)
    assert isinstance(data, BoxDataset)
    for index, name in enumerate(data.ids):
        owner = segmentation_scene("val", index).owner
        boxes = data.boxes(name)
        assert len(boxes) == len(np.unique(owner)) - 1
        for number, (x1, y1, x2, y2) in zip(np.unique(owner)[1:], boxes.astype(int), strict=True):
            inside = owner == number
            assert inside[y1:y2, x1:x2].sum() == inside.sum()
            for edge in (inside[y1, x1:x2], inside[y2 - 1, x1:x2], inside[y1:y2, x1], inside[y1:y2, x2 - 1]):
                assert edge.any()
    assert data.fingerprint() == load_dataset("shapes_boxes", "val", limit=6).fingerprint()
    assert data.fingerprint() != load_dataset("shapes_boxes", "val", limit=5).fingerprint()
