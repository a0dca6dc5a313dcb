"""`data prepare`: archives, SBD, panoptic maps. Originals stay, interruptions do no harm, bad archives are refused."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import stat
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from scipy.io import loadmat, savemat

from neco_bench.cli.app import main
from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, UsageError
from neco_bench.data.nyuv2 import frames
from neco_bench.data.prepare import prepare, unpack
from tests.data.data_helpers import image_of, save
from tests.typed import load_folder, load_segmentation, present, samples


def digests(folder: Path) -> dict[Path, str]:
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def voc_and_sbd(voc: Path) -> tuple[Path, Path, Path]:
    """VOC with one train image beside the three of val; SBD with that one, one of val, and two of its own."""
    base = voc / "voc2012" / "VOCdevkit" / "VOC2012"
    save(base / "JPEGImages" / "2008_000009.jpg", image_of(9))
    save(base / "SegmentationClass" / "2008_000009.png", np.tile(np.array([3, 255], np.uint8), (20, 15)))
    (base / "ImageSets" / "Segmentation" / "train.txt").write_text("2008_000009\n")
    classes = voc / "benchmark_RELEASE" / "dataset" / "cls"
    classes.mkdir(parents=True)
    names = ("2008_000009", "2007_000001", "2010_000001", "2010_000002")
    for i, name in enumerate(names):
        save(base / "JPEGImages" / f"{name}.jpg", image_of(i))
        savemat(classes / f"{name}.mat", {"GTcls": {"Segmentation": np.full((20, 30), 10 + i, np.uint8)}})
    (classes.parent / "train.txt").write_text("\n".join(names))
    return voc, base, classes.parent.parent


@pytest.mark.parametrize("packed", [False, True])
def test_voc_sbd(voc_and_sbd: tuple[Path, Path, Path], tmp_path: Path, packed: bool) -> None:
    root, base, source = voc_and_sbd
    before = digests(root)
    if packed:
        with tarfile.open(tmp_path / "benchmark.tgz", "w:gz") as tar:
            tar.add(source, "benchmark_RELEASE")
    given = tmp_path / "benchmark.tgz" if packed else source
    made = prepare("voc_sbd", root, source=given)
    assert made[-2].written == 3
    assert "3 images, the whole set has 10582" in made[-2].note
    dataset = load_segmentation("voc2012", "trainaug", root=root)
    assert dataset.ids == ("2008_000009", "2010_000001", "2010_000002")  # no image of val
    assert set(dataset[0].mask.ravel()) == {3, 255}  # VOC's own mask, not SBD's
    assert [int(dataset[i].mask[0, 0]) for i in (1, 2)] == [12, 13]
    stored = Image.open(base / "SegmentationClassAug" / "2010_000001.png")
    assert stored.mode == "P"
    assert present(stored.getpalette())[3:6] == [128, 0, 0]
    after = digests(root)
    assert before.items() <= after.items()
    again = prepare("voc_sbd", root, source=given)
    assert [row.written for row in again] == [0] * len(again)
    assert digests(root) == after


def test_voc_sbd_goes_on_after_an_interruption(voc_and_sbd: tuple[Path, Path, Path]) -> None:
    root, base, source = voc_and_sbd

    def interrupted(items: Sequence[Any], desc: str) -> Iterator[Any]:
        yield from list(items)[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("voc_sbd", root, source=source, progress=interrupted)
    with pytest.raises(MissingError, match="prepare voc_sbd"):
        load_segmentation("voc2012", "trainaug", root=root)
    assert prepare("voc_sbd", root, source=source)[0].written == 1
    assert len(load_segmentation("voc2012", "trainaug", root=root)) == 3
    assert not list(base.glob("*.partial"))
    (base / "SegmentationClassAug" / "2010_000001.png").unlink()
    with pytest.raises(UsageError, match=r"lacks 1 of 3 files; the first is 2010_000001\.png"):
        prepare("voc_sbd", root, source=source)


def test_voc_sbd_defects(voc_and_sbd: tuple[Path, Path, Path], tmp_path: Path) -> None:
    root, _, source = voc_and_sbd
    (tmp_path / "file").touch()
    with pytest.raises(NecoBenchError, match="Cannot write below"):
        prepare("ade20k", tmp_path / "file", source=packed_one(tmp_path))
    with pytest.raises(UsageError, match="needs --source"):
        prepare("voc_sbd", root)
    with pytest.raises(MissingError, match=r"No SBD below"):
        prepare("voc_sbd", root, source=root / "voc2012")
    with pytest.raises(MissingError, match="given as --source"):
        prepare("voc_sbd", root, source=root / "nothing")
    (source / "dataset" / "cls" / "2010_000001.mat").unlink()
    with pytest.raises(MissingError, match=r"2010_000001\.mat: SBD was unpacked only in part"):
        prepare("voc_sbd", root, source=source)
    savemat(source / "dataset" / "cls" / "2010_000001.mat", {"GTinst": 1})
    with pytest.raises(BadInputError, match=r"2010_000001\.mat is no readable class file of SBD"):
        prepare("voc_sbd", root, source=source)


def test_coco_panoptic(samples: Path, tmp_path: Path) -> None:
    sample, coco = samples / "coco_panoptic_sample", tmp_path / "coco"
    shutil.copytree(sample / "input_images", coco / "val2017")
    (coco / "annotations").mkdir()
    shutil.copy(sample / "panoptic_examples.json", coco / "annotations" / "panoptic_val2017.json")
    with pytest.raises(MissingError, match="No panoptic annotation"):
        prepare("coco_panoptic", tmp_path)
    with zipfile.ZipFile(coco / "annotations" / "panoptic_val2017.zip", "w") as file:
        for path in sorted((sample / "panoptic_examples").iterdir()):
            file.write(path, f"panoptic_val2017/{path.name}")
        file.writestr("__MACOSX/panoptic_val2017/._x.png", "junk")
    before = digests(tmp_path)
    assert [row.written for row in prepare("coco_panoptic", tmp_path)] == [2, 2]
    assert before.items() <= digests(tmp_path).items()
    made = load_folder("coco_things", "val", root=tmp_path)
    assert made.source == "panoptic_semantic"
    shutil.move(coco / "annotations" / "panoptic_annotations", tmp_path / "away")
    direct = load_folder("coco_things", "val", root=tmp_path)
    assert direct.source == "panoptic"
    assert all(np.array_equal(made_mask, direct[i].mask) for i, made_mask in enumerate(masks_of(tmp_path, coco)))


def masks_of(root: Path, coco: Path) -> list[np.ndarray]:
    shutil.copytree(root / "away", coco / "annotations" / "panoptic_annotations")
    return [sample.mask for sample in samples(load_segmentation("coco_things", "val", root=root))]


@pytest.mark.parametrize(
    "segments", [[{"id": 1}], [{"category_id": 1}], [1.5], 1.5, None, [{"id": None, "category_id": 1}]]
)
def test_panoptic_segments_of_another_form(tmp_path: Path, segments: object) -> None:
    annotations = tmp_path / "coco" / "annotations"
    (annotations / "panoptic_val2017").mkdir(parents=True)
    Image.new("RGB", (4, 3)).save(annotations / "panoptic_val2017" / "000000000139.png")
    item = {"image_id": 139, "file_name": "000000000139.png"}
    rows = [{**item, "segments_info": segments}]
    (annotations / "panoptic_val2017.json").write_text(
        json.dumps({"images": [{"id": 139, "file_name": "000000000139.jpg"}], "annotations": rows, "categories": []})
    )
    with pytest.raises(BadInputError, match=r"000000000139\.png of .* cannot be created from its source"):
        prepare("coco_panoptic", tmp_path)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_unpacking(tmp_path: Path, kind: str) -> None:
    content = {"ADEChallengeData2016/images/a.jpg": b"12345", "ADEChallengeData2016/b:c.txt": b"6"}
    archive = tmp_path / f"set.{kind}"
    pack(archive, content)
    folder = tmp_path / "root" / "ade20k"
    assert prepare("ade20k", tmp_path / "root", source=archive)[0].written == 2
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == content
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    assert prepare("ade20k_151", tmp_path / "root", source=archive)[0].written == 0
    (folder / "ADEChallengeData2016/images/a.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"a\.jpg already exists and differs"):
        unpack(archive, folder)
    assert (folder / "ADEChallengeData2016/images/a.jpg").read_bytes() == b"mine"
    prepare("coco_stuff", tmp_path / "root", source=archive, into="stuffthingmaps")
    assert (tmp_path / "root/coco/stuffthingmaps/ADEChallengeData2016/images/a.jpg").is_file()


def packed_one(folder: Path) -> Path:
    pack(folder / "one.zip", {"a": b"1"})
    return folder / "one.zip"


def pack(archive: Path, content: Any) -> None:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for name, data in content.items():
                file.writestr(name, data)
    else:
        with tarfile.open(archive, "w:gz") as tar:
            for name, data in content.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "C:/evil", "a\\..\\evil"])
def test_paths_out_of_the_folder_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    pack(tmp_path / f"set.{kind}", {"fine": b"1", name: b"2"})
    with pytest.raises(BadInputError, match="not safe to unpack"):
        unpack(tmp_path / f"set.{kind}", tmp_path / "in" / "folder")
    assert not list(tmp_path.rglob("evil"))
    assert not (tmp_path / "in" / "folder" / "fine").exists()


def test_links_and_damage_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(info)
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as file:
        entry = zipfile.ZipInfo("link")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(entry, "/etc")
    for name in ("link.tar", "link.zip"):
        with pytest.raises(BadInputError, match="not safe to unpack"):
            unpack(tmp_path / name, tmp_path / "folder")
    for kind in ("tar.gz", "zip"):
        path = tmp_path / f"half.{kind}"
        pack(path, {"a": np.random.default_rng(0).bytes(50000), "b": b"1"})
        path.write_bytes(path.read_bytes()[:20000])
        with pytest.raises(BadInputError, match="damaged or was downloaded in part"):
            unpack(path, tmp_path / "folder")
        assert not (tmp_path / "folder" / "a").exists()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_no_part_of_a_tar_is_taken_for_the_whole(tmp_path: Path, mode: Literal["w", "w:gz", "w:xz", "w:bz2"]) -> None:
    """Cut anywhere, with a damaged header, or with a byte changed in what is compressed."""
    path, folder = tmp_path / "set.tar", tmp_path / "folder"
    content = np.random.default_rng(0).bytes(3000)
    with tarfile.open(path, mode, format=tarfile.USTAR_FORMAT) as tar:
        for i in range(6):
            info = tarfile.TarInfo(f"{i}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    whole = path.read_bytes()
    length = 6 * (512 + 3072) if mode == "w" else len(whole)
    cuts = [length * i // 40 for i in range(1, 40)] + ([512, 3584] if mode == "w" else [])
    changes = [3584 * 2 + 150] if mode == "w" else [len(whole) // 2, len(whole) - 6]
    damaged = [whole[:cut] for cut in cuts] + [whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :] for i in changes]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(BadInputError, match="damaged or was downloaded in part"):
            unpack(path, folder)
        assert not any((folder / f"{i}").exists() for i in range(6))
    path.write_bytes(whole)
    assert unpack(path, folder).written == 6


def test_of_equal_names_in_a_tar_the_last_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for content in (b"old", b"new"):
            info = tarfile.TarInfo("a")
            info.size = 3
            tar.addfile(info, io.BytesIO(content))
    unpack(tmp_path / "set.tar", tmp_path / "folder")
    assert (tmp_path / "folder" / "a").read_bytes() == b"new"


def test_the_option_is_named_where_into_leaves_the_folder(tmp_path: Path) -> None:
    for into in ("../x", "/abs"):
        with pytest.raises(UsageError, match="--into"):
            prepare("coco_stuff", tmp_path, source=packed_one(tmp_path), into=into)


def test_a_bad_mask_of_voc_is_named_as_such(voc_and_sbd: tuple[Path, Path, Path]) -> None:
    root, base, source = voc_and_sbd
    mask = base / "SegmentationClass" / "2008_000009.png"
    save(mask, image_of(9))
    with pytest.raises(BadInputError, match=r"2008_000009\.png is a colour mask"):
        prepare("voc_sbd", root, source=source)
    mask.unlink()
    with pytest.raises(MissingError, match=r"no mask .*2008_000009\.png"):
        prepare("voc_sbd", root, source=source)


def test_the_command(
    voc_and_sbd: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _, source = voc_and_sbd
    arguments = ["data", "prepare", "voc_sbd", "--source", str(source), "--data-root", str(root), "--json"]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert not exit_.value.code
    assert [row["written"] for row in json.loads(capsys.readouterr().out)] == [3, 1]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(SystemExit) as exit_:
        main(["data", "prepare", "ade20k", "--data-root", str(root)])
    assert exit_.value.code == 2


@pytest.fixture
def nyu_mat(tmp_path: Path) -> Path:
    """The first 12 frames of a nyu_depth_v2_labeled.mat: HDF5, arrays transposed, as MATLAB writes them."""
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    path = tmp_path / "nyu_depth_v2_labeled.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        images = file.create_dataset("images", (12, 3, 640, 480), np.uint8, chunks=(1, 3, 640, 480), compression=1)
        labels = file.create_dataset("labels", (12, 640, 480), np.uint16, chunks=(1, 640, 480), compression=1)
        for i in range(12):
            images[i, :, i, 2 * i] = rng.integers(1, 256, 3)
            labels[i, i, 2 * i] = 21 + i  # at x = i, y = 2 i
        file["depths"] = np.zeros((12, 2, 2), np.float32)
        names = file.create_dataset("names", (1, 894), h5py.ref_dtype)
        for i, name in enumerate(("book", "bottle")):
            file[f"#refs#/{i}"] = np.array([[ord(letter)] for letter in name], np.uint16)
            names[0, i] = file[f"#refs#/{i}"].ref
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Thu Aug 16 2012 HDF5 schema 1.00 .")
    return path


def test_nyuv2_from_its_official_file(nyu_mat: Path, tmp_path: Path, samples: Path) -> None:
    root = tmp_path / "root"
    before = digests(tmp_path)
    done = prepare("nyuv2", root, source=nyu_mat)
    assert [(row.path.rpartition("/")[2], row.written) for row in done] == [
        ("train_rgb", 9), ("train_labels_894", 9), ("test_rgb", 3), ("test_labels_894", 3)
    ]  # fmt: skip
    assert all(row.note == "12 frames, the whole set has 1449" for row in done)
    test, train = (load_segmentation("nyuv2", split, root=root) for split in ("test", "train"))
    assert test.ids == ("0001", "0002", "0009")
    assert train.ids[:3] == ("0003", "0004", "0005")
    splits = loadmat(samples / "nyuv2" / "splits.mat")
    for split, key in (("train", "trainNdxs"), ("test", "testNdxs")):
        assert frames(split) == splits[key].ravel().tolist()
    mapping = loadmat(samples / "nyuv2" / "classMapping40.mat")["mapClass"].ravel()
    sample = test[2]  # frame 9
    assert sample.image.shape == (480, 640, 3)
    assert np.argwhere(sample.image.any(axis=2)).tolist() == [[16, 8]]
    assert np.argwhere(sample.mask != 255).tolist() == [[16, 8]]
    assert sample.mask[16, 8] == mapping[29 - 1] - 1
    assert len(load_segmentation("nyuv2_13", "train", root=root)) == 9
    again = prepare("nyuv2_13", root, source=nyu_mat)
    assert [row.written for row in again] == [0] * 4
    assert before.items() <= digests(tmp_path).items()


def test_other_files_than_that_of_nyuv2(nyu_mat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import h5py

    with h5py.File(nyu_mat, "r+") as file:
        file["labels"][3, 5, 5] = 895
    with pytest.raises(BadInputError, match=r"labeled\.mat is not .*frame 0004 holds label 895"):
        prepare("nyuv2", tmp_path / "root", source=nyu_mat)
    with h5py.File(nyu_mat, "r+") as file:
        del file["labels"]
        file["labels"] = np.zeros((12, 640, 480), np.int32)
    with pytest.raises(BadInputError, match=r"holds images .* and labels \(12, 640, 480\) int32"):
        prepare("nyuv2", tmp_path / "root", source=nyu_mat)
    for content in (b"", b"<html>", nyu_mat.read_bytes()[:3000]):
        nyu_mat.write_bytes(content)
        with pytest.raises(BadInputError, match=r"labeled\.mat is not nyu_depth_v2_labeled\.mat: .* Download it again"):
            prepare("nyuv2", tmp_path / "root", source=nyu_mat)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UsageError, match=r"pip install 'neco-bench\[nyuv2\]'"):
        prepare("nyuv2", tmp_path / "root", source=nyu_mat)


@pytest.mark.parametrize("name", ["a\0b", "", "x" * 300])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str, kind: str) -> None:
    archive = tmp_path / f"set.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("fine", "1")
            other = zipfile.ZipInfo("other")
            other.filename = name
            file.writestr(other, "2")
    else:
        with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
            for entry in ("fine", name):
                info = tarfile.TarInfo("x")
                info.size, info.pax_headers = 1, {"path": entry}
                tar.addfile(info, io.BytesIO(b"1"))
    folder = tmp_path / "folder"
    with contextlib.suppress(BadInputError):  # some of these are read as other names
        unpack(archive, folder)
        assert {path.name for path in folder.rglob("*") if path.is_file()} <= {"fine", "x", "a"}
    assert not list(folder.glob(".*"))


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    pack(tmp_path / "set.zip", {"a": b"1", "a/b": b"2"})
    with pytest.raises(BadInputError, match=r"set\.zip cannot be unpacked here"):
        unpack(tmp_path / "set.zip", tmp_path / "folder")
    assert not list((tmp_path / "folder").iterdir())


def test_two_processes_do_not_write_into_each_others_files(tmp_path: Path) -> None:
    folder = tmp_path / "root" / "ade20k"
    archive = packed_one(tmp_path)
    staging = folder / ".one.zip.partial"
    staging.mkdir(parents=True)
    with FileLock(staging / ".neco-bench.lock"), pytest.raises(UsageError, match="Another process is writing"):
        prepare("ade20k", tmp_path / "root", source=archive)
    assert prepare("ade20k", tmp_path / "root", source=archive)[0].written == 1
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_a_killed_conversion_leaves_nothing_in_the_masks(voc_and_sbd: tuple[Path, Path, Path]) -> None:
    root, base, source = voc_and_sbd
    staging = base / "SegmentationClassAug.partial"
    staging.mkdir()
    for name in (".tmp", ".123.tmp", ".neco-bench.lock"):
        (staging / name).write_bytes(b"half")
    prepare("voc_sbd", root, source=source)
    assert not staging.exists()
    assert {path.suffix for path in (base / "SegmentationClassAug").iterdir()} == {".png"}
