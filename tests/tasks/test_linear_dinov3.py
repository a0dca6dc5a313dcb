"""`dinov3-1`: schedule, training and windows against numbers by hand and plain loops; whole runs on shapes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from neco_bench.tasks.linear_segmentation import dinov3
from neco_bench.tasks.linear_segmentation.batches import training_order
from neco_bench.tasks.linear_segmentation.dinov3_head import (
    BnHead,
    add_gradient,
    drop_channels,
    learning_rate,
    train_bn_probe,
)
from neco_bench.tasks.linear_segmentation.dinov3_settings import Settings
from neco_bench.tasks.linear_segmentation.windows import merge_windows, window_starts
from PIL import Image
from torch import Tensor, nn

from neco_bench import load_encoder
from neco_bench.core.errors import NumericalError, UsageError
from neco_bench.core.protocol import protocol
from neco_bench.core.rng import item_rng
from neco_bench.core.task import Context, Outcome
from neco_bench.data.base import IGNORE, Sample
from neco_bench.data.shapes import Shapes
from neco_bench.encoders import DenseFeatures, Encoder
from neco_bench.features.extract import FeatureExtractor
from neco_bench.metrics import segmentation
from tests.typed import load_segmentation, present

CONSTANTS = dict(protocol("linear_segmentation", "dinov3-1").constants)
REFERENCE = {
    "iterations": 40_000,
    "learning_rate": 1e-3,
    "weight_decay": 1e-3,
    "warmup": 1500,
    "warmup_start": 1e-6,
    "dropout": 0.1,
    "evaluate_every": 5000,
}


def make_settings(**changes: Any) -> Settings:
    return Settings(**{**CONSTANTS, "input_size": 512, **changes})


OPTIONS = make_settings()


def test_the_protocol_has_the_constants_of_the_reference() -> None:
    settings = make_settings()
    assert {name: getattr(settings, name) for name in REFERENCE} == REFERENCE
    assert (settings.batch_size, settings.select, settings.absent) == (16, "best", "union")
    assert [math.floor(window * settings.window_step) for window in (512, 518)] == [341, 345]


@pytest.mark.parametrize(
    ("step", "expected", "digits"),
    [
        (0, 1.0e-9, 1),
        (1, 6.6765e-7, 4),
        (750, 4.90625e-4, 5),
        (1499, 9.61883e-4, 5),
        (1500, 9.96530e-4, 5),
        (10_000, 8.53526e-4, 5),
        (20_000, 4.99961e-4, 5),
        (39_998, 1.5e-12, 1),
    ],
)
def test_the_schedule_to_the_printed_digits(step: int, expected: float, digits: int) -> None:
    assert f"{learning_rate(step, OPTIONS):.{digits}e}" == f"{expected:.{digits}e}"


def test_the_schedule_ends_at_zero() -> None:
    assert learning_rate(39_999, OPTIONS) == 0


class Recorded(torch.optim.AdamW):
    """AdamW that notes its rates."""

    rates: list[float]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.rates.append(self.param_groups[0]["lr"])
        super().step(closure)


SMALL = make_settings(
    iterations=50,
    learning_rate=0.02,
    weight_decay=1e-3,
    warmup=8,
    warmup_start=1e-6,
    dropout=0.0,
    evaluate_every=20,
)


def batches(count: int, dimension: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Features with means and scales of their own, and masks whose left and, in one image, all pixels are void."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, 4, dimension, 5, 5, generator=generator) * torch.arange(1, 7).view(-1, 1, 1) + 2
    target = torch.randint(0, 3, (count, 4, 16, 16), generator=generator)
    target[:, :, :, :3] = IGNORE
    target[:, 1] = IGNORE
    return list(zip(features, target, strict=True))


def test_the_rate_lags_one_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorded, "rates", [], raising=False)
    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    train_bn_probe(BnHead(6, 3, 0), batches(50), SMALL, 0)
    assert Recorded.rates == [learning_rate(max(0, i - 1), SMALL) for i in range(50)]


def test_the_loss_is_divided_by_all_pixels() -> None:
    """Against PyTorch on the whole batch: the mean over valid pixels, times their share; and its gradient."""
    _, target = batches(1)[0]
    logits = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = add_gradient(ours * 1.0, target, target.numel())
    large = nn.Upsample(size=(16, 16), mode="bilinear", align_corners=False)(theirs)
    plain = nn.CrossEntropyLoss(ignore_index=IGNORE)(large, target) * (target != IGNORE).float().mean()
    plain.backward()
    assert (target != IGNORE).float().mean() == pytest.approx(0.75 * 13 / 16)
    assert loss == pytest.approx(plain.item(), rel=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


def test_a_batch_of_void_moves_nothing_by_its_loss() -> None:
    logits = torch.randn(2, 3, 5, 5).requires_grad_()
    assert add_gradient(logits * 1.0, torch.full((2, 16, 16), IGNORE), 2 * 16 * 16) == 0
    assert not present(logits.grad).any()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fifty_steps_equal_a_plain_loop(dropout: float) -> None:
    """BatchNorm, AdamW and dropout written out; features are upsampled before the convolution, the same function."""
    data, options = batches(50), SMALL.model_copy(update={"dropout": dropout})
    head = BnHead(6, 3, 7)
    p = [t.detach().double().requires_grad_() for t in (torch.ones(6), torch.zeros(6), head.weight, head.bias)]
    first, second = ([torch.zeros_like(t) for t in p] for _ in range(2))
    running = torch.zeros(6).double(), torch.ones(6).double()
    heads = train_bn_probe(head, data, options, seed=3)
    for i, (features, target) in enumerate(data):
        stays = torch.from_numpy(item_rng(3, "dropout", i).random((4, 6)) >= dropout).double()
        x = features.double() * stays[:, :, None, None] / (1 - dropout)
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        normal = (x - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
        running = 0.9 * running[0] + 0.1 * mean, 0.9 * running[1] + 0.1 * variance * 100 / 99
        large = F.interpolate(normal * p[0][:, None, None] + p[1][:, None, None], (16, 16), mode="bilinear")
        scores = torch.einsum("bdhw,cd->bhwc", large, p[2]) + p[3]
        valid = target != IGNORE
        picked = scores.log_softmax(-1)[valid].gather(1, target[valid][:, None])
        gradients = torch.autograd.grad(-picked.sum() / target.numel(), p)
        step = max(0, i - 1)
        if step < 8:
            rate = 0.02 * (1 - (1 - step / 8) * (1 - 1e-6)) * (1 - step / 50)
        else:
            rate = 0.01 * (1 + math.cos(math.pi * (step + 1) / 50))
        with torch.no_grad():
            for t, g, m, v in zip(p, gradients, first, second, strict=True):
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).add_(g * g, alpha=0.001)
                t.mul_(1 - rate * 1e-3)
                t.sub_(rate * m / (1 - 0.9 ** (i + 1)) / ((v / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8))
    assert list(heads) == [20, 40, 50]
    last = heads[50]
    expected = (*p, *running)
    ours = (last.norm.weight, last.norm.bias, last.weight, last.bias, last.norm.running_mean, last.norm.running_var)
    for got, wanted in zip(map(present, ours), expected, strict=True):
        np.testing.assert_allclose(got.detach(), wanted.detach(), atol=1e-5)
    assert not np.allclose(heads[20].weight.detach(), last.weight.detach(), atol=1e-3)  # a copy, not a view
    assert not any(head.training for head in heads.values())


def test_dropout_is_of_whole_channels_of_an_image() -> None:
    features = torch.rand(40, 50, 3, 3) + 1
    dropped = drop_channels(features, 0.1, seed=0, iteration=5)
    factor = dropped / features
    torch.testing.assert_close(factor.amin((2, 3)), factor.amax((2, 3)))
    zero = (factor == 0).all(-1).all(-1)
    assert zero.float().mean() == pytest.approx(0.1, abs=0.03)
    torch.testing.assert_close(dropped[~zero], features[~zero] / 0.9)
    assert torch.equal(drop_channels(features, 0.1, 0, 5), dropped)
    assert not torch.equal(drop_channels(features, 0.1, 0, 6), dropped)
    assert drop_channels(features, 0, 0, 5) is features


def test_the_head_is_drawn_as_the_reference_does() -> None:
    head = BnHead(400, 100, 1)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert head.weight.mean().item() == pytest.approx(0, abs=2e-4)
    assert not head.bias.any()
    assert torch.equal(head.weight, BnHead(400, 100, 1).weight)
    assert not torch.equal(head.weight, BnHead(400, 100, 2).weight)


def test_a_loss_that_is_not_finite() -> None:
    features, target = batches(1)[0]
    with pytest.raises(NumericalError, match="learning_rate"):
        train_bn_probe(BnHead(6, 3, 0), [(features * torch.inf, target)], SMALL, 0)


@pytest.mark.parametrize(("length", "expected"), [(512, [0]), (683, [0, 171]), (1024, [0, 341, 512])])
def test_window_starts_by_hand(length: int, expected: list[int]) -> None:
    assert window_starts(length, 512, 341) == expected


@given(st.integers(1, 60), st.integers(0, 200), st.data())
def test_windows_cover_an_axis(window: int, more: int, data: st.DataObject) -> None:
    step, length = data.draw(st.integers(1, window)), window + more
    starts = window_starts(length, window, step)
    assert starts[0] == 0
    assert starts[-1] == length - window
    assert all(0 < b - a <= step for a, b in itertools.pairwise(starts))
    assert len(starts) == 1 + math.ceil(more / step)  # no more than needed


class Colours(Encoder):
    """The mean colour of each cell, in units that no normalisation moved."""

    name, weights_id = "colours", "0"
    embed_dim, stride = 3, 8

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        return DenseFeatures(F.avg_pool2d(images, self.stride), self.stride)


def trained_head() -> BnHead:
    head = BnHead(3, 4, 0).eval()
    with torch.no_grad():
        head.weight.copy_(torch.randn(4, 3, generator=torch.Generator().manual_seed(2)))
        present(head.norm.running_mean).copy_(torch.tensor([0.4, 0.5, 0.6]))
        present(head.norm.running_var).copy_(torch.tensor([0.1, 0.05, 0.2]))
    return head


@pytest.mark.parametrize("shape", [(40, 100), (150, 60), (50, 50)])
def test_sliding_equals_a_naive_way(shape: tuple[int, int]) -> None:
    """Pixel by pixel: the mean over all windows that see a pixel of what each says there."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(image).resize((8, 8)).resize(shape[::-1], Image.Resampling.BICUBIC))
    encoder, head, context = Colours(), trained_head(), Context(batch_size=2)
    extractor = FeatureExtractor(encoder, context, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    features, corners = dinov3.encode_windows(extractor, image, 48, 32)
    ours = dinov3.classify_windows(head, features, corners, 48, shape).numpy()

    short = min(shape)
    width, height = (math.floor(48 * side / short + 0.5) for side in shape[::-1])
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)) / 255
    assert len(corners) == {(40, 100): 4, (150, 60): 4, (50, 50): 1}[shape]
    total, visits = np.zeros((4, height, width)), np.zeros((height, width))
    # 32 = floor(48 * 2 / 3)
    for top in {min(32 * k, height - 48) for k in range(10)}:
        for left in {min(32 * k, width - 48) for k in range(10)}:
            cells = resized[top : top + 48, left : left + 48].reshape(6, 8, 6, 8, 3).mean((1, 3))
            normal = (cells - [0.4, 0.5, 0.6]) / np.sqrt(np.array([0.1, 0.05, 0.2]) + 1e-5)
            logits = torch.from_numpy(normal @ head.weight.detach().double().numpy().T).permute(2, 0, 1)
            large = F.interpolate(logits[None], (48, 48), mode="bilinear", align_corners=False)[0].numpy()
            for y, x in itertools.product(range(48), range(48)):
                total[:, top + y, left + x] += large[:, y, x]
                visits[top + y, left + x] += 1
    mean = torch.from_numpy(total / visits)
    expected = F.interpolate(mean[None], shape, mode="bilinear", align_corners=False)[0].argmax(0).numpy()
    assert len(np.unique(expected)) > 1
    assert ours.shape == shape
    assert np.mean(ours == expected) > 0.999  # float32 against float64 at the borders of classes


