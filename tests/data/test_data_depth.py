"""Depth and normals: miniature copies in the official layouts, what is read from them, and wrong copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from neco_bench.core.errors import BadInputError, MissingError
from neco_bench.core.sampling import Sampling
from neco_bench.data.dense import DenseDataset
from neco_bench.data.integrity import check_dataset
from neco_bench.data.load import load_dataset
from neco_bench.data.prepare import prepare
from neco_bench.data.shapes import shapes_folder
from neco_bench.data.shapes_geometry import FOCAL, SIZE, geometry_scene
from tests.command import neco
from tests.data.data_helpers import image_of, save

NYU = (480, 640)
FRAMES = {"train": ("0003", "0004", "0005", "0006"), "test": ("0001", "0002", "0009", "0014")}
DRIVES = {"train": "2011_09_26_drive_0001_sync", "test": "2011_09_26_drive_0002_sync"}
KITTI = (375, 1242)


def dense(name: str, split: str, root: Path | None = None) -> DenseDataset:
    dataset = load_dataset(name, split, root=root)
    assert isinstance(dataset, DenseDataset)
    return dataset


def depth_of(seed: int, size: tuple[int, int], low: int = 1500, high: int = 3500) -> np.ndarray:
    """A slope from `low` to `high`, five rows without depth; quick to compress."""
    values = np.tile(np.linspace(low, high, size[1]).astype(np.uint16) // 8 * 8 + np.uint16(seed), (size[0], 1))
    values[:5] = 0
    return values


def flat_image(seed: int, size: tuple[int, int]) -> np.ndarray:
    return np.full((*size, 3), (seed, 50, 99), np.uint8)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A root with four training and four test frames of NYUv2, with depth and normals."""
    for split, names in FRAMES.items():
        for i, name in enumerate(names):
            save(tmp_path / f"nyuv2/{split}_rgb/{name}.png", flat_image(i, NYU))
            save(tmp_path / f"nyuv2/{split}_depth/{name}.png", depth_of(i, NYU))
            normals = np.full((*NYU, 3), (128, 128, 0), np.uint8)
            normals[:, :9] = 128
            save(tmp_path / f"nyuv2/{split}_normals/{name}.png", normals)
    return tmp_path


@pytest.fixture
def kitti(tmp_path: Path) -> Path:
    """A root with four images of a training and of a test drive of KITTI; one of the test list has no depth."""
    base = tmp_path / "kitti_depth"
    for split, drive in DRIVES.items():
        lines = []
        for i in range(4):
            image = f"2011_09_26/{drive}/image_02/data/{i:010d}.png"
            depth = f"{drive}/proj_depth/groundtruth/image_02/{i:010d}.png"
            save(base / "input" / image, flat_image(i, KITTI))
            save(base / "gt_depth" / depth, depth_of(i, KITTI, 10 * 256, 20 * 256))
            lines.append(f"{image} {depth} 721.5377")
        if split == "test":
            lines.append(f"2011_09_26/{drive}/image_02/data/0000000009.png None 721.5377")
        (base / f"kitti_eigen_{split}.txt").write_text("\n".join(lines[::-1]))
    return tmp_path


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A root with BTS's layout of NYU: four frames of a training scene, four official test frames."""
    base = tmp_path / "nyu_depth"
    for split, folder, numbers in (("train", "kitchen_0028b", range(4)), ("test", "kitchen", (0, 1, 8, 13))):
        lines = []
        for i in numbers:
            place = base / ("sync" if split == "train" else "official_splits/test") / folder
            save(place / f"rgb_{i:05d}.jpg", flat_image(i, NYU))
            save(place / f"sync_depth_{i:05d}.png", depth_of(i, NYU))
            lines.append(f"/{folder}/rgb_{i:05d}.jpg /{folder}/sync_depth_{i:05d}.png 518.8579")
        (base / f"nyu_{split}.txt").write_text("\n".join(lines))
    return tmp_path


