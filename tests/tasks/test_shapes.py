"""All families on the embedded data: known answers for an oracle and a blind encoder, an order for the baselines, and
numbers that follow from the stored per-image statistics."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import neco_bench
from neco_bench.core.errors import BadInputError, NumericalError
from neco_bench.core.protocol import all_cards
from neco_bench.data.base import IGNORE, Sample
from neco_bench.data.load import DATASETS
from neco_bench.data.shapes import Shapes
from neco_bench.encoders import DenseFeatures, Encoder
from neco_bench.metrics import segmentation
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from tests.typed import load_segmentation

CARDS = {name: card for name, card in all_cards()[0].items() if card.dataset in ("shapes", "shapes_pairs")}
CASES = [f"{card.name}@{protocol}" for card in CARDS.values() for protocol in card.protocols]
# Few images and rounds; the constants that say what is measured stay.
SMALL: dict[str, dict[str, Any]] = {
    "in_context": {"input_size": 112},
    "linear_segmentation": {"input_size": 112, "epochs": 2, "batch_size": 3},
    "linear_segmentation@dinov2-1": {"input_size": 112, "iterations": 4, "batch_size": 3},
    **{
        f"linear_segmentation@{name}": {"input_size": 112, "epochs": 2, "batch_size": 3}
        for name in ("naf-1", "jafar-1", "anyup-1")
    },
    "linear_segmentation@leopart-fcn-1": {"input_size": 112, "epochs": 2, "batch_size": 3, "channels": 16},
    "linear_segmentation@dinov3-1": {"input_size": 112, "iterations": 4, "evaluate_every": 2, "batch_size": 3},
    "finetuning": {"input_size": 112, "epochs": 1, "batch_size": 3},
    "patch_probe": {"input_size": 112, "ks": [1, 3], "regularisations": [0.1, 10.0], "max_iterations": 20},
    "overclustering": {"input_size": 112, "iterations": 5, "redos": 1, "seeds": 2},
    "unsupervised_segmentation": {"input_size": 112, "iterations": 3, "redos": 1, "seeds": 2, "direct_seeds": 2},
    "correspondence": {"input_size": 112},
}
SMALL["object_discovery"] = {"input_size": 112, "features": "patches"}  # no keys
SMALL["unsupervised_segmentation@neco-1"] = {**SMALL["unsupervised_segmentation"], "foreground": "cut"}  # no attention


class Painted(Shapes):
    """The shapes with their answer as the image: each pixel has the colour of its class, void that of background."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        colours = self.palette[np.where(sample.mask == IGNORE, 0, sample.mask)]
        return Sample(colours, sample.mask, sample.id)


class Oracle(Encoder):
    """Reads the class shares of each cell off the colours. Knows nothing of the data set but its palette."""

    name, weights_id = "oracle", "0"
    embed_dim, stride = len(Shapes.classes), 4

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        palette = torch.from_numpy(Painted.__new__(Painted).palette).float() / 255
        palette = (palette - torch.tensor(self.mean)) / torch.tensor(self.std)
        # hbird-2 divides by another std for blue; the nearest colour is the same one.
        distance = (images[:, None] - palette[None, :, :, None, None]).square().sum(2)
        classes = F.one_hot(distance.argmin(1), len(palette)).permute(0, 3, 1, 2).float()
        return DenseFeatures(F.avg_pool2d(classes, self.stride), self.stride)


