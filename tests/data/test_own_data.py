"""Data sets of one's own: what `data init` writes, what a `dataset.toml` may say, and what is wrong with some."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, UsageError
from neco_bench.core.protocol import FAMILIES, all_cards, find_tasks
from neco_bench.data.base import Dataset, PairDataset, SegmentationDataset
from neco_bench.data.init import init
from neco_bench.data.integrity import check_dataset, describe_datasets
from neco_bench.data.load import load_dataset
from tests.command import neco
from tests.data.data_helpers import image_of, save, save_indices

CLASSES = 7


def masks_of(count: int, size: tuple[int, int] = (20, 30), last: int = CLASSES - 1) -> list[np.ndarray]:
    """Masks of ids 0..last, all of them in each, and one pixel of void."""
    rng = np.random.default_rng(0)
    masks = rng.integers(0, last + 1, (count, *size), dtype=np.uint8)
    masks[:, 0, : last + 1] = np.arange(last + 1)
    masks[:, 1, 0] = 255
    return list(masks)


@pytest.fixture
def plants(tmp_path: Path) -> Path:
    """A folder of 30 images and masks of 7 classes, without anything else."""
    for number, mask in enumerate(masks_of(30)):
        save(tmp_path / "plants" / "images" / f"p{number:02d}.jpg", image_of(number))
        save(tmp_path / "plants" / "masks" / f"p{number:02d}.png", mask)
    return tmp_path / "plants"


def declare(folder: Path, text: str) -> Path:
    (folder / "dataset.toml").write_text(text)
    return folder


TOML = """
classes = ["a", "b", "c", "d", "e", "f", "g"]
images = "images/{id}.jpg"
masks = "masks/{id}.png"
splits = { train = "train.txt", val = "val.txt" }
"""


@pytest.fixture
def declared(plants: Path) -> Path:
    (plants / "train.txt").write_text("p00\np01\n")
    (plants / "val.txt").write_text("images/p03.jpg masks/p03.png\np02.jpg\n")
    return declare(plants, TOML)


def test_a_folder_becomes_a_data_set_with_tasks_of_every_segmentation_family(plants: Path) -> None:
    written = init(plants)
    assert [path.name for path in written.paths] == ["dataset.toml", "train.txt", "val.txt"]
    train, val = (load_dataset("plants", split, root=plants.parent) for split in ("train", "val"))
    assert (len(train), len(val)) == (24, 6)
    assert not {*train.ids} & {*val.ids}
    assert isinstance(val, SegmentationDataset)
    assert val.classes == tuple(f"class_{i}" for i in range(CLASSES))
    sample = val[0]
    assert (sample.mask == np.array(Image.open(plants / "masks" / f"{sample.id}.png"))).all()

    cards, broken = all_cards(plants.parent)
    own = {name: card for name, card in cards.items() if card.dataset == "plants"}
    assert not broken
    assert {
        "plants_ic",
        "plants_linear",
        "plants_finetune",
        "plants_knn",
        "plants_logreg",
        "plants_cluster_gt",
    } <= own.keys()
    on_masks = {c.family for c in all_cards()[0].values() if c.dataset == "shapes" and c.metric == "mIoU"}
    assert on_masks <= {card.family for card in own.values()}
    for card in own.values():
        for protocol in card.protocols:
            (task,) = find_tasks([f"{card.name}@{protocol}"], data_root=plants.parent)
            task.settings()
            assert FAMILIES.entry(card.family)
    assert not any(card.dataset == "plants" for card in all_cards()[0].values())

    row = next(row for row in describe_datasets(plants.parent) if row.name == "plants")
    assert (row.present, row.problem, row.origin) == (("train", "val"), "", str(plants / "dataset.toml"))
    assert all(finding.level == "ok" for finding in check_dataset("plants", plants.parent))


def test_its_tasks_are_listed_and_run(plants: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = neco("data", "init", plants)
    assert answer.code == 0
    assert answer.out.splitlines()[0] == str(plants / "dataset.toml")
    assert "7 values in the masks, and 255, taken as void" in answer.err
    monkeypatch.setenv("NECO_BENCH_DATA", str(plants.parent))
    listed = {row["task"]: row for row in json.loads(neco("tasks", "--json").out)}
    assert listed["plants_ic"]["data"] is True
    quick = ("--set", "input_size=32", "--set", "clusters=7", "--set", "iterations=5", "--set", "redos=1")
    run = ("run", "--model", "baseline_rgb", "--out", tmp_path / "results", "--workers", 0, "--json")
    answer = neco(*run, "--task", "plants_cluster_gt@clean-1", *quick)
    (result,) = json.loads(answer.out)
    assert (result["status"], result["n_images"], result["subset"]) == ("ok", 6, None)
    assert list(result["per_class"]["IoU"]) == [f"class_{i}" for i in range(CLASSES)]
    assert result["provenance"]["training"]["contamination"] == "none known"


@pytest.mark.slow
def test_they_run_in_every_family(plants: Path, tmp_path: Path) -> None:
    """All but finetuning, which trains for 64 epochs."""
    init(plants)
    cards = [card for card in all_cards(plants.parent)[0].values() if card.dataset == "plants"]
    names = ",".join(card.name for card in cards if card.family != "finetuning")
    run = ("run", "--model", "baseline_rgb", "--task", names, "--out", tmp_path / "results", "--workers", 0)
    answer = neco(*run, "--set", "input_size=64", "--data-root", plants.parent, "--json")
    assert answer.code == 0, answer.err
    results = json.loads(answer.out)
    assert ",".join(result["task"] for result in results) == names
    assert all(result["status"] == "ok" for result in results)


def test_lists_name_ids_or_paths_of_images(declared: Path) -> None:
    assert load_dataset("plants", "val", root=declared.parent).ids == ("p03", "p02")


def test_what_the_numbers_depend_on_is_in_the_fingerprint(declared: Path) -> None:
    def fingerprint() -> str:
        return load_dataset("plants", "val", root=declared.parent).fingerprint()

    before = fingerprint()
    declare(declared, TOML + f"citation = 'me'\npalette = {[[i, i, i] for i in range(CLASSES)]}")
    assert fingerprint() == before  # of pictures alone
    declare(declared, TOML.replace('"f", "g"]', '"f", "h"]'))
    assert fingerprint() != before
    declare(declared, TOML + "ignore = [255, 254]")
    assert fingerprint() != before


def test_an_id_map_and_several_void_values(declared: Path) -> None:
    mapped = 'ids = { 0 = "void", 1 = "x", 2 = "y", 3 = "x", 4 = "x", 5 = "x", 6 = "x" }'
    declare(declared, TOML.replace('["a", "b", "c", "d", "e", "f", "g"]', '["x", "y"]') + mapped)
    dataset = load_dataset("plants", "val", root=declared.parent)
    assert isinstance(dataset, SegmentationDataset)
    raw = np.array(Image.open(declared / "masks" / "p03.png"))
    expected = np.where(raw == 2, 1, 0)
    expected[(raw == 0) | (raw == 255)] = 255
    assert (dataset.mask(0) == expected).all()


def test_masks_in_colours(tmp_path: Path) -> None:
    palette = np.array([[200, 0, 0], [0, 200, 0], [10, 20, 250]], np.uint8)
    ids = masks_of(4, last=2)
    for number, mask in enumerate(ids):
        save(tmp_path / "tiles" / "images" / f"{number}.png", image_of(number))
        save(tmp_path / "tiles" / "labels" / f"{number}_colour.png", palette[mask.clip(max=2)])
    init(tmp_path / "tiles")
    dataset = load_dataset("tiles", "val", root=tmp_path)
    assert isinstance(dataset, SegmentationDataset)
    order = np.lexsort(palette.T[::-1])  # init numbers colours in their order
    assert (palette[order] == dataset.palette).all()
    assert (order[dataset.mask(0)] == ids[int(dataset.ids[0])].clip(max=2)).all()
    save(tmp_path / "tiles" / "labels" / f"{dataset.ids[0]}_colour.png", palette[ids[0].clip(max=2)] + np.uint8(1))
    with pytest.raises(BadInputError, match=r"has the colour \[.*dataset\.toml"):
        dataset.mask(0)


LAYOUTS: dict[str, tuple[Callable[[str, int], tuple[str, str]], str, str]] = {
    "split folders outside": (
        lambda s, i: (f"{s}/images/{i}.jpg", f"{s}/masks/{i}.png"),
        "{split}/images/{id}.jpg",
        "{split}/masks/{id}.png",
    ),
    "split folders inside, ADE20K's": (
        lambda s, i: (f"images/{s}/x_{i}.jpg", f"annotations/{s}/x_{i}.png"),
        "images/{split}/{id}.jpg",
        "annotations/{split}/{id}.png",
    ),
    "names that say which, Cityscapes'": (
        lambda s, i: (f"leftImg8bit/{s}/town/{i}_leftImg8bit.png", f"gtFine/{s}/town/{i}_gtFine_labelIds.png"),
        "leftImg8bit/{split}/town/{id}_leftImg8bit.png",
        "gtFine/{split}/town/{id}_gtFine_labelIds.png",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_init_finds_splits_in_folders(layout: str, tmp_path: Path) -> None:
    place, images, masks = LAYOUTS[layout]
    for split in ("train", "val"):
        for number, mask in enumerate(masks_of(3)):
            image_path, mask_path = place(split, number)
            save(tmp_path / "own" / image_path, image_of(number))
            save_indices(tmp_path / "own" / mask_path, mask)
    written = init(tmp_path / "own")
    assert [path.name for path in written.paths] == ["dataset.toml"]
    text = written.paths[0].read_text()
    assert f'images = "{images}"' in text
    assert f'masks = "{masks}"' in text
    assert "palette = [[0, 0, 0], [128, 0, 0], [0, 128, 0]" in text  # the masks' own
    assert [len(load_dataset("own", split, root=tmp_path)) for split in ("train", "val")] == [3, 3]


def test_init_finds_lists_names_and_masks_beside_images(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    for number, mask in enumerate(masks_of(4)):
        save(folder / f"{number}.{'JPG' if number else 'jpeg'}", image_of(number))
        save(folder / f"{number}_mask.png", mask)
    (folder / "splits").mkdir()
    (folder / "splits" / "train.txt").write_text("0\n1\n")
    (folder / "splits" / "test.txt").write_text("2\n3\n")
    (folder / "classes.txt").write_text("sky\nroad\ncar\ntree\nwall\ndoor\nsign\nrare\n")
    init(folder)
    dataset = load_dataset("own", "test", root=tmp_path)
    assert isinstance(dataset, SegmentationDataset)
    assert dataset.classes[-1] == "rare"  # in no mask
    assert len(dataset[0].image) == 20
    assert all_cards(tmp_path)[0]["own_ic"].splits == {"train": "train", "val": "test"}


def test_black_and_white_masks_have_two_classes(tmp_path: Path) -> None:
    for number, mask in enumerate(masks_of(4)):
        save(tmp_path / "own" / "img" / f"{number}.png", image_of(number))
        save(tmp_path / "own" / "seg" / f"{number}.png", np.where(mask > 3, 255, 0).astype(np.uint8))
    init(tmp_path / "own")
    dataset = load_dataset("own", "train", root=tmp_path)
    assert isinstance(dataset, SegmentationDataset)
    assert dataset.classes == ("background", "object")
    assert set(np.unique(dataset.mask(0))) == {0, 1}


def test_pairs_with_keypoints(tmp_path: Path) -> None:
    folder = tmp_path / "faces"
    for name in "abc":
        save(folder / "images" / f"{name}.jpg", image_of(1, (40, 50)))
    points = [[1.5, 2], [30, 35]]
    pairs = [
        {"source": "a", "target": "b", "source_points": points, "target_points": points},
        {"source": "b", "target": "c", "source_points": points, "target_points": points, "category": "cat"},
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    init(folder)
    dataset = load_dataset("faces", "test", root=tmp_path)
    assert isinstance(dataset, PairDataset)
    assert [(pair.id, pair.category, pair.target_box) for pair in dataset.pairs] == [
        ("a-b", "all", (1.5, 2, 30, 35)),
        ("b-c", "cat", (1.5, 2, 30, 35)),
    ]
    assert all(finding.level == "ok" for finding in check_dataset("faces", tmp_path))
    run = ("run", "--model", "baseline_rgb", "--task", "faces_correspondence", "--set", "input_size=64", "--json")
    answer = neco(*run, "--data-root", tmp_path, "--out", tmp_path / "results", "--workers", 0)
    assert json.loads(answer.out)[0]["metrics"]["PCK@0.10"] == 1.0  # all images are the same

    for box in ([3, 4, 600, 30], [-9, 0, 20, 20]):
        (folder / "pairs.json").write_text(json.dumps([{**pairs[0], "target_box": box}, pairs[1]]))
        (error,) = (finding for finding in check_dataset("faces", tmp_path) if finding.level == "error")
        assert error.text == "Boxes outside their images: 1, the first in pair a-b."

    for wrong, said in (
        (
            [{**pairs[0], "target_points": points[:1]}],
            "pair 0: source_points and target_points must have the same number",
        ),
        ([{"source": "a", "target": "b"}], "pair 0: 'source_points' is missing"),
        ([{**pairs[0], "taget_box": [0, 0, 1, 1]}], "pair 0: unknown key 'taget_box'"),
        ([pairs[0], pairs[0]], "two pairs have the id 'a-b'"),
    ):
        (folder / "pairs.json").write_text(json.dumps(wrong))
        with pytest.raises(BadInputError, match=said) as caught:
            load_dataset("faces", "test", root=tmp_path)
        assert str(folder / "pairs.json") in str(caught.value)
    (folder / "pairs.json").write_text(json.dumps([{**pairs[0], "target": "d"}]))
    with pytest.raises(MissingError, match=r"1 of the 2 images .* should be .*d\.jpg"):
        load_dataset("faces", "test", root=tmp_path)


WRONG = {
    "not TOML": ("classes = [", "is not valid TOML"),
    "a key that there is not": (TOML + "clases = 3", "clases: there is no such key. Did you mean 'classes'"),
    "one class": (TOML.replace('"b", "c", "d", "e", "f", "g"', ""), "classes: name two or more"),
    "a class twice": (TOML.replace('"b"', '"a"'), "classes: 'a' is named twice"),
    "no id in a pattern": (TOML.replace("images/{id}.jpg", "images"), "images: write the path with {id} once"),
    "a path out of the folder": (TOML.replace("masks/{id}", "../{id}"), "masks: '../{id}.png' must be a path from"),
    "no splits": (TOML.replace('{ train = "train.txt", val = "val.txt" }', "[]"), "splits: name one or more"),
    "splits without files": (
        TOML.replace('{ train = "train.txt", val = "val.txt" }', '["train"]'),
        "splits without files need {split} in images",
    ),
    "void is a class": (TOML + "ignore = 3", "ignore: 3 is the value of class 'd'"),
    "an id of no class": (TOML + 'ids = { 0 = "aa" }', "ids: 0 = 'aa' is not a class. Did you mean 'a'"),
    "a class without an id": (TOML + 'ids = { 0 = "a" }', "ids: no mask value stands for b, c, d, e, f, g"),
    "colours for some classes": (TOML + "palette = [[1, 2, 3]]", "palette has 1 colours for 7 classes"),
    "no colour at all": (TOML + 'mask_values = "colours"', "palette: mask_values"),
    "a colour beyond a byte": (TOML + "palette = [[1, 2, 300]]", "palette.0.2: Input should be less than"),
    "masks of pairs": (TOML + 'kind = "pairs"', "pairs have no masks"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_error_and_hides_nothing(case: str, declared: Path) -> None:
    text, said = WRONG[case]
    declare(declared, text)
    path = declared / "dataset.toml"
    answer = neco("run", "--model", "baseline_rgb", "--task", "plants_ic", "--data-root", declared.parent)
    assert answer.code == 4
    assert answer.err.count("error:") == len(answer.err.splitlines()) == 1
    assert str(path) in answer.err
    assert said in answer.err
    listed = neco("tasks", "--data-root", declared.parent)
    assert listed.code == 0
    assert f"warning: 'plants' is broken: {path}" in listed.err
    assert "shapes_ic" in listed.out


def test_a_folder_with_the_name_of_another_data_set_is_refused(declared: Path) -> None:
    for name, said in (("voc2012", "is the name of a data set with a reader"), ("voc", "the task 'voc_ic' is another")):
        declared = declared.rename(declared.with_name(name))
        assert said in all_cards(declared.parent)[1][name]
    declared = declared.rename(declared.with_name("my plants"))
    assert "rename the folder 'my plants'" in all_cards(declared.parent)[1]["my plants"]


def break_mask(folder: Path) -> None:
    save(folder / "masks" / "p02.png", np.full((20, 30), 7, np.uint8))


def break_size(folder: Path) -> None:
    save(folder / "masks" / "p02.png", np.zeros((10, 30), np.uint8))


def break_list(folder: Path) -> None:
    (folder / "val.txt").write_text("p02\np2\n")


FAULTS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "an id that no class has": (break_mask, 4, r"p02\.png holds the values 7 .* allowed are 0\.\.6, 255"),
    "a mask of another size": (break_size, 4, r"p02\.png is 30x10 pixels .* its image is 30x20"),
    "a mask that is missing": (
        lambda folder: (folder / "masks" / "p02.png").unlink(),
        3,
        r"1 of the 2 ids in .*val\.txt have no mask; the first is 'p02', whose mask should be .*p02\.png",
    ),
    "an id without an image": (break_list, 3, r"1 of the 2 ids in .*val\.txt have no image; the first is 'p2'"),
    "no list": (lambda folder: (folder / "val.txt").unlink(), 3, r"the split list .*val\.txt does not exist"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_files_are_one_error(fault: str, declared: Path, tmp_path: Path) -> None:
    spoil, code, said = FAULTS[fault]
    spoil(declared)
    run = ("run", "--model", "baseline_rgb", "--task", "plants_cluster_gt", "--data-root", declared.parent)
    answer = neco(*run, "--set", "input_size=32", "--out", tmp_path / "results", "--workers", 0)
    assert answer.code == code, answer.err
    assert len([line for line in answer.err.splitlines() if "rror: " in line]) == 1
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(answer.err)


def remove(folder: Path, pattern: str) -> None:
    for path in folder.rglob(pattern):
        path.unlink()


def rename_masks(folder: Path) -> None:
    for number, path in enumerate(list(folder.rglob("*.png"))):
        path.rename(path.with_name(f"q{number}.png"))


def write_masks(folder: Path, array: np.ndarray) -> None:
    for path in folder.rglob("*.png"):
        save(path, array)


INIT_FAULTS: dict[str, tuple[Callable[[Path], object], type[NecoBenchError], str]] = {
    "one is there": (lambda f: declare(f, TOML), UsageError, "Edit it, or replace it with --overwrite"),
    "no images": (lambda f: remove(f, "*.*g"), MissingError, "contains no images"),
    "no masks": (
        lambda f: remove(f, "*.png"),
        MissingError,
        "but no masks: put images into images/",
    ),
    "names that differ": (
        rename_masks,
        MissingError,
        "have the same name",
    ),
    "photographs as masks": (
        lambda f: write_masks(f, image_of(0)),
        BadInputError,
        "600 values or colours, but 255 classes and void are the maximum",
    ),
    "one class": (
        lambda f: write_masks(f, np.zeros((20, 30), np.uint8)),
        BadInputError,
        "have 1 class",
    ),
}


@pytest.mark.parametrize("fault", INIT_FAULTS)
def test_init_says_what_it_cannot_use_and_writes_nothing(fault: str, plants: Path) -> None:
    spoil, error, said = INIT_FAULTS[fault]
    spoil(plants)
    before = {path: path.read_bytes() for path in plants.rglob("*.t*")}
    with pytest.raises(error, match=said):
        init(plants)
    assert {path: path.read_bytes() for path in plants.rglob("*.t*")} == before


def _ids(dataset: Dataset) -> tuple[str, ...]:
    return dataset.ids


@pytest.mark.slow
def test_a_spawned_loading_process_can_read_it(declared: Path) -> None:
    dataset = load_dataset("plants", "val", root=declared.parent)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_ids, (dataset,)) == dataset.ids