def test_labelled_frames(labelled: Path) -> None:
    test = dense("nyu_depth_labelled", "test", root=labelled)
    assert (test.ids, test.coverage) == (FRAMES["test"], {"found": 4, "expected": 654})
    sample = test[1]
    assert sample.target.dtype == np.float32
    assert np.array_equal(sample.target, depth_of(1, NYU).astype(np.float32) / 1000)
    assert test.sample_sanity_check() == []
    groups = [test.group_of(item) for item in test.ids]
    assert groups == ["1", "1", "9", "14"]  # runs of frames: what intervals are drawn from
    assert Sampling.of(test.sampling_unit, groups).unit == "scene"
    normals = dense("nyu_normals_labelled", "test", root=labelled)[0].target
    assert np.allclose(np.linalg.norm(normals[5:, 9:], axis=2), 1)
    assert np.allclose(normals[5:, 9:], [0.004, 0.004, -1], atol=1e-3)
    assert not normals[:5].any()  # where the sensor has no depth
    assert not normals[:, :9].any()  # grey


def test_lists_of_bts(listed: Path) -> None:
    train, test = (dense("nyu_depth", split, root=listed) for split in ("train", "test"))
    assert train.ids == tuple(f"kitchen_0028b/rgb_{i:05d}" for i in range(4))
    assert np.array_equal(test[2].target, depth_of(8, NYU).astype(np.float32) / 1000)
    assert {train.group_of(item) for item in train.ids} == {"kitchen_0028b"}
    assert [test.group_of(item) for item in test.ids] == ["1", "1", "9", "14"]  # numbered from 0


def test_kitti(kitti: Path) -> None:
    train, test = (dense("kitti_depth", split, root=kitti) for split in ("train", "test"))
    assert (len(train), len(test)) == (4, 4)  # "None" is left out
    assert list(test.ids) == sorted(test.ids)
    assert np.array_equal(test[3].target, depth_of(3, KITTI, 2560, 5120).astype(np.float32) / 256)
    assert {test.group_of(item) for item in test.ids} == {"2011_09_26_drive_0002"}
    assert test.sampling_unit == "drive"
    base = kitti / "kitti_depth"
    (base / "gt_depth" / "val").mkdir()
    shutil.move(base / "gt_depth" / DRIVES["test"], base / "gt_depth" / "val" / DRIVES["test"])  # as the archive has it
    for path in list((base / "input").rglob("*.png")):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    assert dense("kitti_depth", "test", root=kitti)[0].image.shape == (*KITTI, 3)


def test_geonet(labelled: Path) -> None:
    base = labelled / "nyu_geonet"
    base.mkdir()
    means = 2 * np.array([122.175, 116.169, 103.508])
    image, normals = image_of(3, (481, 641)), np.zeros((481, 641, 3), np.float32)
    normals[..., 2] = -1
    depth = np.ones((481, 641), np.float32)
    depth[0] = 0
    for name in ("a-1", "b-2"):
        savemat(base / f"{name}.mat", {"img": (image - means).astype(np.float32), "depth": depth, "norm": normals})
    train, test = (dense("nyu_normals", split, root=labelled) for split in ("train", "test"))
    assert train.ids == ("a-1", "b-2")
    assert np.abs(train[0].image.astype(int) - image[:480, :640]).max() <= 1  # cut down from float32
    assert not train[0].target[0].any()
    assert np.array_equal(train[0].target[1, 1], [0, 0, -1])
    assert len(test.head(2)) == 2
    assert test.head(2)[1].id == "0002"
    assert test.fingerprint() != test.head(2).fingerprint()
    (base / "a-1.mat").write_bytes(b"no MATLAB file")
    with pytest.raises(BadInputError, match=r"a-1\.mat is no readable file of GeoNet's release"):
        train[0]


def change_depth(root: Path, pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in root.glob(pattern):
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("nyu_depth_labelled", "nyuv2/test_depth/*.png"), ("kitti_depth", "kitti_depth/gt_depth/**/*.png")],
)
def test_depth_in_another_unit(name: str, pattern: str, labelled: Path, kitti: Path) -> None:
    """Metres where millimetres are expected, millimetres where 256 to a metre are: one error that says so."""
    factor = 1 / 1000 if name == "nyu_depth_labelled" else 1000 / 256
    change_depth(labelled, pattern, lambda values: np.rint(values * factor).astype(np.uint16))
    (doubt,) = dense(name, "test", root=labelled).sample_sanity_check()
    assert "the files have another unit" in doubt
    findings = [row for row in check_dataset(name, labelled) if row.level == "error" and row.split == "test"]
    assert [row.text for row in findings] == [doubt]