def test_overlapping_windows_are_averaged() -> None:
    """By hand, in one dimension: windows of 4 at 0, 3 and 5 saying 1, 2 and 6."""
    logits = torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1, 1)
    merged = merge_windows(logits, [(0, 0), (0, 3), (0, 5)], 4)
    assert merged.shape == (1, 4, 9)
    assert merged[0, 2].tolist() == [1, 1, 1, 1.5, 2, 4, 4, 6, 6]


def test_windows_encoded_in_parts_are_the_same() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 200, 3), dtype=np.uint8)
    maps = [
        dinov3.encode_windows(FeatureExtractor(Colours(), Context(batch_size=size)), image, 48, 32)[0]
        for size in (1, 16)
    ]
    assert torch.equal(*maps)


def test_only_classes_without_any_pixel_are_left_out() -> None:
    """By hand: class 2 is predicted only, and counts as 0; class 3 is nowhere, and does not count."""
    confusion = np.zeros((4, 4), int)
    confusion[0, 0], confusion[0, 2], confusion[1, 1] = 3, 1, 5
    assert segmentation.mean_iou(confusion, absent="union") == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert segmentation.mean_iou(confusion, absent="exclude") == pytest.approx((3 / 4 + 1) / 2)
    assert segmentation.mean_iou(confusion, absent="zero") == pytest.approx((3 / 4 + 1) / 4)
    assert np.isnan(segmentation.mean_iou(np.zeros((3, 3), int), absent="union"))


