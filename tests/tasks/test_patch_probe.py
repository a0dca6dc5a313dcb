"""Patch probes: the parts against naive loops and scikit-learn, the whole against a second pipeline, quirks by hand."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from neco_bench.tasks.patch_probe import knn, logistic
from neco_bench.tasks.patch_probe import task as probe
from neco_bench.tasks.patch_probe.knn import nearest_rows, vote
from neco_bench.tasks.patch_probe.logistic import Logistic, fit_logistic, fit_on_device
from neco_bench.tasks.patch_probe.patches import Patches, standardise
from neco_bench.tasks.patch_probe.settings import Distance, Settings
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import neco_bench
from neco_bench.core.errors import BadInputError, NumericalError, UsageError
from neco_bench.core.protocol import protocol
from neco_bench.core.task import Context
from neco_bench.data.base import IGNORE, Sample, SegmentationDataset, Void
from neco_bench.data.load import DATASETS
from neco_bench.encoders import DenseFeatures, Encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.features.patches import majority_label, patchify, unpatchify
from neco_bench.features.transforms import ResizeSquare
from neco_bench.metrics.intervals import miou_interval
from tests.tasks.test_shapes import Oracle, Painted
from tests.typed import load_segmentation, present

CPU = torch.device("cpu")
VOIDS: tuple[Void, ...] = ("wins ties", "loses ties", "never votes")


def constants(name: str) -> Mapping[str, Any]:
    return protocol("patch_probe", name).constants


def some_settings(name: str = "capi-1", **changes: Any) -> Settings:
    return Settings(**{**constants(name), "input_size": 16, "method": "knn", "ks": [1], **changes})


class Cells(Encoder):
    """The mean colour of each 4 x 4 cell."""

    name, weights_id = "cells", "0"
    embed_dim, stride = 3, 4

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        return DenseFeatures(F.avg_pool2d(images, 4), 4)


class Given(SegmentationDataset):
    """Masks (n, H, W) as given; each pixel has a colour of its own for each id of `seen`, (n, H, W) too."""

    name = "given"
    classes = tuple(map(str, range(150)))

    def __init__(self, masks: np.ndarray, values: np.ndarray) -> None:
        self.masks, self.values, self.split = masks, values, "train"
        self.ids = tuple(map(str, range(len(masks))))

    def __getitem__(self, index: int) -> Sample:
        values = self.values[index]
        image = np.stack([values, 255 - values, values // 2], 2).astype(np.uint8)
        return Sample(image, self.masks[index], self.ids[index])

    def fingerprint(self) -> str:
        return ""

    @property
    def palette(self) -> np.ndarray:
        return np.zeros((150, 3), np.uint8)


# The most frequent label, with the three rules for void.


def naive(labels: list[int], void: Void) -> int:
    votes = [label for label in labels if label != IGNORE or void != "never votes"] or [IGNORE]
    most = max(Counter(votes).values())
    tied = [label for label, count in Counter(votes).items() if count == most]
    return IGNORE if void == "wins ties" and IGNORE in tied else min(tied)


LABELS = st.sampled_from([0, 1, 2, 4, IGNORE])


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=LABELS))
def test_most_frequent_equals_a_loop(labels: np.ndarray) -> None:
    for void in VOIDS:
        answers = majority_label(torch.from_numpy(labels), 5, void).tolist()
        assert answers == [naive(row, void) for row in labels.tolist()]


def test_ties_by_hand() -> None:
    labels = torch.tensor([[4, 1, 1, 4], [IGNORE, 3, 3, IGNORE], [IGNORE, IGNORE, 2, IGNORE]], dtype=torch.uint8)
    assert majority_label(labels, 5, "wins ties").tolist() == [1, IGNORE, IGNORE]
    assert majority_label(labels, 5, "loses ties").tolist() == [1, 3, IGNORE]
    assert majority_label(labels, 5, "never votes").tolist() == [1, 3, 2]
    reference = labels.mode(1).values  # the operator of the reference, with void as 255 and, on ADE20K, as 0
    assert torch.equal(majority_label(labels, 5, "loses ties"), reference)
    assert torch.equal(majority_label(labels, 5, "wins ties") + 1, (labels + 1).mode(1).values)


@settings(max_examples=40, deadline=None)
@given(
    blocks=hnp.arrays(np.uint8, (6, 4), elements=LABELS),
    ids=hnp.arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.integers(0, 5)),
)
def test_votes_equal_a_loop(blocks: np.ndarray, ids: np.ndarray) -> None:
    """Per pixel of the block; where void never votes and nobody else does, the majority labels do."""
    majority = np.array([naive([*row, 3], "never votes") for row in blocks.tolist()], np.uint8)
    patches = Patches(torch.zeros(6, 1), torch.from_numpy(blocks), torch.from_numpy(majority))
    for void in VOIDS:
        expected = np.array([[naive(column, void) for column in blocks[row].T.tolist()] for row in ids], np.uint8)
        if void == "never votes":
            fallback = [naive(majority[row].tolist(), void) for row in ids]
            expected = np.where(expected == IGNORE, np.array(fallback)[:, None], expected)
        whole = vote(patches, torch.from_numpy(ids), 5, void, CPU)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(knn, "VOTE_BYTES", 1)
            one_by_one = vote(patches, torch.from_numpy(ids), 5, void, CPU)
        np.testing.assert_array_equal(whole.numpy(), expected)
        np.testing.assert_array_equal(one_by_one.numpy(), expected)


def test_blocks_are_rows_of_cells_and_fit_together_again() -> None:
    mask = np.arange(36, dtype=np.uint8).reshape(6, 6)
    blocks = patchify(mask, 2)
    assert blocks[1].tolist() == [2, 3, 8, 9]
    assert blocks[3].tolist() == [12, 13, 18, 19]
    np.testing.assert_array_equal(unpatchify(blocks, 3), mask)


def test_squash_is_bicubic_and_takes_the_mask_along_or_not() -> None:
    rng = np.random.default_rng(0)
    sample = Sample(rng.integers(0, 256, (30, 20, 3), np.uint8), rng.integers(0, 9, (30, 20), np.uint8), "")
    image, mask = ResizeSquare(12, "pil", bicubic=True)(sample, rng)
    expected = np.asarray(Image.fromarray(sample.image).resize((12, 12), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), expected)
    expected = np.asarray(Image.fromarray(sample.mask).resize((12, 12), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(ResizeSquare(12, "native", bicubic=True)(sample, rng)[1], sample.mask)


# Neighbours and logistic regression.


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_neighbours_equal_brute_force(distance: Distance, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks smaller than k, chunks that do not divide, and one chunk. Lengths differ, so the two distances do too."""
    monkeypatch.setattr(knn, "CHUNK", chunk)
    rng = np.random.default_rng(1)
    offset = {"cosine": 1, "l2": 1000}[distance]  # which must not cost digits
    keys, queries = (rng.normal(1, 1, (n, 9)) * rng.uniform(0.5, 2, (n, 1)) + offset - 1 for n in (300, 90))
    keys, queries = (x.astype(np.float32).astype(np.float64) for x in (keys, queries))
    if distance == "l2":
        distances = np.square(queries[:, None] - keys).sum(2)
    else:
        distances = 1 - queries @ keys.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(keys, axis=1)
    expected = distances.argsort(1)[:, :10]
    answers = nearest_rows(torch.from_numpy(keys).float(), torch.from_numpy(queries).float(), 10, distance, CPU)
    np.testing.assert_array_equal(answers.numpy(), expected)