class Blind(Encoder):
    """The same feature everywhere."""

    name, weights_id = "blind", "0"
    embed_dim, stride = 4, 16

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        height, width = images.shape[-2:]
        return DenseFeatures(images.new_ones(len(images), 4, height // 16, width // 16), 16)


class Rescaled(Encoder):
    """The mean colour of each cell of 8 pixels, and its square, times a factor."""

    name, weights_id = "rescaled", "0"
    embed_dim, stride = 6, 8

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        return DenseFeatures(F.avg_pool2d(torch.cat([images, images.square()], 1), 8) * self.factor, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [
        "shapes_ic@hbird-2",
        "shapes_knn@capi-1",
        "shapes_overcluster_50@clean-1",
        "shapes_correspondence@pck-1",
        "shapes_correspondence@dift-1",
    ],
)
def test_the_scale_of_features_moves_nothing(task: str) -> None:
    """Powers of two alter no digit, so the numbers are equal; below 1e-38 float32 has fewer digits."""
    family = CARDS[task.partition("@")[0]].family
    metrics = [
        neco_bench.run(Rescaled(factor), task, limit=6, workers=0, changes=SMALL[family]).metrics
        for factor in (1.0, 2.0**122, 2.0**-100, 1e-40)
    ]
    assert metrics[0] == metrics[1] == metrics[2]
    assert metrics[3] == pytest.approx(metrics[0], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "task",
    [
        "shapes_ic@hbird-2",
        "shapes_ic@clean-1",
        "shapes_linear@neco-1",
        "shapes_linear@dinov3-1",
        "shapes_linear@naf-1",
        "shapes_finetune@clean-1",
    ],
)
def test_masks_of_void_alone_are_an_error(task: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Void(Shapes):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            mask = np.full_like(sample.mask, IGNORE) if self.split == split else sample.mask
            return Sample(sample.image, mask, sample.id)

    monkeypatch.setattr(DATASETS, "load", lambda name: Void)
    family = CARDS[task.partition("@")[0]].family
    changes = SMALL.get(f"{family}@{task.partition('@')[2]}", SMALL[family])
    error, message = (
        (BadInputError, "training masks contain only void")
        if split == "train"
        else (NumericalError, "no scored pixel or point has ground truth. Check the masks")
    )
    with pytest.raises(error, match=message):
        neco_bench.run("baseline_rgb", task, limit=4, workers=0, changes=changes, features="off")


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DATASETS, "load", lambda name: Painted)


@pytest.mark.slow
@pytest.mark.usefixtures("painted")
@pytest.mark.parametrize("protocol", ["hbird-2", "clean-1"])
def test_an_oracle_is_nearly_perfect_in_context(protocol: str) -> None:
    """Under the protocol as it is, on the whole set; what it lacks is the grid: 4-pixel cells against full masks."""
    result = neco_bench.run(Oracle(), f"shapes_ic@{protocol}", workers=0)
    assert result.protocol == protocol
    assert result.n_images == 80
    assert result.metrics["mIoU"] >= 0.98
    assert result.metrics["mIoU_identity"] == result.metrics["mIoU"]


@pytest.mark.usefixtures("painted")
def test_an_oracle_is_nearly_perfect_by_clustering() -> None:
    """Clusters are cells, not upsampled shares: that costs up to 0.01 more."""
    changes = {"iterations": 20, "redos": 3, "seeds": 1}
    result = neco_bench.run(Oracle(), "shapes_overcluster_50@clean-1", limit=16, workers=0, changes=changes)
    assert result.metrics["mIoU"] >= 0.98


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("shapes_ic", {"neighbours": 30}),  # where all rows tie, the first ones vote: any class may win
        ("shapes_ic", {"neighbours": 300}),  # enough to have background in the majority
        ("shapes_overcluster_50", {"seeds": 1, "redos": 1}),
    ],
)
def test_a_blind_encoder_sees_one_class(task: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Chance here: one class everywhere, which has its share of the pixels as IoU, and all others 0; at best it is
    background, with 0.07."""
    result = neco_bench.run(Blind(), f"{task}@clean-1", limit=16, workers=0, changes=changes, out=tmp_path)
    confusion = ResultStore(tmp_path).statistics(result)["confusion"].reshape(-1, 9, 9).sum(0)
    (predicted,) = np.flatnonzero(confusion.sum(0))
    shares = confusion.sum(1) / confusion.sum()
    assert (shares > 0).all()
    assert shares.argmax() == 0
    assert result.metrics["mIoU"] == pytest.approx(shares[predicted] / 9, rel=1e-12)
    assert 0.06 < shares[0] / 9 < 0.08
    assert predicted == 0 or changes.get("neighbours") == 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "changes", "limit"),
    [
        ("shapes_ic", {}, 16),
        ("shapes_overcluster_50", {"iterations": 10, "redos": 1, "seeds": 1}, 24),
        ("shapes_correspondence", {}, 100),
    ],
)
def test_gradients_beat_colour(task: str, changes: dict[str, Any], limit: int) -> None:
    colour, gradients = (
        neco_bench.run(model, task, limit=limit, workers=0, changes=changes)
        for model in ("baseline_rgb", "baseline_hog")
    )
    metric = colour.primary_metric
    assert colour.metrics[metric] < gradients.metrics[metric]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ResultStore:
    return ResultStore(tmp_path_factory.mktemp("results"))


def _run(case: str, store: ResultStore) -> Result:
    """A small run, from the store after the first time."""
    name, _, protocol = case.partition("@")
    family = CARDS[name].family
    if family == "unsupervised_segmentation":
        pytest.importorskip("infomap")
    changes = SMALL.get(f"{family}@{protocol}", SMALL[family])
    return neco_bench.run("baseline_rgb", case, limit=6, workers=0, changes=changes, out=store.folder)


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_fractions_inside_their_intervals(case: str, store: ResultStore) -> None:
    result = _run(case, store)
    card = CARDS[case.partition("@")[0]]
    assert result.protocol == case.partition("@")[2] + "*"
    assert result.primary_metric == card.metric
    for other in all_cards()[0].values():  # cards on data that is not here
        if other.family == card.family:
            assert other.metric in result.metrics
    assert result.n_images == 6
    assert card.metric in result.ci95
    for name, value in result.metrics.items():
        assert 0 <= value <= 1, name
    for name, (low, high) in result.ci95.items():
        assert 0 <= low <= result.metrics[name] <= high <= 1, name
    for values in result.per_class.values():
        assert all(value is None or 0 <= value <= 1 for value in values.values())
    assert result.provenance["features"].get("used_size", 112) == 112


@pytest.mark.parametrize("case", [case for case in CASES if not re.search("correspondence|discovery", case)])
def test_stored_confusions_give_the_miou(case: str, store: ResultStore) -> None:
    """Confusions are (n, C, C), or (seeds, n, C, C), and hold every pixel that is not void once."""
    result = _run(case, store)
    settings = result.provenance["settings"]
    confusion = store.statistics(result)["confusion"]
    per_seed = confusion[None] if confusion.ndim == 3 else confusion
    classes = 10 if case == "shapes_knn@capi-1" else 9  # k-NN may answer "void" there
    assert per_seed.shape[1:] == (6, classes, classes)
    sums = per_seed.sum(1)
    scores = [segmentation.mean_iou(total, absent=settings["absent"]) for total in sums]
    assert result.metrics["mIoU"] == pytest.approx(np.mean(scores), rel=1e-12)
    iou = np.mean([segmentation.iou_per_class(total) for total in sums], axis=0)
    assert list(result.per_class["IoU"].values()) == [None if np.isnan(v) else pytest.approx(v) for v in iou]
    if case.endswith("clean-1"):  # scored at native resolution
        val = load_segmentation("shapes", "val", limit=6)
        truth = [np.bincount(val[i].mask[val[i].mask != IGNORE], minlength=9) for i in range(6)]
        assert np.array_equal(per_seed.sum(-1), np.broadcast_to(truth, per_seed.shape[:3]))


@pytest.mark.parametrize("case", [case for case in CASES if "correspondence" in case])
def test_stored_hits_give_the_pck(case: str, store: ResultStore) -> None:
    result = _run(case, store)
    arrays = store.statistics(result)
    hits, totals, category = arrays["hits"], arrays["totals"], arrays["category"]
    for column, alpha in enumerate((0.01, 0.05, 0.10)):
        if case.endswith(("probe3d-1", "sd-dino-1")):  # the mean over categories
            ratios = [hits[category == c, column].sum() / totals[category == c].sum() for c in np.unique(category)]
            expected = np.mean(ratios)
        elif case.endswith("geoaware-1"):  # the mean over pairs
            expected = np.mean(hits[:, column] / totals)
        else:
            expected = hits[:, column].sum() / totals.sum()
        assert result.metrics[f"PCK@{alpha:.2f}"] == pytest.approx(expected, rel=1e-12)
    assert (hits[:, 0] <= hits[:, 1]).all()
    assert (hits[:, 1] <= hits[:, 2]).all()
    assert (hits <= totals[:, None]).all()
    assert len(set(arrays["pair_id"])) == 6