def test_training_order_is_whole_epochs_end_to_end() -> None:
    items = training_order(10, 28, seed=0)
    assert len(items) == 28  # the third batch has two items of epoch 0 and two of epoch 1
    assert [epoch for epoch, _ in items] == [0] * 10 + [1] * 10 + [2] * 8
    for epoch in (0, 1):
        assert sorted(i for e, i in items if e == epoch) == list(range(10))
    assert [i for e, i in items if e == 0] != [i for e, i in items if e == 1]
    assert items == training_order(10, 28, seed=0)
    assert items != training_order(10, 28, seed=1)


TINY: dict[str, Any] = {
    "input_size": 224,
    "iterations": 50,
    "batch_size": 4,
    "evaluate_every": 20,
    "warmup": 5,
    "learning_rate": 0.05,
}


class Painted(Shapes):
    """The shapes with their answer as the image: each pixel has the colour of its class, void that of background."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        colours = self.palette[np.where(sample.mask == IGNORE, 0, sample.mask)]
        return Sample(colours, sample.mask, sample.id)


def run(data: Any, encoder: Encoder, context: Context | None = None, **changes: Any) -> Outcome:
    settings = make_settings(**{**TINY, **changes})
    return dinov3.run(encoder, data, settings, context or Context())


@pytest.mark.slow
def test_a_whole_run_beats_chance() -> None:
    """Chance is one class everywhere: background has its share of the pixels as IoU, all others 0."""
    data = {split: load_segmentation("shapes", split, limit=16) for split in ("train", "val")}
    context = Context()
    outcome = run(data, load_encoder("baseline_rgb", device="cpu"), context)
    confusion = outcome.statistics["confusion"]
    total = confusion.sum(0)
    shares = total.sum(1) / total.sum()
    assert confusion.shape == (16, 9, 9)
    assert outcome.metrics["mIoU"] > 1.7 * shares.max() / 9
    assert outcome.metrics["mIoU"] == pytest.approx(segmentation.mean_iou(total, absent="union"))
    assert outcome.metrics["mIoU_last"] <= outcome.metrics["mIoU"]
    assert context.run.notes["iteration_reported"] in (20, 40, 50)
    truth = [np.bincount(s.mask[s.mask != IGNORE], minlength=9) for s in (data["val"][i] for i in range(16))]
    np.testing.assert_array_equal(confusion.sum(2), truth)  # every image, at its own resolution


def test_one_patch_a_batch_is_refused() -> None:
    data = {split: load_segmentation("shapes", split, limit=2) for split in ("train", "val")}
    with pytest.raises(UsageError, match="more than one patch in a batch: use --set batch_size=2"):
        run(data, Colours(), input_size=Colours.stride, batch_size=1)


def test_workers_and_batches_move_nothing() -> None:
    data = {split: load_segmentation("shapes", split, limit=6) for split in ("train", "val")}
    one, other = (
        run(data, load_encoder("baseline_rgb", device="cpu"), context, input_size=64, iterations=9)
        for context in (Context(batch_size=16), Context(batch_size=5, workers=1))
    )
    assert one.metrics == other.metrics
    np.testing.assert_array_equal(one.statistics["confusion"], other.statistics["confusion"])
    assert one.features["used_size"] == 64


@pytest.mark.parametrize(("select", "reported"), [("best", 3), ("last", 6)])
def test_the_best_or_the_last_head_is_reported(select: str, reported: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads set by hand: one names the nearest colour of the palette, a later one always background."""
    data = {split: Painted(None, split).head(4) for split in ("train", "val")}
    nearest, background = (BnHead(3, 9, 0).eval() for _ in range(2))
    palette = torch.from_numpy(data["val"].palette).float() / 255
    colours = (palette - torch.tensor(Colours.mean)) / torch.tensor(Colours.std)
    with torch.no_grad():
        nearest.weight.copy_(colours)
        nearest.bias.copy_(-colours.square().sum(1) / 2)
        background.bias[0] = 10.0
    monkeypatch.setattr(dinov3, "train_bn_probe", lambda *a, **k: {3: nearest, 6: background})
    context = Context()
    outcome = run(data, Colours(), context, select=select)
    truth = outcome.statistics["confusion"].sum((0, 2))
    present = np.count_nonzero(truth)
    assert context.run.notes["iteration_reported"] == reported
    assert outcome.metrics["mIoU_last"] == pytest.approx(truth[0] / truth.sum() / present)
    assert (outcome.metrics["mIoU"] > 0.7) == (select == "best")
    assert (outcome.metrics["mIoU"] == outcome.metrics["mIoU_last"]) == (select == "last")


