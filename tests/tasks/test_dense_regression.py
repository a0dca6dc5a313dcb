"""The family from end to end on rendered rooms: known answers, invariances, sizes, stored features, several processes,
comparison and pictures; and on real frames of NYUv2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from neco_bench.tasks.dense_regression.inputs import (
    Augment,
    Frame,
    FrameInput,
    InputGrid,
    crop_frame,
    mirrored,
    pack,
    resize_target,
    train_crop,
    unpack,
)
from neco_bench.tasks.dense_regression.settings import Settings
from PIL import Image
from torch import Tensor

import neco_bench
from neco_bench.core.errors import BadInputError, NumericalError, UsageError
from neco_bench.core.protocol import find_tasks
from neco_bench.core.rng import item_rng
from neco_bench.data.dense import DenseSample
from neco_bench.data.load import DATASETS
from neco_bench.data.shapes_geometry import ShapesDepth, ShapesNormals
from neco_bench.encoders import DenseFeatures, Encoder
from neco_bench.encoders.load import load_encoder
from neco_bench.features.extract import features_of
from neco_bench.results.store import ResultStore
from tests import processes
from tests.command import neco

MM = 1000
EVERY = [f"shapes_depth@{name}" for name in ("clean-1", "dinov3-1", "dinov2-lin1")]
EVERY += [f"shapes_normals@{name}" for name in ("clean-1", "probe3d-1")]


def quick(task: str) -> dict[str, Any]:
    """Few steps; the constants that say what is measured stay."""
    return {"epochs": 1, "batch_size": 4} if task.endswith("probe3d-1") else {"iterations": 3, "batch_size": 3}


class PaintedDepth(ShapesDepth):
    """The rooms with their answer as the image: red and green are the high and the low byte of the millimetres."""

    def __getitem__(self, index: int) -> DenseSample:
        sample = super().__getitem__(index)
        values = np.rint(sample.target * MM).astype(np.uint16)
        return DenseSample(
            np.stack([values >> 8, values & 255, 0 * values], 2).astype(np.uint8), sample.target, sample.id
        )


class PaintedNormals(ShapesNormals):
    """The rooms with their normals as colours."""

    def __getitem__(self, index: int) -> DenseSample:
        sample = super().__getitem__(index)
        return DenseSample(np.rint((sample.target + 1) * 127.5).astype(np.uint8), sample.target, sample.id)


class DepthOracle(Encoder):
    """Reads the depth off the colours: in each cell of 4 pixels the share at each of 48 depths, 0 to 12 m.

    Its mean and std are ImageNet's, which the protocols of the references give to every encoder.
    """

    name, weights_id = "oracle", "0"
    embed_dim, stride = 48, 4
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        levels = (255 * (images * std + mean)).round()
        depth = (256 * levels[:, :1] + levels[:, 1:2]) / MM
        knots = torch.linspace(0, 12, 48)[None, :, None, None]
        hats = F.relu(1 - (depth - knots).abs() / (12 / 47))
        return DenseFeatures(F.avg_pool2d(hats, 4), 4)


class NormalOracle(Encoder):
    """The mean colour of cells of 4 pixels."""

    name, weights_id = "oracle", "0"
    embed_dim, stride = 3, 4
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        return DenseFeatures(F.avg_pool2d(images, 4), 4)


class Blind(Encoder):
    """The same feature everywhere."""

    name, weights_id = "blind", "0"
    embed_dim, stride = 4, 16

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        height, width = images.shape[-2:]
        return DenseFeatures(images.new_ones(len(images), 4, height // 16, width // 16), 16)


def run_painted(monkeypatch: pytest.MonkeyPatch, cls: type, encoder: Encoder, task: str) -> dict[str, float]:
    """Few and small crops, so that it is quick; flips would not fit colours that are normals."""
    steps = 60 if cls is PaintedDepth else 150
    changes = {"crop": [96, 96], "iterations": steps, "batch_size": 6, "learning_rate": 0.05, "flip_probability": 0.0}
    monkeypatch.setattr(DATASETS, "load", lambda name: cls)
    return neco_bench.run(encoder, task, limit=10, workers=0, changes=changes).metrics


@pytest.mark.slow
def test_an_oracle_recovers_depth_and_a_blind_encoder_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an oracle lacks is the grid: cells of 4 pixels have one depth, at edges too."""
    found, blind = (
        run_painted(monkeypatch, PaintedDepth, encoder, "shapes_depth@clean-1") for encoder in (DepthOracle(), Blind())
    )
    assert found["abs_rel"] < 0.05
    assert found["d1"] > 0.95
    assert blind["rmse"] > 3 * found["rmse"]
    assert blind["d1"] < 0.7


