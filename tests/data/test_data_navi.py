"""NAVI in its official layout, in miniature: prepared copies, the list of pairs and its hash, wrong copies."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neco_bench.core.errors import BadInputError
from neco_bench.data.integrity import check_dataset
from neco_bench.data.load import load_dataset
from neco_bench.data.navi import NAVI, copy_size, read_disparity
from neco_bench.data.prepare import prepare
from tests.command import neco

HEIGHT, WIDTH, VIEWS = 64, 80, 5


def write_object(base: Path, name: str, seed: int) -> None:
    """An in-the-wild collection of a disc half a metre away, and the annotations of another collection."""
    rng = np.random.default_rng(seed)
    facts = []
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    inside = np.hypot(y - 30, x - 42) < 20
    for number in range(VIEWS):
        folder = base / name / "wild_set"
        for kind in ("images", "depth"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        image = np.kron(rng.integers(0, 256, (8, 10, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{number:03d}.jpg", quality=95)
        disparity = np.where(inside, 65535 * 10 / 500, 0).astype(np.uint16)
        Image.fromarray(disparity).save(folder / "depth" / f"{number:03d}.png")
        angle = 0.4 * number
        facts.append(
            {
                "object_id": name,
                "filename": f"{number:03d}.jpg",
                "image_size": [HEIGHT, WIDTH],
                "scene_name": "wild_set",
                "split": "train",
                "camera": {"q": [np.cos(angle / 2), 0, np.sin(angle / 2), 0], "t": [1, 2, 500.0], "focal_length": 70.0},
            }
        )
    (base / name / "wild_set" / "annotations.json").write_text(json.dumps(facts))
    other = base / name / "multiview_00"
    other.mkdir()
    (other / "annotations.json").write_text("[]")


@pytest.fixture
def navi(tmp_path: Path) -> Path:
    """The folder `navi_v1` below a data root, prepared: two objects, and one without another collection."""
    base = tmp_path / "navi" / "navi_v1"
    for seed, name in enumerate(("cup", "hat", "lone")):
        write_object(base, name, seed)
    (base / "lone" / "multiview_00" / "annotations.json").unlink()
    prepare("navi", tmp_path)
    return base


def opened(base: Path) -> NAVI:
    dataset = load_dataset("navi", "test", root=base.parents[1])
    assert isinstance(dataset, NAVI)
    return dataset


def test_views_and_pairs(navi: Path) -> None:
    dataset = opened(navi)
    # Of ten views in order every fourth is a source: cup/000, cup/004, hat/003.
    assert [pair.source_id for pair in dataset.pairs] == ["cup/000", "cup/004", "hat/003"]
    assert dataset.coverage == {"found": 3, "expected": 575}
    for pair in dataset.pairs:
        steps = abs(int(pair.source_id[-3:]) - int(pair.target_id[-3:]))
        assert pair.angle == pytest.approx(np.degrees(0.4 * steps))
        assert dataset.group_of(pair.id) == pair.object
    view = dataset.read_view("cup/000")
    assert view.image.shape == (1024, 1280, 3)
    assert view.depth.shape == (1024, 1280)
    assert view.depth[480, 672] == pytest.approx(0.5, rel=1e-3)
    assert view.depth[0, 0] == 0
    assert view.camera.focal == pytest.approx(70 * 1024 / 64)
    assert view.camera.translation.tolist() == [0.001, 0.002, 0.5]


@pytest.mark.slow
def test_the_list_is_made_once_and_has_its_hash_in_results(navi: Path) -> None:
    path = navi / "pairs.csv"
    lines = path.read_text().splitlines()
    assert lines[0] == "source,target,degrees"
    assert len(lines) == 4
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert opened(navi).pair_list == digest
    root = navi.parents[1]
    (again,) = prepare("navi", root)
    assert again.written == 0
    assert digest in again.note
    out = root / "results"
    for protocol in ("probe3d-1", "clean-1"):
        options: list[Any] = ["--data-root", root, "--out", out, "--workers", 0, "--set", "input_size=128"]
        answer = neco("run", "--model", "baseline_rgb", "--task", f"navi@{protocol}", *options, "--set", "grid=32")
        assert answer.code == 0, answer.err
    for stored in out.rglob("*.json"):
        result = json.loads(stored.read_text())
        assert result["provenance"]["run"]["pair_list"] == digest
        assert result["subset"] == {"test": {"found": 3, "expected": 575}}


def test_the_archive_is_unpacked_and_prepared(navi: Path, tmp_path: Path) -> None:
    archive = tmp_path / "navi_v1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(navi.rglob("*")):
            if path.is_file() and not path.name.startswith(("downsampled", "pairs")):
                tar.add(path, Path("navi_v1") / path.relative_to(navi))
    root = tmp_path / "other"
    root.mkdir()
    unpacked, prepared = prepare("navi", root, source=archive)
    assert unpacked.written == 3 * (2 * VIEWS + 1) + 2
    assert prepared.written == 2 * 2 * VIEWS + 1
    assert load_dataset("navi", "test", root=root).fingerprint() == opened(navi).fingerprint()


def test_data_check_says_what_is_there(navi: Path) -> None:
    findings = check_dataset("navi", navi.parents[1])
    assert {finding.level for finding in findings} == {"ok", "warning"}
    text = " ".join(finding.text for finding in findings)
    assert "depth of objects from 0.500 to 0.500 m" in text
    assert "3 pairs of 2 objects" in text
    assert opened(navi).pair_list in text


def test_upright_copies_of_turned_photographs(navi: Path, tmp_path: Path) -> None:
    """EXIF orientation is applied: annotations are of the upright picture."""
    path = navi / "cup" / "wild_set" / "images" / "000.jpg"
    with Image.open(path) as image:
        turned = image.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        turned.save(path, exif=exif)
    path.with_name("downsampled_000.jpg").unlink()
    (done,) = prepare("navi", navi.parents[1])
    assert done.written == 1
    with Image.open(path.with_name("downsampled_000.jpg")) as copy:
        assert copy.size == (1280, 1024)


def test_sizes_of_copies_are_truncated() -> None:
    assert copy_size(3024, 4032) == (1024, 1365)
    assert copy_size(4032, 3024) == (1365, 1024)


def changed_list(base: Path) -> None:
    path = base / "pairs.csv"
    path.write_text(path.read_text().replace("cup/000", "cup/001"))


def object_taken_away(base: Path) -> None:
    (base / "hat" / "multiview_00" / "annotations.json").unlink()


def not_prepared(base: Path) -> None:
    (base / "pairs.csv").unlink()


def eight_bit_depth(base: Path) -> None:
    for path in (base / "cup" / "wild_set" / "depth").glob("downsampled_*.png"):
        with Image.open(path) as image:
            small = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        small.save(path)


def millimetres(base: Path) -> None:
    for path in (base / "cup" / "wild_set" / "depth").glob("downsampled_*.png"):
        with Image.open(path) as image:
            values = np.asarray(image)
        Image.fromarray(np.where(values > 0, 20, 0).astype(np.uint16)).save(path)  # 2 cm as disparity: 33 m


def resized_images(base: Path) -> None:
    for path in (base / "cup" / "wild_set" / "images").glob("downsampled_*.jpg"):
        with Image.open(path) as image:
            small = image.resize((640, 512))
        small.save(path)


def no_rotation(base: Path) -> None:
    path = base / "cup" / "wild_set" / "annotations.json"
    facts = json.loads(path.read_text())
    facts[1]["camera"]["q"] = [0, 0, 0, 0]
    path.write_text(json.dumps(facts))


MISTAKES: list[tuple[Callable[[Path], None], int, str]] = [
    (changed_list, 4, "does not follow the rule"),
    (object_taken_away, 4, "does not follow the rule"),
    (not_prepared, 3, "neco-bench data prepare navi"),
    (eight_bit_depth, 4, "it was converted to 8 bits"),
    (millimetres, 4, "has depth in millimetres"),
    (resized_images, 4, "it was resized or rotated"),
    (no_rotation, 4, "is not a rotation"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("plant", "code", "told"), MISTAKES)
def test_wrong_copies_end_in_one_clear_error(plant: Callable[[Path], None], code: int, told: str, navi: Path) -> None:
    plant(navi)
    root = navi.parents[1]
    options: list[Any] = ["--data-root", root, "--out", root / "results", "--workers", 0, "--set", "input_size=64"]
    answer = neco("run", "--model", "baseline_rgb", "--task", "navi@clean-1", *options)
    assert answer.code == code, answer.err
    assert " ".join(told.split()) in " ".join(answer.err.split())
    assert "Traceback" not in answer.err


def test_an_original_of_another_size_is_not_copied(navi: Path) -> None:
    path = navi / "cup" / "wild_set" / "images" / "000.jpg"
    with Image.open(path) as image:
        small = image.resize((40, 32))
    small.save(path)
    path.with_name("downsampled_000.jpg").unlink()
    with pytest.raises(BadInputError, match="its annotation states 80x64"):
        prepare("navi", navi.parents[1])


def test_disparity_by_hand(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535], [1311, 6554]], np.uint16)).save(tmp_path / "a.png")
    depth = read_disparity(tmp_path / "a.png", (2, 2))
    assert depth.ravel().tolist() == pytest.approx([0, 0.01, 655350 / 1311 / 1000, 655350 / 6554 / 1000])


def test_files_of_formats_that_no_data_set_uses_are_not_opened(tmp_path: Path) -> None:
    """Pillow would choose the decoder by the content, and some decoders run programs or read other files."""
    Image.fromarray(np.full((2, 2), 1311, np.uint16)).save(tmp_path / "a.png", "IM")
    with pytest.raises(BadInputError, match=r"a\.png: .*not an image"):
        read_disparity(tmp_path / "a.png", (2, 2))