def test_training_sees_padding_as_the_mean_colour_and_void_classes_as_void(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the statistics of the protocol the mean colour is 0; at half the size, three quarters are padding."""

    class Voided(Painted):
        void_class = 0

    batches: list[tuple[Tensor, Tensor]] = []

    def look(head: BnHead, given: Any, *args: Any, **options: Any) -> dict[int, BnHead]:
        batches.extend(given)
        return {1: head.eval()}

    monkeypatch.setattr(dinov3, "train_bn_probe", look)
    encoder = Colours()
    encoder.mean = (0.0, 0.0, 0.0)
    data = {split: Voided(None, split).head(6) for split in ("train", "val")}
    run(data, encoder, Context(batch_size=5), iterations=3, scale=(0.5, 0.5))
    assert [len(features) for features, _ in batches] == [4, 4, 4]
    features, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert targets.shape == (12, 224, 224)
    assert (features[:, :, 14:] == 0).all()
    assert (features[:, :, :, 14:] == 0).all()
    assert (features[:, :, :14, :14] != 0).float().mean() > 0.99
    assert (targets[:, 112:] == IGNORE).all()
    assert not (targets == 0).any()
    assert len(torch.unique(targets)) > 3


@pytest.mark.slow
def test_painted_classes_are_nearly_all_found() -> None:
    """Colours that are the answer, 8-pixel cells, no distortion: what is missed lies at borders."""
    data = {split: Painted(None, split).head(24) for split in ("train", "val")}
    outcome = run(data, Colours(), iterations=150, evaluate_every=150, distortion_probability=0.0, dropout=0.0)
    assert outcome.metrics["mIoU"] > 0.9
    assert outcome.metrics["mIoU"] == outcome.metrics["mIoU_last"]