def test_depth_read_with_8_bits(labelled: Path) -> None:
    """Saved with 8 bits, or reduced to 8 bits and saved with 16."""
    change_depth(labelled, "nyuv2/test_depth/0001.png", lambda values: (values >> 8).astype(np.uint8))
    with pytest.raises(BadInputError, match=r"0001\.png has pixel format L, but 16 bits are needed"):
        dense("nyu_depth_labelled", "test", root=labelled)[0]
    change_depth(labelled, "nyuv2/train_depth/*.png", lambda values: values & 255)
    (doubt,) = dense("nyu_depth_labelled", "train", root=labelled).sample_sanity_check()
    assert "reduced to 8 bits" in doubt


def test_swapped_splits(labelled: Path, listed: Path, kitti: Path) -> None:
    for kind in ("rgb", "depth", "normals"):
        one, other = (labelled / "nyuv2" / f"{split}_{kind}" for split in ("train", "test"))
        one.rename(one.with_name("x"))
        other.rename(one)
        one.with_name("x").rename(other)
    for name in ("nyu_depth", "kitti_depth"):
        lists = sorted((labelled / name).glob("*.txt"))
        texts = [path.read_text() for path in lists]
        for path, text in zip(lists, texts[::-1], strict=True):
            path.write_text(text)
    for name in ("nyu_depth_labelled", "nyu_normals_labelled", "nyu_depth", "kitti_depth"):
        for split in ("train", "test"):
            with pytest.raises(BadInputError, match=r"were swapped"):
                dense(name, split, root=labelled)


def test_resized_frames(labelled: Path, kitti: Path) -> None:
    path = labelled / "nyuv2/test_rgb/0001.png"
    Image.open(path).resize((320, 240)).save(path)
    with pytest.raises(BadInputError, match=r"is 320x240 pixels .*but nyu_depth_labelled has 640x480"):
        dense("nyu_depth_labelled", "test", root=labelled)[0]
    path = labelled / "nyuv2/test_depth/0002.png"
    Image.open(path).resize((320, 240)).save(path)
    with pytest.raises(BadInputError, match=r"0002\.png is 320x240 pixels .* its image is 640x480"):
        dense("nyu_depth_labelled", "test", root=labelled)[1]
    path = next((kitti / "kitti_depth/input").rglob("*0002_sync/image_02/data/0000000000.png"))
    Image.open(path).resize((1216, 352)).save(path)
    with pytest.raises(BadInputError, match=r"1216x352 pixels"):
        dense("kitti_depth", "test", root=kitti)[0]


def test_files_without_partner_and_bad_lists(labelled: Path, kitti: Path) -> None:
    (labelled / "nyuv2/test_depth/0009.png").unlink()
    with pytest.raises(MissingError, match=r"1 of 4 images have no file in .*test_depth, the first is 0009\.png"):
        dense("nyu_depth_labelled", "test", root=labelled)
    shutil.rmtree(labelled / "nyuv2/train_rgb")
    with pytest.raises(MissingError, match=r"no images in .*train_rgb(.|\n)*data prepare nyuv2"):
        dense("nyu_depth_labelled", "train", root=labelled)
    next((kitti / "kitti_depth/gt_depth").rglob("*0002_sync/**/0000000003.png")).unlink()
    with pytest.raises(MissingError, match=r"no depth map .*0000000003\.png, which .*kitti_eigen_test\.txt names"):
        dense("kitti_depth", "test", root=kitti)[3]
    (kitti / "kitti_depth/kitti_eigen_test.txt").write_text("only_an_image.png\n")
    with pytest.raises(BadInputError, match=r"must list an image, its depth and the focal length"):
        dense("kitti_depth", "test", root=kitti)


def test_check_says_what_depth_there_is(labelled: Path) -> None:
    answer = neco("data", "check", "nyu_depth_labelled", "--data-root", labelled)
    assert answer.code == 0
    assert "frames of 640x480 pixels; 99.0 % of the pixels have depth" in answer.out
    assert "depth of 1.5 to 3.5 m, median 2.5 m" in answer.out
    answer = neco("data", "check", "nyu_normals_labelled", "--data-root", labelled)
    assert "mean normal (+0.00, +0.00, -1.00)" in answer.out


