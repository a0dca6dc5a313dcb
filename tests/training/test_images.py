"""Where training images come from."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neco_bench.core.errors import BadInputError, MissingError, UsageError
from neco_bench.training.images import IMAGENET100, open_images
from tests.typed import load_segmentation, samples


def put(path: Path, value: int = 7, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), value if mode == "L" else (value,) * len(mode)).save(path)
    return path


def test_a_folder_is_read_at_any_depth_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a.jpg", "b/c/1.webp", ".hidden/x.png", "b/.y.png"):
        put(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    images = open_images(str(tmp_path))
    assert images.ids == ("a.jpg", "b/2.PNG", "b/c/1.webp")
    assert images.read(1).shape == (4, 6, 3)
    assert pickle.loads(pickle.dumps(images)).ids == images.ids
    before = images.fingerprint()
    moved = tmp_path.rename(tmp_path.with_name("elsewhere"))
    assert open_images(str(moved)).fingerprint() == before


def test_links_to_folders_above_and_names_of_other_encodings(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "again").symlink_to(tmp_path)
    (tmp_path / "in" / "beside").symlink_to(put(tmp_path / "other" / "b.png").parent)
    os.rename(tmp_path / "in" / "a.png", os.fsencode(tmp_path / "in") + b"/caf\xe9.png")
    images = open_images(str(tmp_path / "in"))
    assert images.ids == ("beside/b.png", "caf\udce9.png")
    assert len(images.fingerprint()) == 64


def test_fingerprint_changes_with_names_and_sizes(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / f"{name}.png")
    first = open_images(str(tmp_path)).fingerprint()
    assert open_images(str(tmp_path)).fingerprint() == first
    Image.new("RGB", (60, 40), (1, 2, 3)).save(tmp_path / "b.png")
    assert open_images(str(tmp_path)).fingerprint() != first


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_every_image_becomes_rgb(mode: str, tmp_path: Path) -> None:
    put(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"), mode=mode)
    image = open_images(str(tmp_path)).read(0)
    assert image.shape == (4, 6, 3)
    assert image.dtype == np.uint8


def test_a_broken_or_vanished_image_is_a_bad_input(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / f"{name}.jpg")
    images = open_images(str(tmp_path))
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:100])
    (tmp_path / "b.jpg").unlink()
    for index, name in enumerate(("a.jpg", "b.jpg")):
        with pytest.raises(BadInputError, match=name):
            images.read(index)


def test_lists(tmp_path: Path) -> None:
    inside, outside = put(tmp_path / "in/x.png"), put(tmp_path / "out/y.png")
    file = tmp_path / "in/list.txt"
    file.write_text(f"# two\nx.png\n\n{outside}  # absolute\n")
    images = open_images(str(file))
    assert images.ids == ("x.png", str(outside))
    assert np.array_equal(images.read(0), images.read(1))
    inside.unlink()
    outside.unlink()
    with pytest.raises(MissingError, match="none of its 2 files is there"):
        open_images(str(file))
    file.write_text("\n# nothing\n")
    with pytest.raises(BadInputError, match="names no images"):
        open_images(str(file))


def test_shapes_never_hold_a_validation_scene() -> None:
    few, many = open_images("shapes"), open_images("shapes:400")
    assert (len(few), len(many)) == (160, 400)
    train = load_segmentation("shapes", "train")
    assert np.array_equal(many.read(3), train[3].image)
    validation = {sample.image.tobytes() for sample in samples(load_segmentation("shapes", "val"))}
    assert not any(many.read(i).tobytes() in validation for i in range(0, 400, 57))
    assert few.fingerprint() != many.fingerprint()
    with pytest.raises(UsageError, match="shapes:N"):
        open_images("shapes:many")


def test_named_data_sets(tmp_path: Path) -> None:
    put(tmp_path / "coco/train2017/1.jpg")
    put(tmp_path / "coco/val2017/2.jpg")
    put(tmp_path / "imagenet/train/n01/3.JPEG")
    put(tmp_path / "imagenet/val/n01/4.JPEG")
    assert open_images("coco", tmp_path).ids == ("1.jpg",)
    assert open_images(f"coco:{tmp_path}/coco").ids == ("1.jpg",)
    assert open_images("imagenet", tmp_path).ids == ("n01/3.JPEG",)
    with pytest.raises(MissingError, match=r"should be in .*train2017"):
        open_images(f"coco:{tmp_path}/imagenet")
    with pytest.raises(MissingError, match="no data root"):
        open_images("coco")
    with pytest.raises(MissingError, match="there is no folder"):
        open_images("voc", tmp_path)


def test_the_classes_of_imagenet100(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    classes = [name for line in IMAGENET100.read_text().splitlines() if line[0] != "#" for name in line.split()]
    assert len(set(classes)) == len(classes) == 100
    for name in (*classes, "n00000000"):
        put(tmp_path / "imagenet/train" / name / "deeper" / "1.JPEG")
    put(tmp_path / "imagenet/train/1.JPEG")
    images = open_images("imagenet100", tmp_path)
    assert images.ids == tuple(sorted(f"{name}/deeper/1.JPEG" for name in classes))
    assert "has 100 images of the 100 classes, where ImageNet-100 has 126689" in caplog.text
    assert images.overlap(tmp_path) == {"imagenet": "seen"}
    assert len(open_images("imagenet", tmp_path)) == 102
    assert open_images(f"imagenet100:{tmp_path}/imagenet").ids == images.ids
    (tmp_path / "imagenet/train" / classes[3]).rename(tmp_path / "elsewhere")
    with pytest.raises(MissingError, match=f"1 of its 100 classes are not in .*such as {classes[3]}"):
        open_images("imagenet100", tmp_path)


def test_mixtures(tmp_path: Path) -> None:
    put(tmp_path / "coco/train2017/1.png", 1)
    put(tmp_path / "mine/1.png", 2)
    put(tmp_path / "mine/2.png", 3)
    mixed = open_images(f"coco, {tmp_path}/mine,shapes:2", tmp_path)
    assert mixed.ids[:3] == ("coco train2017/1.png", "mine/1.png", "mine/2.png")
    assert len(mixed) == 5
    assert [int(mixed.read(index)[0, 0, 0]) for index in range(3)] == [1, 2, 3]
    assert np.array_equal(mixed.read(4), open_images("shapes:2").read(1))
    with pytest.raises(IndexError):
        mixed.read(5)
    assert mixed.description == "coco train2017 + mine + shapes (2 generated images)"
    assert mixed.overlap(tmp_path) == {"coco": "seen", "mine": "seen", "shapes": "seen"}
    assert pickle.loads(pickle.dumps(mixed)).ids == mixed.ids
    prints = {
        open_images(f"{tmp_path}/mine,{rest}", tmp_path).fingerprint() for rest in ("coco", "shapes:2", "shapes:3")
    }
    assert len(prints | {mixed.fingerprint()}) == 4
    put(tmp_path / "a,b" / "1.png")
    assert open_images(str(tmp_path / "a,b")).description == "a,b"
    with pytest.raises(UsageError, match="names coco train2017 twice"):
        open_images("coco,coco", tmp_path)
    with pytest.raises(MissingError, match="Did you mean 'imagenet100'"):
        open_images("coco,imagenet10", tmp_path)


def test_real_voc(real_data: Path) -> None:
    images = open_images("voc", real_data)
    assert len(images) >= 100
    assert images.read(0).ndim == 3


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no images, at any depth; looked for \.jpg"):
        open_images(str(tmp_path))
    with pytest.raises(MissingError, match="Did you mean 'imagenet'"):
        open_images("imagnet")


def test_lists_with_names_that_no_file_can_have(tmp_path: Path) -> None:
    Image.new("RGB", (80, 80)).save(tmp_path / "a.png")
    names = ["a.png", "c" * 5000, "d.png"]
    (tmp_path / "list.txt").write_text("\ufeff" + "\n".join(names), encoding="utf-8")
    images = open_images(str(tmp_path / "list.txt"))
    assert images.ids == tuple(names)
    assert images.read(0).shape == (80, 80, 3)
    for index in (1, 2):
        with pytest.raises(BadInputError):
            images.read(index)
    assert len(images.fingerprint()) == 64
    (tmp_path / "list.txt").write_text("\n".join(names[1:]))
    with pytest.raises(MissingError, match="none of its 2 files is there"):
        open_images(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("a.png\nb\0.png\n")
    with pytest.raises(BadInputError, match="NUL"):
        open_images(str(tmp_path / "list.txt"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_lists_written_on_windows(encoding: str, tmp_path: Path) -> None:
    put(tmp_path / "in/x.png")
    (tmp_path / "list.txt").write_bytes("in\\x.png\r\nin/y.png\r\n".encode(encoding))
    assert open_images(str(tmp_path / "list.txt")).ids == ("in/x.png", "in/y.png")


@pytest.mark.parametrize("name", ["~no_such_user/images", "a" * 5000, "coco:~no_such_user"])
def test_names_that_no_folder_can_have(name: str) -> None:
    with pytest.raises(MissingError):
        open_images(name)


def test_collections_are_told_by_their_folders(tmp_path: Path) -> None:
    root = tmp_path / "data"
    coco, camvid = put(root / "coco" / "train2017" / "1.png"), put(root / "camvid" / "train" / "1.png")
    mine, voc = put(root / "mine" / "images" / "1.png"), put(tmp_path / "disk" / "VOC2012" / "JPEGImages" / "1.png")
    other = put(tmp_path / "disk" / "other" / "1.png")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "1.png").symlink_to(camvid)
    (tmp_path / "list.txt").write_text(f"{coco}\n{voc}\n")
    (tmp_path / "mixed.txt").write_text(f"{camvid}\n{other}\n")
    for spec, known in {
        "shapes:4": {"shapes": "seen"},
        "coco": {"coco": "seen"},
        f"imagenet:{put(tmp_path / 'disk' / 'in1k' / 'train' / '1.png').parents[1]}": {"imagenet": "seen"},
        str(camvid.parent): {"camvid": "seen"},
        str(tmp_path / "links"): {"camvid": "seen"},
        str(mine.parent): {"mine": "seen"},
        str(tmp_path / "list.txt"): {"coco": "seen", "voc": "seen"},
        str(tmp_path / "mixed.txt"): {"camvid": "seen", "*": "unknown"},
        str(other.parent): {"*": "unknown"},
    }.items():
        assert open_images(spec, root).overlap(root) == known, spec