@pytest.mark.slow
def test_an_oracle_recovers_normals_and_a_blind_encoder_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found, blind = (
        run_painted(monkeypatch, PaintedNormals, encoder, "shapes_normals@clean-1")
        for encoder in (NormalOracle(), Blind())
    )
    assert found["median_angle"] < 3
    assert found["within_11.25"] > 0.9
    assert blind["mean_angle"] > 4 * found["mean_angle"]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["dinov3-1", "dinov2-lin1"])
def test_an_oracle_beats_a_blind_encoder(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours stay as they are, as they are the answer. At the protocols' rates 60 steps would be too few."""
    monkeypatch.setattr(DATASETS, "load", lambda name: PaintedDepth)
    changes = {"iterations": 60, "batch_size": 6, "crop": [64, 64], "learning_rate": 0.05, "flip_probability": 0.0}
    changes |= {"colour": "none", "rotation_probability": 0.0, "loss_warmup": 10}
    found, blind = (
        neco_bench.run(encoder, f"shapes_depth@{protocol}", limit=6, workers=0, changes=changes).metrics
        for encoder in (DepthOracle(), Blind())
    )
    assert 2 * found["rmse"] < blind["rmse"]


@pytest.mark.slow
@pytest.mark.parametrize("task", EVERY)
def test_every_protocol_gives_whole_results(task: str, tmp_path: Path) -> None:
    """Metrics, statistics whose mean they are, an interval over images, and the conditions of the run."""
    result = neco_bench.run("baseline_rgb", task, limit=6, workers=0, changes=quick(task), out=tmp_path)
    arrays = ResultStore(tmp_path).statistics(result)
    assert result.metric().lower_is_better
    for name, value in result.metrics.items():
        assert arrays[f"score/{name}"].mean() == pytest.approx(value, rel=1e-12)
    assert arrays["item_id"].tolist() == [f"{i:03d}" for i in range(6)]
    low, high = result.ci95[result.primary_metric]
    assert low < result.metrics[result.primary_metric] < high
    assert result.drawn is not None
    assert result.drawn.unit == "image"
    features = result.provenance["features"]
    assert (features["used_size"], features["tokens"]) == ("224x224", 784)
    assert result.provenance["training"]["contamination"] == "none known"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["shapes_depth@dinov3-1", "shapes_normals@probe3d-1"])
def test_batch_size_and_stored_features_move_nothing(task: str, tmp_path: Path) -> None:
    first, again = (
        neco_bench.run("baseline_rgb", task, limit=5, workers=0, changes=quick(task), batch_size=size)
        for size in (4, 2)
    )
    assert first.provenance["features_reused"] == 0
    assert again.provenance["features_reused"] > 0
    off = neco_bench.run("baseline_rgb", task, limit=5, workers=0, changes=quick(task), features="off", batch_size=3)
    for other in (again, off):
        assert other.metrics == pytest.approx(first.metrics, rel=1e-5)


def test_strides_that_do_not_divide_the_frame_are_padded() -> None:
    """NYU frames under strides of 15 and 14, in the centre of what is around them; one size only is a squash."""
    encoder = Blind()
    encoder.stride = 15
    grid = InputGrid.of((480, 640), encoder)
    assert (grid.size, grid.corner) == ((480, 645), (0, 2))
    encoder.stride = 14
    assert InputGrid.of((480, 640), encoder).size == (490, 644)  # as the facts say
    assert InputGrid.of((416, 544), encoder).size == (420, 546)
    placed = InputGrid.of((416, 544), encoder).place(torch.ones(3, 416, 544), (0.1, 0.2, 0.3))
    assert placed[:, 0, 0].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert placed[:, 2:418, 1:545].min() == 1
    assert placed[:, 418:].max() < 1
    encoder.only_size = 224
    assert InputGrid.of((480, 640), encoder).place(torch.ones(3, 480, 640), (0, 0, 0)).shape == (3, 224, 224)


