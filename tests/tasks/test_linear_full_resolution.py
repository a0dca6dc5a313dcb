"""The probes of feature-upsampler papers: crop, order, rates, training and scores by independent computations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from neco_bench.tasks.linear_segmentation import full_resolution
from neco_bench.tasks.linear_segmentation.full_resolution import (
    CentreCrop,
    MirroredBehind,
    train_probe,
    training_order,
)
from neco_bench.tasks.linear_segmentation.full_resolution_settings import Settings
from neco_bench.tasks.linear_segmentation.heads import new_head
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode

from neco_bench import load_encoder
from neco_bench.core.errors import NumericalError
from neco_bench.core.protocol import protocol
from neco_bench.core.task import Context, Outcome
from neco_bench.data.base import IGNORE, Sample
from neco_bench.data.shapes import Shapes
from neco_bench.encoders import DenseFeatures, Encoder
from neco_bench.features.store import FeatureStore
from neco_bench.viz.draw import draw_segmentation
from tests.tasks.test_shapes import Blind, Oracle, Painted
from tests.typed import load_segmentation, present

NAMES = ("naf-1", "jafar-1", "anyup-1")


def make_settings(name: str = "naf-1", **changes: Any) -> Settings:
    return Settings(**{**protocol("linear_segmentation", name).constants, "input_size": 448, **changes})


def test_the_constants_are_those_of_the_sources() -> None:
    """more_evaluations.md, section 4."""
    for name, batch_size in zip(NAMES, (2, 2, 4), strict=True):
        s = make_settings(name)
        assert (s.learning_rate, s.weight_decay, s.epochs) == (5e-4, 1e-5, 20)
        assert (s.batch_size, s.flip_probability, s.absent) == (batch_size, 0.5, "union")
        assert s.mean is s.std is None  # the encoder's own


def picture(height: int, width: int, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Sample(image, rng.integers(0, 21, (height, width), dtype=np.uint8), f"{height}x{width}")


@pytest.mark.parametrize("size", [448, 56])
@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (281, 500), (448, 448), (449, 451), (64, 97), (97, 64)])
def test_the_crop_is_torchvisions(shape: tuple[int, int], size: int) -> None:
    sample = picture(*shape)
    image, mask = CentreCrop(size)(sample, np.random.default_rng(0))
    resize = [
        T.Resize(size, interpolation=rule) for rule in (InterpolationMode.BILINEAR, InterpolationMode.NEAREST_EXACT)
    ]
    expected, labels = (
        T.Compose([rule, T.CenterCrop(size)])(Image.fromarray(pixels))
        for rule, pixels in zip(resize, (sample.image, sample.mask), strict=True)
    )
    assert torch.equal(image, T.ToTensor()(expected))
    assert np.array_equal(mask, np.asarray(labels))
    assert mask.shape == (size, size)


def test_the_crop_by_hand() -> None:
    """4 x 7 pixels at their own size: 3 columns too many, of which 1.5, so 2, are left of the crop."""
    mask = np.arange(28, dtype=np.uint8).reshape(4, 7)
    sample = Sample(np.repeat(mask[..., None], 3, 2), mask, "a")
    image, cropped = CentreCrop(4).crop(sample)
    assert np.array_equal(cropped, mask[:, 2:6])
    assert np.array_equal(image[..., 0], mask[:, 2:6])


class Wide(Shapes):
    """The shapes without their first 27 rows: of what is left and right of the crop, one side has a column more."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return Sample(sample.image[27:], sample.mask[27:], sample.id)


def test_crops_are_mirrored_not_images() -> None:
    data, crop = Wide(None, "val").head(3), CentreCrop(56)
    both = MirroredBehind(data, crop)
    assert len(both) == len(set(both.ids)) == 6
    assert (both.name, both.split, both.fingerprint()) == ("shapes", "val", data.fingerprint())
    rng = np.random.default_rng(0)
    for i in range(3):
        image, mask = crop(data[i], rng)
        same, same_mask = crop(both[i], rng)
        mirrored, mirrored_mask = crop(both[i + 3], rng)  # a crop of what is one already
        assert torch.equal(same, image)
        assert np.array_equal(same_mask, mask)
        assert torch.equal(mirrored, image.flip(-1))
        assert np.array_equal(mirrored_mask, mask[:, ::-1])
        sample = data[i]
        other, _ = crop(Sample(sample.image[:, ::-1], sample.mask[:, ::-1], "mirrored first"), rng)
        assert not torch.equal(other, mirrored)


def test_batches_are_mirrored_whole() -> None:
    settings = make_settings(batch_size=4)
    items = training_order(10, settings, seed=0)
    assert [epoch for epoch, _ in items] == np.repeat(np.arange(20), 10).tolist()
    mirrored = []
    for epoch in range(20):
        own = [index for _, index in items[10 * epoch : 10 * epoch + 10]]
        assert sorted(index % 10 for index in own) == list(range(10))
        batches = [{index >= 10 for index in own[start : start + 4]} for start in (0, 4, 8)]
        assert all(len(batch) == 1 for batch in batches)
        mirrored += [batch.pop() for batch in batches]
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.2)
    assert items == training_order(10, settings, seed=0)
    assert items != training_order(10, settings, seed=1)
    assert all(index < 10 for _, index in training_order(10, make_settings(flip_probability=0), 0))