def test_the_official_file_of_nyuv2_gives_depth(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "nyu_depth_v2_labeled.mat"
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((3, 3, 640, 480), np.uint8)
        file["labels"] = np.zeros((3, 640, 480), np.uint16)
        raw = np.full((3, 640, 480), 2.5, np.float32)
        raw[:, 8, 16] = 0
        raw[0, 9, 17] = 9.9954
        file["rawDepths"] = raw
    done = prepare("nyu_depth_labelled", tmp_path / "root", source=path)
    assert {row.path.rpartition("/")[2]: row.written for row in done}["test_depth"] == 2
    depth = dense("nyu_depth_labelled", "test", root=tmp_path / "root")[0].target
    assert (depth[16, 8], depth[17, 9], depth[0, 0]) == (0, np.float32(9.995), 2.5)
    with h5py.File(path, "r+") as file:
        file["rawDepths"][1] *= 1000
    shutil.rmtree(tmp_path / "root")
    with pytest.raises(BadInputError, match=r"frame 0002 holds depths of 0 to 2500, not metres"):
        prepare("nyuv2", tmp_path / "root", source=path)


def test_archives_of_kitti_go_where_they_are_looked_for(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save(source / f"val/{DRIVES['test']}/proj_depth/groundtruth/image_02/0000000005.png", depth_of(0, KITTI))
    shutil.make_archive(str(tmp_path / "data_depth_annotated"), "zip", source)
    shutil.rmtree(source)
    save(source / f"2011_09_26/{DRIVES['test']}/image_02/data/0000000005.png", flat_image(0, KITTI))
    shutil.make_archive(str(tmp_path / "2011_09_26_drive_0002_sync"), "zip", source)
    for name in ("data_depth_annotated", "2011_09_26_drive_0002_sync"):
        prepare("kitti_depth", tmp_path / "root", source=tmp_path / f"{name}.zip")
    image = f"2011_09_26/{DRIVES['test']}/image_02/data/0000000005.png"
    depth = f"{DRIVES['test']}/proj_depth/groundtruth/image_02/0000000005.png"
    (tmp_path / "root/kitti_depth/kitti_eigen_test.txt").write_text(f"{image} {depth} 721.5377\n")
    assert dense("kitti_depth", "test", root=tmp_path / "root")[0].target.shape == KITTI


def test_the_real_sample(samples: Path) -> None:
    test = dense("nyu_depth_labelled", "test", root=samples)
    assert test.coverage == {"found": 10, "expected": 654}
    assert test.sample_sanity_check() == []
    assert test[0].target.min() == np.float32(1.798)
    assert test[0].target.max() == np.float32(3.615)


def test_the_geometry_of_rendered_scenes() -> None:
    """Normals are those of the surface through the depth of neighbouring pixels; a scene depends on its number."""
    scene = geometry_scene("val", 3)
    again, other = geometry_scene("val", 3), geometry_scene("val", 4)
    assert all(np.array_equal(getattr(scene, part), getattr(again, part)) for part in ("image", "depth", "normals"))
    assert not np.array_equal(scene.image, other.image)
    assert np.allclose(np.linalg.norm(scene.normals, axis=2), 1)
    at = (np.arange(SIZE) - (SIZE - 1) / 2) / FOCAL
    points = np.stack([at[None] * scene.depth, at[:, None] * scene.depth, scene.depth], 2)
    across, down = points[:, 2:] - points[:, :-2], points[2:] - points[:-2]
    found = np.cross(across[1:-1], down[:, 1:-1])
    found /= -np.linalg.norm(found, axis=2, keepdims=True)
    cosine = (found * scene.normals[1:-1, 1:-1]).sum(2)
    assert np.median(cosine) > 0.99999
    assert (cosine > 0.999).mean() > 0.85  # the others are edges, and balls and columns seen from the side


@pytest.mark.slow
def test_what_is_read_is_what_was_rendered_and_the_other_shapes_stay() -> None:
    depth, normals = (dense(name, "val") for name in ("shapes_depth", "shapes_normals"))
    scene = geometry_scene("val", 7)
    assert np.array_equal(depth[7].image, scene.image)
    assert np.abs(depth[7].target - scene.depth).max() < 0.0006
    assert (normals[7].target * scene.normals).sum(2).min() > 0.9999
    assert depth[7].image.shape == (SIZE, SIZE, 3)
    assert not any(path.name.startswith("geometry") for path in shapes_folder().iterdir())


def test_listing(labelled: Path) -> None:
    rows = {line.split()[0]: line for line in neco("data", "list", "--data-root", labelled).out.splitlines()}
    assert rows["nyu_depth_labelled"].split()[1:4] == ["depth", "train,", "test"]
    assert "train, test  neco-bench" in rows["nyu_depth_labelled"]