def test_a_class_token_and_the_mirrored_image_are_further_channels() -> None:
    encoder = load_encoder("timm:vit_tiny_patch16_224?pretrained=false&seed=0", device="cpu")
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    plain = encoder.encode(images, final_norm=False)
    both = features_of(encoder, images, class_token=True, mirrored=True, final_norm=False)
    dim = encoder.embed_dim
    assert both.shape == (2, 4 * dim, 2, 3)
    assert torch.equal(both[:, :dim], plain.map)
    assert plain.prefix is not None
    assert torch.equal(both[0, dim : 2 * dim, 1, 2], plain.prefix[0, 0])
    other = encoder.encode(images.flip(-1), final_norm=False).map.flip(-1)
    assert torch.allclose(both[:, 2 * dim : 3 * dim], other, atol=1e-6)
    rgb = load_encoder("baseline_rgb")
    found = features_of(rgb, images, class_token=True)
    assert torch.allclose(found[:, 12:, 0, 0], rgb.encode(images).map.mean((2, 3)))


def settings_of(task: str, **changes: object) -> Settings:
    (found,) = find_tasks([task], changes)
    settings = found.settings()
    assert isinstance(settings, Settings)
    return settings


def sample_of(shape: tuple[int, int], kind: str = "depth") -> DenseSample:
    """The number of its column as depth, and as the red of the image; normals to the right."""
    columns = np.tile(np.arange(shape[1]), (shape[0], 1))
    image = np.stack([columns % 256, columns // 256, 0 * columns], 2).astype(np.uint8)
    target = columns.astype(np.float32) + 1
    if kind == "normals":
        target = np.tile(np.array([0.6, 0, -0.8], np.float32), (*shape, 1))
    return DenseSample(image, target, "a")


def test_frames_and_crops() -> None:
    """KITTI's crop, the central square, BTS's region, and what an input of another height does to them."""
    kb = crop_frame(sample_of((375, 1242)).target, "kb")
    assert (kb.shape, kb[0, 0]) == ((352, 1216), 14)  # int((1242 - 1216) / 2) + 1
    square = crop_frame(sample_of((480, 640)).target, "centre_square")
    assert (square.shape, square[0, 0]) == ((480, 480), 81)
    with pytest.raises(BadInputError, match="smaller than the crop of KITTI"):
        crop_frame(np.zeros((300, 1242)), "kb")
    s = settings_of("nyu_depth@dinov3-1")
    assert train_crop(Frame("whole", (480, 640), 480), s) == (416, 544)
    assert train_crop(Frame("whole", (480, 640), 240), s) == (208, 272)
    assert train_crop(Frame("whole", (480, 640), 480), s.model_copy(update={"crop": None})) == (427, 565)
    with pytest.raises(UsageError, match="crop=480,544 does not fit into 427x565 pixels"):
        train_crop(Frame("whole", (480, 640), 480), s.model_copy(update={"crop": (480, 544)}))


def test_image_and_target_stay_together() -> None:
    """Whatever the augmentation does, the red of a pixel is its depth less 1, until colours change."""
    s = settings_of("nyu_depth@dinov3-1", colour="none", rotation_probability=0.0)
    frame = Frame("whole", (480, 640), 480)
    crop = train_crop(frame, s)
    grid = InputGrid(crop, crop)
    augment = Augment(frame, grid, (0, 0, 0), crop, s)
    offsets, flipped = set(), set()
    for number in range(8):
        image, packed = augment(sample_of((480, 640)), item_rng(number))
        depth = unpack(packed, "depth")
        assert (image.shape[1:], depth.shape) == ((416, 544), (416, 544))
        levels = (255 * image).round().numpy()
        assert np.array_equal(levels[0] + 256 * levels[1], depth - 1)
        offsets.add(depth.min())
        flipped.add(bool(depth[0, 0] > depth[0, 1]))
        assert 44 <= depth.min() <= 44 + 565 - 544  # columns 43 to 607
    assert len(offsets) > 3
    assert flipped == {False, True}
    rotating = Augment(frame, grid, (0, 0, 0), crop, s.model_copy(update={"rotation_probability": 1.0}))
    image, packed = rotating(sample_of((480, 640)), item_rng(1))
    depth, levels = unpack(packed, "depth"), (255 * image).round().numpy()
    difference = np.abs(levels[0] + 256 * levels[1] - (depth - 1))
    assert np.median(difference) <= 1


def test_normals_turn_with_a_mirrored_image() -> None:
    sample = sample_of((480, 640), "normals")
    assert mirrored(sample.target)[0, 0] == pytest.approx([-0.6, 0, -0.8])
    assert np.array_equal(unpack(pack(sample.target), "normals"), sample.target)
    s = settings_of("nyu_normals@probe3d-1", colour="none", resized_crop_probability=1.0)
    frame = Frame("centre_square", (480, 480), 480)
    grid = InputGrid((480, 480), (480, 480))
    image, packed = Augment(frame, grid, (0, 0, 0), (480, 480), s)(sample, item_rng(0))
    assert unpack(packed, "normals").shape == (480, 480, 3)
    levels = (255 * image).round().numpy()
    columns = levels[0] + 256 * levels[1]
    assert 0.5 * 480**2 * 0.97 <= (columns.max() - columns.min() + 1) ** 2 <= 480**2
    assert set(np.diff(columns[0])) <= {0.0, 1.0}  # the nearest pixels, of images too


def test_resizing_targets_samples_cell_centres() -> None:
    """Pillow's rule, at sizes where no centre falls on an edge."""
    depth = np.random.default_rng(0).random((48, 64)).astype(np.float32)
    for size in ((96, 128), (32, 256), (80, 128)):
        expected = np.asarray(Image.fromarray(depth).resize(size[::-1], Image.Resampling.NEAREST))
        assert np.array_equal(resize_target(depth, size), expected)


@pytest.mark.slow
def test_frames_of_another_height_are_resized_and_scored_at_their_own() -> None:
    result = neco_bench.run(
        "baseline_rgb", "shapes_depth", limit=4, workers=0, changes={"input_size": 112, "iterations": 2}
    )
    assert result.protocol == "clean-1*"
    assert result.provenance["features"]["used_size"] == "112x112"
    frame = Frame("whole", (224, 224), 112)
    grid = InputGrid((112, 112), (112, 112))
    sample = ShapesDepth(None, "val")[0]
    image, packed = FrameInput(frame, grid, (0, 0, 0))(sample, item_rng(0))
    assert image.shape == (3, 112, 112)
    assert unpack(packed, "depth").shape == (224, 224)


def test_frames_of_other_sizes_and_no_depth_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cut(ShapesDepth):
        def __getitem__(self, index: int) -> DenseSample:
            sample = super().__getitem__(index)
            return DenseSample(sample.image[index:], sample.target[index:], sample.id)

    class Empty(ShapesDepth):
        def __getitem__(self, index: int) -> DenseSample:
            sample = super().__getitem__(index)
            target = sample.target * (self.split != self.empty)
            return DenseSample(sample.image, target, sample.id)

        def sample_sanity_check(self) -> list[str]:
            return []

        empty = "train"

    changes = {"iterations": 2, "batch_size": 2}
    monkeypatch.setattr(DATASETS, "load", lambda name: Cut)
    with pytest.raises(BadInputError, match="all must have the same size"):
        neco_bench.run("baseline_rgb", "shapes_depth", limit=4, workers=0, changes=changes, features="off")
    monkeypatch.setattr(DATASETS, "load", lambda name: Empty)
    with pytest.raises(BadInputError, match="No pixel of the training images has a target"):
        neco_bench.run("baseline_rgb", "shapes_depth", limit=4, workers=0, changes=changes, features="off")
    Empty.empty = "val"
    with pytest.raises(NumericalError, match="is not a number"):
        neco_bench.run("baseline_rgb", "shapes_depth", limit=4, workers=0, changes=changes, features="off")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"iterations": 5, "epochs": 5}, "give iterations or epochs"),
        ({"max_depth": 0.0005}, "min_depth must be below max_depth"),
        ({"rotation_probability": 0.5, "target": "normals"}, "normals are not rotated"),
        ({"regions": ["middle"]}, "regions"),
    ],
)
def test_constants_that_do_not_fit_together(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        settings_of("shapes_depth", **change)


@pytest.mark.slow
def test_tables_compare_and_pictures(tmp_path: Path) -> None:
    """The command line: lower is better in the summary, the ranking and the comparison; maps are drawn."""
    results = tmp_path / "results"
    changes = ["--set", "iterations=12", "--set", "learning_rate=0.02", "--set", "batch_size=4"]
    arguments = ["--task", "shapes_depth,shapes_normals", "--limit", 6, "--out", results]
    assert neco("run", "--model", "baseline_rgb,baseline_hog", *arguments, *changes).code == 0
    answer = neco("compare", "baseline_rgb", "baseline_hog", "--results", results, "--json")
    rows = {row["name"].partition("@")[0]: row for row in json.loads(answer.out)["tasks"]}
    store = ResultStore(results)
    for task in ("shapes_depth", "shapes_normals"):
        first, second = (
            next(r for r in store.load_all() if (r.model, r.task) == (model, task))
            for model in ("baseline_rgb", "baseline_hog")
        )
        metric = first.primary_metric
        assert rows[task]["difference"] == pytest.approx(second.metrics[metric] - first.metrics[metric])
    for task, words in (("shapes_depth", " m"), ("shapes_normals", "angle")):
        out = tmp_path / task
        answer = neco(
            "show", "baseline_hog", "--task", task, "--results", results, "--out", out, "--worst", 1, "--best", 1
        )
        assert answer.code == 0, answer.err
        assert "warning" not in answer.err
        page = next(out.rglob("index.html")).read_text()
        assert "ground truth" in page
        assert words in page
        assert "largest errors" in page
        grid = np.asarray(Image.open(next(out.rglob("grid.png"))))
        assert len(np.unique(grid.reshape(-1, 3), axis=0)) > 500


@pytest.mark.slow
def test_dry_run_says_what_it_costs() -> None:
    answer = neco(
        "run", "--model", "baseline_rgb", "--task", "shapes_depth,shapes_normals@probe3d-1", "--dry-run", "--json"
    )
    assert answer.code == 0
    rows = json.loads(answer.out)
    assert all(row["hours"] > 0 and row["memory_gb"] > 0 for row in rows)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    words = ["run", "--model", "baseline_rgb", "--task", "shapes_depth", "--limit", 7, "--set", "iterations=4"]
    words += ["--set", "batch_size=4", "--batch-size", 2, "--features", "off"]
    assert neco(*words, "--out", tmp_path / "one").code == 0
    for process in processes.launch(2, [*words, "--out", tmp_path / "two"], tmp_path):
        assert process.wait() == 0, process.err
    (first,), (second,) = (ResultStore(tmp_path / name).load_all() for name in ("one", "two"))
    assert second.metrics == pytest.approx(first.metrics, rel=1e-5)
    assert second.provenance["processes"] == 2


def nyu_root(real_data: Path, folder: Path) -> Path:
    """The ten real frames, all of the test split, as five for training and five for tests.

    Training frames get numbers of training frames: what the head learns from is real, the split is not official.
    """
    source = real_data / "nyuv2"
    names = sorted(path.stem for path in (source / "test_rgb").glob("*.png"))
    for i, name in enumerate(names):
        split, number = ("train", f"{3 + i:04d}") if i < 5 else ("test", name)
        for kind in ("rgb", "depth"):
            place = folder / "nyuv2" / f"{split}_{kind}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.png").symlink_to(source / f"test_{kind}" / f"{name}.png")
    return folder


def test_real_frames_of_nyuv2_are_marked_as_a_part(real_data: Path, tmp_path: Path) -> None:
    root = nyu_root(real_data, tmp_path)
    changes = {"iterations": 2, "batch_size": 2}
    result = neco_bench.run("baseline_rgb", "nyu_depth@clean-1", data_root=root, workers=0, changes=changes)
    assert result.subset == {"train": {"found": 5, "expected": 795}, "test": {"found": 5, "expected": 654}}
    assert not result.rankable
    assert result.provenance["features"]["used_size"] == "640x480"
    assert result.metrics["rmse"] == result.metrics["rmse/eigen"]
    assert result.metrics["rmse"] != result.metrics["rmse/full"]
    assert result.drawn is not None
    assert result.drawn.unit == "scene"