class Recorded(torch.optim.AdamW):
    """AdamW that notes its rates."""

    rates: list[float]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.rates.append(self.param_groups[0]["lr"])
        super().step(closure)


def rates_of(name: str, monkeypatch: pytest.MonkeyPatch, per_epoch: int = 5) -> list[float]:
    """The rate of each step of 20 epochs."""
    monkeypatch.setattr(Recorded, "rates", [], raising=False)
    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    batch = torch.ones(1, 2, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int64)
    train_probe(nn.Conv2d(2, 3, 1), [[batch] * per_epoch] * 20, make_settings(name), 20 * per_epoch)
    return Recorded.rates


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_is_that_of_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In closed form, and by a scheduler of PyTorch with the arguments and the calls of the reference."""
    rates = rates_of(name, monkeypatch)
    position = {
        "naf-1": [i / 100 for i in range(100)],
        "jafar-1": [i / 20 for i in range(100)],
        "anyup-1": [i // 5 / 20 for i in range(100)],
    }[name]
    assert rates == pytest.approx([5e-4 * (1 + math.cos(math.pi * x)) / 2 for x in position], rel=1e-9, abs=1e-18)

    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100 if name == "naf-1" else 20)
    expected = []
    for _ in range(20):
        for _ in range(5):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if name != "anyup-1":
                schedule.step()
        if name == "anyup-1":
            schedule.step()
    assert rates == expected


def test_the_rate_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of JAFAR 0 after 20 iterations, whole again after 40; of the others at the end nearly 0."""
    oscillating, falling, steps = (rates_of(name, monkeypatch) for name in ("jafar-1", "naf-1", "anyup-1"))
    assert [oscillating[i] for i in (0, 10, 30, 40, 80)] == pytest.approx([5e-4, 2.5e-4, 2.5e-4, 5e-4, 5e-4], rel=1e-9)
    assert [oscillating[i] for i in (20, 60)] == pytest.approx([0, 0], abs=1e-18)
    assert [falling[i] for i in (0, 50)] == pytest.approx([5e-4, 2.5e-4], rel=1e-9)
    assert falling == sorted(falling, reverse=True)
    assert [steps[i] for i in (0, 4, 50, 54)] == pytest.approx([5e-4, 5e-4, 2.5e-4, 2.5e-4], rel=1e-9)
    assert steps[-1] == steps[95] == pytest.approx(5e-4 * (1 - math.cos(math.pi / 20)) / 2, rel=1e-9)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Two images each but for the last batch, some pixels void; in batch 3 all."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, 2, 6, 4, 4, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 5, (count, 2, 18, 18), generator=generator)
    target[:, 0, :, :9] = IGNORE
    target[3] = IGNORE
    pairs = list(zip(features, target, strict=True))
    pairs[-1] = (pairs[-1][0][:1], pairs[-1][1][:1])
    return pairs