def test_too_many_neighbours_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="ks="):
        nearest_rows(torch.zeros(5, 2), torch.zeros(1, 2), 6, "l2", CPU)


def on_device(features: Tensor, labels: Tensor, c: float, max_iterations: int) -> Logistic:
    """What runs on GPUs, here on the CPU."""
    present, target = labels.unique(return_inverse=True)
    return fit_on_device(features, target, present, c, max_iterations, 1e-12, CPU)


@pytest.mark.parametrize("ids", [(0, 3, 7, 200), (2, 5)])
@pytest.mark.parametrize("c", [1e-6, 1.4e-3, 1.93])
def test_logistic_regression_is_that_of_scikit_learn(
    c: float, ids: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over chunks, for class ids with gaps, and for two classes; at the smallest C the free intercepts decide."""
    monkeypatch.setattr(logistic, "CHUNK", 400)
    rng = np.random.default_rng(0)
    shares = np.array([0.5, 0.3, 0.15, 0.05][: len(ids)])
    labels = rng.choice(ids, 1500, p=shares / shares.sum()).astype(np.uint8)
    features = (rng.normal(0, 1, (1500, 8)) + 0.01 * labels[:, None] * rng.normal(0, 1, 8)).astype(np.float32)
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    model = fit_logistic(x, y, c, max_iterations=1000, tolerance=1e-12, device=CPU)
    theirs = LogisticRegression(C=c, max_iter=1000, tol=1e-12).fit(features.astype(np.float64), labels)
    optimum = LogisticRegression(C=c, max_iter=5000, tol=1e-9, solver="newton-cg").fit(features.astype(float), labels)
    for ours, by, tolerance in ((model, theirs, 1e-12), (on_device(x, y, c, 1000), optimum, 1e-5)):
        assert ours.classes.tolist() == by.classes_.tolist()
        probabilities = torch.softmax(ours.logits(x), 1).numpy()
        np.testing.assert_allclose(probabilities, by.predict_proba(features.astype(np.float64)), atol=tolerance)
        assert (ours.predict(x).numpy() == by.predict(features.astype(np.float64))).all()
        assert ours.converged
        assert 2 < ours.iterations < 1000


def test_a_single_class_is_fitted_by_nothing() -> None:
    model = fit_logistic(torch.rand(5, 3), torch.full((5,), 4).byte(), 1.0, max_iterations=5, tolerance=0, device=CPU)
    assert model.predict(torch.rand(2, 3)).tolist() == [4, 4]
    assert model.converged


def test_logistic_regression_says_where_it_was_stopped() -> None:
    """Features that can be separated, and correlated as those of encoders are: 60 iterations do not suffice. On a GPU
    the same steps are taken."""
    rng = np.random.default_rng(0)
    features = torch.from_numpy((rng.normal(0, 1, (200, 40)) @ rng.normal(0, 1, (40, 40))).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, 4, 200).astype(np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the result says it
        model = fit_logistic(features, labels, 100.0, max_iterations=60, tolerance=1e-12, device=CPU)
    other = on_device(features, labels, 100.0, 60)
    assert (model.iterations, model.converged) == (other.iterations, other.converged) == (60, False)
    np.testing.assert_allclose(model.weights, other.weights, rtol=1e-6, atol=1e-8)


def test_a_loss_without_a_value_is_a_numerical_error() -> None:
    features = torch.full((4, 2), torch.nan)
    with pytest.raises(NumericalError, match="C = 1"):
        fit_logistic(features, torch.tensor([0, 1, 0, 1]).byte(), 1.0, max_iterations=5, tolerance=0, device=CPU)


# Training patches.


@given(st.integers(2, 30000), st.integers(0, 3))
def test_a_tenth_of_the_images_is_held_out(count: int, seed: int) -> None:
    fit, held_out = probe.hold_out(count, 0.1, seed)
    assert len(held_out) == max(1, count // 10)
    assert sorted(fit + held_out) == list(range(count))


def test_the_seed_moves_the_held_out_images() -> None:
    assert probe.hold_out(100, 0.1, 0) == probe.hold_out(100, 0.1, 0) != probe.hold_out(100, 0.1, 1)
    assert probe.hold_out(2, 0.99, 0)[0]
    with pytest.raises(UsageError, match="--limit 2"):
        probe.hold_out(1, 0.1, 0)


def test_patches_that_are_mostly_void_are_dropped_and_the_rest_counts() -> None:
    """One image has patches with 16, 9, 8 and 7 void pixels of 16, the held-out one a void patch. Features are
    standardised by all patches of all other images, the void ones too."""
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 3, (10, 16, 16), np.uint8)
    fit, held_out = probe.hold_out(10, 0.1, 0)
    masks[fit[2]] = 1
    for cell, count in enumerate((16, 9, 8, 7)):
        masks[fit[2], :4, 4 * cell : 4 * cell + 4] = np.where(np.arange(16) < count, IGNORE, 1).reshape(4, 4)
    masks[held_out[0], :4, :4] = IGNORE
    data = Given(masks, rng.integers(0, 256, (10, 16, 16)))
    for void, dropped in (("wins ties", 4), ("loses ties", 3), ("never votes", 3)):
        context = Context(batch_size=3)
        options = some_settings(void=void)
        patches, split, scaler = probe.read_train(FeatureExtractor(Cells(), context), data, options, 16)
        assert context.run.notes["dropped_patches"] == dropped
        assert (split, len(patches)) == (9 * 16 - dropped + 1, 10 * 16 - dropped + 1)
        assert context.run.notes["training_patches"] == 160 - dropped
        images = torch.stack([torch.from_numpy(data[i].image) for i in fit]).permute(0, 3, 1, 2) / 255
        rows = Cells().encode(images).map.permute(0, 2, 3, 1).reshape(-1, 3)
        expected = StandardScaler().fit_transform(rows.double().numpy())
        rows = rows.clone()
        standardise(rows, scaler)
        np.testing.assert_allclose(rows, expected, atol=1e-5)
        everything = probe.refit_rows(patches, split)
        assert len(everything) == 160 - dropped
        assert (everything.labels != IGNORE).all()


def test_max_patches_takes_as_many_of_each_image() -> None:
    rng = np.random.default_rng(0)
    data = Given(np.ones((10, 16, 16), np.uint8), rng.integers(0, 256, (10, 16, 16)))
    context = Context()
    extractor = FeatureExtractor(Cells(), context)
    patches, split, scaler = probe.read_train(extractor, data, some_settings(max_patches=50), 16)
    assert (split, len(patches), scaler.n_samples_seen_) == (9 * 5, 9 * 5 + 16, 9 * 16)
    assert context.run.notes["training_patches"] == 50
    assert len(probe.refit_rows(patches, split)) == 50


def test_masks_of_void_alone_are_bad_input() -> None:
    masks = np.full((10, 16, 16), IGNORE, np.uint8)
    fit, held_out = probe.hold_out(10, 0.1, 0)
    values = np.random.default_rng(0).integers(0, 256, masks.shape)
    masks[held_out] = 1
    with pytest.raises(BadInputError, match="mostly void"):
        probe.run(Cells(), {"train": Given(masks, values), "val": Given(masks, values)}, some_settings(), Context())
    masks[held_out], masks[fit] = IGNORE, 1
    with pytest.raises(BadInputError, match="no labelled pixel"):
        probe.run(Cells(), {"train": Given(masks, values), "val": Given(masks, values)}, some_settings(), Context())


# The whole.


@pytest.mark.slow
def test_one_void_pixel_makes_151_classes() -> None:
    """150 classes, one patch of each and more of class 0; one pixel of 16 of class 5's training patch is void. All else
    is right, so the IoUs are 149 times 1, 15/16, and 0 for void where it is a class."""
    cells = np.zeros((13, 13), np.int64)
    cells.ravel()[:150] = np.arange(150)
    values = np.broadcast_to(cells.repeat(4, 0).repeat(4, 1), (2, 52, 52))
    full = values.astype(np.uint8)
    holed = full.copy()
    holed[:, np.argwhere(full[0] == 5)[0][0], np.argwhere(full[0] == 5)[0][1]] = IGNORE
    data: dict[str, SegmentationDataset] = {"train": Given(holed, values), "val": Given(full, values)}
    for name, method, expected in (
        ("capi-1", "knn", (149 + 15 / 16) / 151),
        ("clean-1", "knn", 1.0),  # void never votes, so the patch's majority label fills the hole
        ("capi-1", "logreg", 1.0),
    ):
        options = some_settings(name, input_size=52, method=method, distances=["l2"], regularisations=[1e7])
        outcome = probe.run(Cells(), data, options, Context())
        assert outcome.metrics["mIoU"] == pytest.approx(expected, rel=1e-12), (name, method)
        assert outcome.metrics["mIoU_present"] == pytest.approx(min(1, expected * 151 / 150), rel=1e-12)
        assert outcome.statistics["confusion"].shape[1:] == ((151,) * 2 if expected < 1 else (150,) * 2)
        assert len(outcome.per_class["IoU"]) == outcome.statistics["confusion"].shape[1]
        ends = miou_interval(outcome.statistics["confusion"], absent=options.absent)
        low, high = present(ends)  # two equal images: as wide as Wilson's
        assert low < 0.4
        assert high > 0.99


@pytest.mark.parametrize("method", ["knn", "logreg"])
def test_the_held_out_images_are_fitted_on_in_the_end(method: str) -> None:
    """Class 2 is in a held-out image only."""
    _, held_out = probe.hold_out(10, 0.1, 0)
    values = np.zeros((10, 16, 16), np.int64)
    values[:, :8] = 100
    values[held_out, :, 8:] = 200
    masks = (values // 100).astype(np.uint8)
    data: dict[str, SegmentationDataset] = {
        "train": Given(masks, values),
        "val": Given(masks[held_out], values[held_out]),
    }
    options = some_settings(method=method, distances=["l2"], regularisations=[1e4])
    context = Context()
    outcome = probe.run(Cells(), data, options, context)
    assert outcome.metrics["mIoU"] == 1
    (value,) = set(context.run.notes["held_out_mIoU"].values())
    assert value < 0.5


def second_pipeline(model: str, options: Settings, limit: int) -> tuple[dict[str, float], float]:
    """Held-out mIoUs of the grid and the mIoU on val of `capi-1`, in plain scikit-learn and torch.mode."""
    encoder = neco_bench.load_encoder(model)
    stride, size = encoder.stride, options.input_size

    def read(split: str, images: list[int]) -> tuple[np.ndarray, np.ndarray]:
        data = load_segmentation("shapes", split, limit=limit)
        features, blocks = [], []
        for image in images:
            sample = data[image]
            picture = Image.fromarray(sample.image).resize((size, size), Image.Resampling.BICUBIC)
            tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
            features.append(encoder.encode(tensor, mean=options.mean, std=options.std).map[0].flatten(1).T.numpy())
            mask = Image.fromarray(sample.mask).resize((size, size), Image.Resampling.NEAREST)
            folded = F.unfold(torch.from_numpy(np.array(mask))[None, None].double(), stride, stride=stride)
            blocks.append(folded[0].T.byte().numpy())
        return np.concatenate(features), np.concatenate(blocks)

    fit, held_out = probe.hold_out(limit, options.holdout, options.holdout_seed)
    (x, y), (x_held, y_held), (x_val, y_val) = (
        read("train", fit),
        read("train", held_out),
        read("val", list(range(limit))),
    )
    scaler = StandardScaler().fit(x)
    x, x_held, x_val = (scaler.transform(part.astype(np.float64)) for part in (x, x_held, x_val))

    def predicted(x: np.ndarray, y: np.ndarray, queries: np.ndarray, point: tuple[Any, ...]) -> np.ndarray:
        majority = torch.from_numpy(y).mode(1).values.numpy()
        x, y, majority = x[majority != IGNORE], y[majority != IGNORE], majority[majority != IGNORE]
        if options.method == "logreg":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model = LogisticRegression(C=point[0], max_iter=1000, tol=1e-12).fit(x, majority)
            return np.repeat(model.predict(queries)[:, None], y.shape[1], 1)
        k, distance = point
        if distance == "cosine":
            x, queries = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, queries))
        near = (np.square(x).sum(1) - 2 * queries @ x.T).argsort(1)[:, :k]
        return torch.from_numpy(y[near]).mode(1).values.numpy()

    def score(truth: np.ndarray, guess: np.ndarray) -> float:
        return float(jaccard_score(truth[truth != IGNORE], guess[truth != IGNORE], average="macro"))

    if options.method == "logreg":
        grid: dict[tuple[Any, ...], str] = {(c,): f"C={c:.4g}" for c in options.regularisations}
    else:
        grid = {(k, d): f"k={k} {d}" for k in options.ks for d in options.distances}
    scores = {point: score(y_held, predicted(x, y, x_held, point)) for point in grid}
    best = max(scores, key=lambda point: scores[point])
    final = predicted(np.concatenate([x, x_held]), np.concatenate([y, y_held]), x_val, best)
    return {grid[point]: value for point, value in scores.items()}, score(y_val, final)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["knn", "logreg"])
def test_the_protocol_equals_a_second_pipeline(method: str) -> None:
    cs = constants("capi-1")["regularisations"][1:5]
    options = some_settings(input_size=56, method=method, ks=[1, 3, 10], regularisations=cs)
    data = {split: load_segmentation("shapes", split, limit=12) for split in ("train", "val")}
    context = Context()
    outcome = probe.run(neco_bench.load_encoder("baseline_hog"), data, options, context)
    grid, expected = second_pipeline("baseline_hog", options, 12)
    assert context.run.notes["held_out_mIoU"] == pytest.approx(grid, abs=1e-9)
    assert outcome.metrics["mIoU"] == pytest.approx(expected, abs=1e-9)
    assert context.run.notes["chosen"] == max(grid, key=lambda name: grid[name])
    assert len(set(grid.values())) > 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["knn", "logreg"])
def test_an_oracle_is_nearly_perfect(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """4-pixel blocks against full masks: that is what it lacks."""
    monkeypatch.setattr(DATASETS, "load", lambda name: Painted)
    changes = {"regularisations": [1.0], "ks": [1, 3]}
    result = neco_bench.run(Oracle(), f"shapes_{method}@clean-1", limit=16, workers=0, changes=changes)
    assert result.metrics["mIoU"] >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("method", ["knn", "logreg"])
def test_batch_size_moves_nothing_and_native_masks_are_counted_whole(method: str, tmp_path: Path) -> None:
    changes = {"input_size": 112, "regularisations": [1e-3, 1.0], "max_iterations": 30}
    results = [
        neco_bench.run(
            "baseline_rgb", f"shapes_{method}@clean-1", limit=6, workers=0, batch_size=size, changes=changes, out=out
        )
        for size, out in ((16, tmp_path / "a"), (5, tmp_path / "b"), (1, tmp_path / "c"))
    ]
    assert results[0].metrics == results[1].metrics == results[2].metrics
    assert results[0].ci95 == results[1].ci95 == results[2].ci95
    confusion = neco_bench.ResultStore(tmp_path / "a").statistics(results[0])["confusion"]
    masks = [load_segmentation("shapes", "val", limit=6)[i].mask for i in range(6)]
    assert confusion.sum((1, 2)).tolist() == [int((mask != IGNORE).sum()) for mask in masks]
    assert 0 < results[0].metrics["mIoU"] < 1
