"""The embedded data sets: the same everywhere, safe to make, of the promised content."""

from __future__ import annotations

import hashlib
import logging
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from neco_bench.core.errors import UsageError
from neco_bench.data import shapes
from neco_bench.data.integrity import check_dataset
from neco_bench.data.shapes import pair_scene, segmentation_scene, shapes_folder
from tests.typed import load_pairs, load_segmentation


def test_a_scene_has_its_stored_digest() -> None:
    mask = segmentation_scene("val", 3).mask()
    assert hashlib.sha256(mask.tobytes()).hexdigest()[:16] == "16653004d8863038"


@pytest.mark.slow
def test_two_processes_make_the_same_files_of_a_half_written_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shapes-1").mkdir()
    (tmp_path / "shapes-1" / "train.txt").write_text("000\n")
    for leftover in ("shapes-1.partial", "shapes-1.x1y2z3"):  # of killed processes
        (tmp_path / leftover / "train").mkdir(parents=True)
    monkeypatch.setenv("NECO_BENCH_CACHE", str(tmp_path))
    code = "from neco_bench.data.load import load_dataset as d; print(d('shapes', 'val').fingerprint())"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    monkeypatch.undo()
    assert printed == [load_segmentation("shapes", "val").fingerprint() + "\n"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes-1", "shapes-1.lock"]
    assert (tmp_path / "shapes-1/manifest.json").read_bytes() == (shapes_folder() / "manifest.json").read_bytes()


@pytest.mark.slow
def test_a_damaged_cache_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, whole = load_segmentation("shapes", "train")[0], shapes_folder()
    shutil.copytree(whole, tmp_path / whole.name)
    monkeypatch.setenv("NECO_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(shapes, "generate", lambda folder: shutil.copytree(whole, folder, dirs_exist_ok=True))
    path = shapes_folder() / "train" / "images" / "000.ppm"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        after = load_segmentation("shapes", "train")[0]
    assert "generated again" in caplog.text
    assert np.array_equal(after.image, before.image)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NECO_BENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="NECO_BENCH_CACHE"):
        load_segmentation("shapes", "val")


@pytest.mark.parametrize("split", ["train", "val"])
def test_scenes(split: str) -> None:
    dataset = load_segmentation("shapes", split)
    assert dataset.coverage is None
    assert len(dataset.classes) == len(dataset.palette) == 9
    present = np.zeros(256, int)
    for sample in (dataset[i] for i in range(0, len(dataset), 2)):
        assert sample.image.shape == (224, 224, 3)
        assert sample.mask.shape == (224, 224)
        # Wherever the class changes from a pixel to its neighbour, one of the two is void.
        for first, second in ((sample.mask[1:], sample.mask[:-1]), (sample.mask[:, 1:], sample.mask[:, :-1])):
            assert ((first == second) | (first == 255) | (second == 255)).all()
        present += np.bincount(sample.mask.ravel(), minlength=256) > 0
    assert (present[:9] >= 8).all()
    assert present[255] == len(dataset) // 2
    assert not present[9:255].any()


def test_check_and_pickle() -> None:
    for name in ("shapes", "shapes_pairs"):
        assert {finding.level for finding in check_dataset(name)} == {"ok"}
    for dataset in (load_segmentation("shapes", "val"), load_pairs("shapes_pairs", "test")):
        assert pickle.loads(pickle.dumps(dataset)).fingerprint() == dataset.fingerprint()


def test_pairs() -> None:
    dataset = load_pairs("shapes_pairs", "test")
    assert len(dataset) == len(set(dataset.ids)) == 200
    for pair in dataset.pairs:
        assert 3 <= len(pair.point_ids) <= 6
        assert pair.source_id != pair.target_id
        assert pair.source_id.startswith(pair.category + "/")
        assert set(pair.attributes) == {"viewpoint_variation", "scale_variation", "truncation", "occlusion"}
        for points, (x1, y1, x2, y2) in (
            (pair.source_points, pair.source_box),
            (pair.target_points, pair.target_box),
        ):
            assert 0 <= x1 < x2 < 224
            assert 0 <= y1 < y2 < 224
            assert (np.rint(points) >= (x1, y1)).all()
            assert (np.rint(points) <= (x2, y2)).all()
    for key, levels in (("viewpoint_variation", 3), ("scale_variation", 3), ("truncation", 4), ("occlusion", 4)):
        assert {pair.attributes[key] for pair in dataset.pairs} == set(range(levels))


def test_keypoints_are_visible_and_attributes_follow_from_the_scenes() -> None:
    dataset = load_pairs("shapes_pairs", "test")
    scenes = {image_id: pair_scene(int(image_id.split("/")[1])) for image_id in dataset.image_ids}
    for pair in dataset.pairs:
        turns = []
        for image_id, points in ((pair.source_id, pair.source_points), (pair.target_id, pair.target_points)):
            scene, main = scenes[image_id]
            x, y = np.rint(points).astype(int).T
            assert (scene.owner[y, x] == main + 1).all()
            turns.append(np.degrees(scene.objects[main].turn))
        difference = abs(turns[0] - turns[1])
        assert pair.attributes["viewpoint_variation"] == int(difference >= 15) + int(difference >= 35)
    for image_id in dataset.image_ids[:5]:
        assert np.array_equal(dataset.read_image(image_id), scenes[image_id][0].image)
