"""Whatever a file holds, its reader gives BadInputError with its name, and no other exception."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from neco_bench.core.errors import BadInputError, NecoBenchError
from neco_bench.data.base import PairDataset, SegmentationDataset
from neco_bench.data.coco import instance_categories
from neco_bench.data.integrity import check_dataset, describe_datasets
from neco_bench.data.io import decoding, read_image, read_mat
from neco_bench.data.load import DATASETS, load_dataset
from tests.data.data_helpers import image_of, save
from tests.typed import load_pairs, load_segmentation

HUGE = "9" * 5000  # Python refuses to convert it
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 64,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\x89PNG\r\n\x1a\n",
        b"II*\0\x08\0\0\0\xff\xff",
    ],
)
def test_images_of_no_known_kind(tmp_path: Path, content: Any) -> None:
    """PostScript would be handed to another program."""
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(BadInputError, match=r"Cannot decode image .*x\.jpg"):
        read_image(tmp_path / "x.jpg")


def test_a_folder_and_an_unreadable_file_are_not_called_truncated(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").mkdir()
    with pytest.raises(BadInputError, match=r"x\.jpg: IsADirectoryError: Is a directory\. Make it readable"):
        read_image(tmp_path / "x.jpg")


def instances(root: Path) -> Path:
    save(root / "coco" / "images" / "val2017" / "1.jpg", image_of(0))
    item = {"id": 1, "image_id": 7, "category_id": 1, "area": 3, "iscrowd": 0, "segmentation": [[1, 1, 9, 1, 9, 9]]}
    raw = {"images": [{"id": 7, "file_name": "1.jpg"}], "annotations": [item]}
    (root / "coco" / "annotations").mkdir()
    path = root / "coco" / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"1.jpg"', '"\\ud800.jpg"'),
        ('"1.jpg"', "3"),
        ('"id": 7', '"id": [7]'),
        ('"image_id": 7', f'"image_id": {HUGE}'),
        ('"category_id": 1', '"category_id": 1e99'),
        ('"category_id": 1', '"category_id": 300'),
        ('"area": 3', '"area": "x"'),
        ("[[1, 1, 9, 1, 9, 9]]", '{"counts": [1, 99999], "size": [20, 30]}'),
        ("[[1, 1, 9, 1, 9, 9]]", '{"counts": "zzzzzzzz", "size": [20, 30]}'),
        ("[[1, 1, 9, 1, 9, 9]]", '{"counts": "0", "size": [99999999, 99999999]}'),
        ("[[1, 1, 9, 1, 9, 9]]", "[[NaN, 1, 9, 1, 9, 9]]"),
        ('{"images"', DEEP),
    ],
)
def test_coco_annotations(tmp_path: Path, old: str, new: str) -> None:
    path = instances(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(BadInputError, match=path.name):
        load_segmentation("coco_things", "val", root=tmp_path)[0]


def test_compressed_runs_are_those_of_pycocotools() -> None:
    from pycocotools import mask as rle

    for seed in range(20):
        mask = np.random.default_rng(seed).random((17, 23)) < (0.02, 0.5, 0.98)[seed % 3]
        encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
        found = instance_categories(
            [{"id": 1, "area": 1, "category_id": 5, "segmentation": {**encoded, "counts": encoded["counts"].decode()}}],
            (17, 23),
        )
        assert np.array_equal(found, 5 * mask)


@pytest.mark.parametrize("content", [DEEP, HUGE, '{"category": ' + HUGE, "\ufeff{}", "null", '{"category": "\\ud800"}'])
def test_pair_annotations(spair: Path, content: Any) -> None:
    path = next((spair / "spair71k").rglob("PairAnnotation/val/*.json"))
    path.write_text(content)
    with pytest.raises(BadInputError, match=rf"{path.name} is not a pair annotation"):
        load_pairs("spair71k", "val", root=spair)
    assert next(row for row in describe_datasets(spair) if row.name == "spair71k").present in ((), ("val",))


@pytest.mark.parametrize(
    "variables",
    [
        {"kps": "text", "bbox": [1, 2, 9, 9]},
        {"kps": np.ones((3, 2)), "bbox": [1, 2, np.nan, 9]},
        {"kps": np.ones((3, 2)), "bbox": [9, 2, 1, 9]},
        {"kps": np.full((3, 2), np.inf), "bbox": [1, 2, 9, 9]},
        {"kps": np.array([{"a": 1}], object), "bbox": [1, 2, 9, 9]},
        {"bbox": [1, 2, 9, 9]},
    ],
)
def test_annotations_of_pf_pascal(tmp_path: Path, variables: dict[str, Any]) -> None:
    base = tmp_path / "pf_pascal"
    (base / "Annotations" / "cat").mkdir(parents=True)
    for name in "ab":
        savemat(base / "Annotations" / "cat" / f"{name}.mat", variables)
    (base / "test_pairs.csv").write_text("source_image,target_image,class\na.jpg,b.jpg,8\n")
    with pytest.raises(BadInputError, match=r"cat/a\.mat is no readable annotation of PF-PASCAL"):
        load_pairs("pf_pascal", "test", root=tmp_path)


@pytest.mark.parametrize(
    "row", ["a.jpg,b.jpg,0", "a.jpg,b.jpg,-1", "a.jpg,b.jpg,x", "a.jpg", ",b.jpg,3", "a\0.jpg,b,8"]
)
def test_pair_lists(tmp_path: Path, row: str) -> None:
    (tmp_path / "pf_pascal").mkdir()
    (tmp_path / "pf_pascal" / "test_pairs.csv").write_text(f"source_image,target_image,class\n{row}\n")
    with pytest.raises(BadInputError, match=r"test_pairs\.csv"):
        load_pairs("pf_pascal", "test", root=tmp_path)


def test_mutated_files(voc: Path, camvid: Path, spair: Path) -> None:
    """120 seeded changes of bytes in every file of three sets. All of them share one root."""
    rng = random.Random(0)
    files = sorted(path for path in voc.rglob("*") if path.is_file())
    sets = {"voc2012": "val", "camvid": "train", "spair71k": "val"}
    for _ in range(120):
        path = rng.choice(files)
        whole = path.read_bytes()
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            changed[rng.randrange(len(changed))] = rng.choice((0, 255, 0xED, 0xA0, rng.randrange(256)))
        path.write_bytes(bytes(changed[: rng.choice((len(changed), rng.randrange(len(changed)) + 1))]))
        name = path.relative_to(voc).parts[0]
        with contextlib.suppress(NecoBenchError):
            dataset = load_dataset(name, sets[name], root=voc)
            dataset.fingerprint()
            assert isinstance(dataset, (PairDataset, SegmentationDataset))
            for index in range(len(dataset)):
                _ = dataset.mask(index) if isinstance(dataset, SegmentationDataset) else dataset[index]
        path.write_bytes(whole)


def test_a_reader_of_another_package_that_fails_is_named(voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = DATASETS.load("voc2012")

    def fail(self: Any, folder: Path, split: str) -> NoReturn:
        raise TypeError("my own mistake")

    monkeypatch.setattr(cls, "__init__", fail)
    with pytest.raises(BadInputError, match=r"'voc2012' in .* cannot be read: TypeError: my own mistake"):
        load_segmentation("voc2012", "val", root=voc)
    assert "my own mistake" in check_dataset("voc2012", voc)[0].text
    assert "my own mistake" in next(row.problem for row in describe_datasets(voc) if row.name == "voc2012")


def test_interruptions_pass_the_boundary() -> None:
    with pytest.raises(KeyboardInterrupt), decoding("x"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("compressed", [False, True])
def test_matlab_files_with_changed_bytes(tmp_path: Path, compressed: bool) -> None:
    """Some of them end the process, or take minutes, in SciPy."""
    path = tmp_path / "x.mat"
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    variables = {"GTcls": {"Segmentation": mask, "text": "ab", "cell": np.array([1, "x"], object)}}
    savemat(path, variables, do_compression=compressed)
    whole = path.read_bytes()
    assert np.array_equal(read_mat(path, lambda found: found["GTcls"]["Segmentation"]), mask)
    for place in range(124, len(whole), 7 if compressed else 3):
        for value in (0, 187, 255):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with contextlib.suppress(BadInputError):
                read_mat(path, lambda found: None)


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_of_matlab_files_are_those_that_scipy_reads(tmp_path: Path, samples: Path, compressed: bool) -> None:
    rng = np.random.default_rng(0)
    types = ("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")
    written: dict[str, Any] = {f"a_{name}": (100 * rng.random((3, 4, 2))).astype(name) for name in types} | {
        "n": np.array([[1.0, np.nan]]),
        "text": "abc",
        "deep": {"x": {"y": np.eye(3)}, "a_longer_name": np.ones((2, 2), np.uint8), "z": np.array([1, "x"], object)},
    }
    savemat(tmp_path / "x.mat", written, do_compression=compressed)
    found = read_mat(tmp_path / "x.mat", dict)
    for name in (*(f"a_{name}" for name in types), "n"):
        assert found[name].dtype == written[name].dtype
        assert np.array_equal(found[name], written[name], equal_nan=True)
    assert np.array_equal(found["deep"]["x"]["y"], np.eye(3))
    assert np.array_equal(found["deep"]["a_longer_name"], np.ones((2, 2)))
    for path in sorted((samples / "pf_willow").rglob("*.mat"))[::10]:
        assert np.array_equal(read_mat(path, dict)["pts_coord"], loadmat(path)["pts_coord"])