def test_fifty_steps_equal_a_plain_loop() -> None:
    """Features are upsampled before the convolution, the mean is over valid pixels, AdamW is written out."""
    settings = make_settings("jafar-1", epochs=5, learning_rate=0.01, weight_decay=0.1)
    data, head = [batches(10) for _ in range(5)], new_head(6, 5, 1, torch.device("cpu")).double()
    p = [t.detach().clone().requires_grad_() for t in (head.weight[:, :, 0, 0], present(head.bias))]
    train_probe(head, data, settings, 50)

    up = nn.Upsample(size=(18, 18), mode="bilinear", align_corners=False)
    first, second = ([torch.zeros_like(t) for t in p] for _ in range(2))
    moved = 0
    for i, (features, target) in enumerate(batch for epoch in data for batch in epoch):
        valid = target != IGNORE
        if not valid.any():
            continue
        logits = torch.einsum("bdhw,cd->bhwc", up(features), p[0]) + p[1]
        loss = -logits.log_softmax(-1)[valid].gather(1, target[valid][:, None]).mean()
        gradients = torch.autograd.grad(loss, p)
        rate, moved = 0.01 * (1 + math.cos(math.pi * i / 5)) / 2, moved + 1
        with torch.no_grad():
            for t, g, m, v in zip(p, gradients, first, second, strict=True):
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).add_(g * g, alpha=0.001)
                t.mul_(1 - rate * 0.1)
                t.sub_(rate * m / (1 - 0.9**moved) / ((v / (1 - 0.999**moved)).sqrt() + 1e-8))
    np.testing.assert_allclose(head.weight.detach()[:, :, 0, 0], p[0].detach(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(present(head.bias).detach(), p[1].detach(), rtol=1e-9, atol=1e-12)
    assert moved == 45


def test_a_loss_that_is_not_finite() -> None:
    features, target = batches(5)[0]
    with pytest.raises(NumericalError, match="--set learning_rate"):
        train_probe(
            new_head(6, 5, 0, torch.device("cpu")).double(), [[(features * torch.inf, target)]], make_settings(), 1
        )


def run(data: Any, encoder: Encoder, context: Context | None = None, name: str = "jafar-1", **changes: Any) -> Outcome:
    return full_resolution.run(encoder, data, make_settings(name, **changes), context or Context())


def test_scores_are_those_of_scikit_learn() -> None:
    """Over all valid pixels of the crops together: the mean IoU of classes that are there or predicted; accuracy."""
    data = {split: Wide(None, split).head(4) for split in ("train", "val")}
    context = Context(recorded_ids=frozenset(data["val"].ids))
    outcome = run(data, load_encoder("baseline_hog", device="cpu"), context, input_size=56, epochs=3, learning_rate=0.1)
    drawn = [context.run.predictions[item] for item in data["val"].ids]
    truth, predicted = (np.concatenate([own[kind].ravel() for own in drawn]) for kind in ("truth", "prediction"))
    valid = truth != IGNORE
    truth, predicted = truth[valid], predicted[valid]
    classes = np.union1d(truth, predicted)
    assert len(classes) < len(Shapes.classes) or len(np.setdiff1d(classes, truth))
    assert outcome.metrics["mIoU"] == pytest.approx(
        jaccard_score(truth, predicted, labels=classes, average="macro"), rel=1e-12
    )
    assert outcome.metrics["pixel_accuracy"] == pytest.approx(accuracy_score(truth, predicted), rel=1e-12)
    crops = [CentreCrop(56).crop(data["val"][i]) for i in range(4)]
    for own, (image, mask) in zip(drawn, crops, strict=True):
        assert np.array_equal(own["truth"], mask)
        assert np.array_equal(own["image"], image)
    tile = draw_segmentation(data["val"], data["val"].ids[0], drawn[0], "").tiles[0]
    assert tile.pixels.shape[0] == tile.pixels.shape[1]  # the crop, not the image around it
    assert outcome.features["used_size"] == 56


def test_workers_and_batches_move_nothing() -> None:
    data = {split: load_segmentation("shapes", split, limit=5) for split in ("train", "val")}
    one, other, seeded = (
        run(data, load_encoder("baseline_rgb", device="cpu"), context, input_size=64, epochs=2)
        for context in (Context(batch_size=16), Context(batch_size=3, workers=1), Context(seed=1))
    )
    assert one.metrics == other.metrics
    np.testing.assert_array_equal(one.statistics["confusion"], other.statistics["confusion"])
    assert one.metrics != seeded.metrics


@pytest.mark.slow
def test_an_oracle_learns_and_a_blind_encoder_does_not() -> None:
    """At a rate for few steps. Chance is one class everywhere: background has its share as IoU, all others 0."""
    data = {split: Painted(None, split).head(8) for split in ("train", "val")}
    oracle, blind = (run(data, encoder, input_size=96, learning_rate=0.2) for encoder in (Oracle(), Blind()))
    assert oracle.metrics["mIoU"] > 0.9
    confusion = blind.statistics["confusion"].sum(0)
    truth = confusion.sum(1)
    assert np.flatnonzero(confusion.sum(0)).tolist() == [0]
    assert blind.metrics["mIoU"] == pytest.approx(truth[0] / truth.sum() / np.count_nonzero(truth), rel=1e-12)


class Counting(Blind):
    """The mean brightness of cells; counts images."""

    embed_dim, stride = 1, 8
    images = 0

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        self.images += len(images)
        return DenseFeatures(F.avg_pool2d(images.mean(1, keepdim=True), 8), 8)


def test_what_is_stored_is_encoded_once() -> None:
    """With a store every crop and its mirror image once, without one (or room) in every epoch."""
    data = {split: load_segmentation("shapes", split, limit=5) for split in ("train", "val")}
    counts, metrics = [], []
    for store in (None, FeatureStore(identity="counting")):
        encoder = Counting()
        outcome = run(data, encoder, Context(store=store, batch_size=4), input_size=64, epochs=8, learning_rate=0.1)
        counts.append(encoder.images)
        metrics.append(outcome.metrics)
    assert counts == [8 * 5 + 5, 2 * 5 + 5]
    assert metrics[0] == metrics[1]


def test_a_store_without_room_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NECO_BENCH_FEATURES_GB", "0")
    data = {split: load_segmentation("shapes", split, limit=5) for split in ("train", "val")}
    encoder = Counting()
    run(data, encoder, Context(store=FeatureStore(identity="no room")), input_size=64, epochs=2)
    assert encoder.images == 2 * 5 + 5


def test_cost_counts_every_image_in_every_epoch() -> None:
    data: Any = {split: load_segmentation("shapes", split, limit=10) for split in ("train", "val")}
    cost = full_resolution.cost(make_settings(), data, 14, 384)
    assert (cost.images, cost.size, cost.width) == (20 * 10 + 10, 448, 384)
    assert cost.memory > 4 * 2 * (384 * 32**2 + 9 * 448**2)
