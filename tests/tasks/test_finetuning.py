"""Fine-tuning: decoders, schedule, augmentation, windows and one step against independent computations."""

from __future__ import annotations

import colorsys
import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from neco_bench.tasks.finetuning import task, training
from neco_bench.tasks.finetuning.decoders import ItemDropout, LinearDecoder, MaskTransformer
from neco_bench.tasks.finetuning.segmenter import Segmenter
from neco_bench.tasks.finetuning.settings import Settings
from neco_bench.tasks.linear_segmentation.scale_crop import (
    Distortion,
    ScaleCropDistort,
    recolour_hsv,
    resize_bilinear,
    size_within,
)
from torch import Tensor, nn

from neco_bench.core.distributed import RankShard
from neco_bench.core.protocol import find_tasks
from neco_bench.core.task import Context
from neco_bench.data.base import IGNORE, Sample
from neco_bench.encoders import DenseFeatures, Encoder, load_encoder
from tests.typed import load_segmentation

MODEL = "timm:test_vit?pretrained=false&seed=0"
FEW = {
    "learning_rate": 0.01,
    "input_size": 64,
    "short_side": 64,
    "long_side": 128,
    "window_overlap": 16,
    "epochs": 3,
    "batch_size": 4,
}


def settings_of(name: str = "shapes_finetune", **changes: Any) -> Settings:
    (found,) = find_tasks([name], {**FEW, **changes})
    settings = found.settings()
    assert isinstance(settings, Settings)
    return settings


def small_segmenter(settings: Settings, model: str = MODEL) -> Segmenter:
    return Segmenter(load_encoder(model, device="cpu"), 9, settings, 0)


# Decoders


def test_the_linear_decoder_is_an_affine_map_of_each_patch() -> None:
    decoder, features = LinearDecoder(5, 3), torch.randn(2, 5, 4, 6)
    expected = torch.einsum("kd,bdhw->bkhw", decoder.weight, features) + decoder.bias[:, None, None]
    torch.testing.assert_close(decoder(features), expected)
    assert not decoder.bias.any()


def test_the_mask_transformer_is_torchs_with_class_tokens_cosines_and_a_norm() -> None:
    """Blocks against `nn.TransformerEncoderLayer`; what follows them in loops."""
    torch.manual_seed(0)
    decoder = MaskTransformer(128, 5, 2, 0.1, RankShard(0, 3)).eval()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    features = torch.randn(3, 128, 2, 4)
    tokens = F.linear(features.flatten(2).mT, decoder.embed.weight, decoder.embed.bias)
    tokens = torch.cat([tokens, decoder.tokens.expand(3, -1, -1)], 1)
    for block in decoder.blocks:
        reference = nn.TransformerEncoderLayer(128, 2, 512, 0.1, "gelu", norm_first=True, batch_first=True).eval()
        layers: Any = block
        attention, mlp, own = layers.attention, layers.mlp, reference.self_attn
        pairs = [
            (own.in_proj_weight, attention.qkv.weight), (own.in_proj_bias, attention.qkv.bias),
            (own.out_proj.weight, attention.project.weight), (own.out_proj.bias, attention.project.bias),
            (reference.linear1.weight, mlp[0].weight), (reference.linear1.bias, mlp[0].bias),
            (reference.linear2.weight, mlp[3].weight), (reference.linear2.bias, mlp[3].bias),
            (reference.norm1.weight, layers.norm1.weight), (reference.norm1.bias, layers.norm1.bias),
            (reference.norm2.weight, layers.norm2.weight), (reference.norm2.bias, layers.norm2.bias),
        ]  # fmt: skip
        with torch.no_grad():
            for there, here in pairs:
                there.copy_(here)
            tokens = reference(tokens)
    tokens = decoder.norm(tokens)
    scores = decoder(features)
    for image in range(3):
        for patch in range(8):
            row = []
            for k in range(5):
                a, b = tokens[image, patch] @ decoder.patch_map, tokens[image, 8 + k] @ decoder.class_map
                row.append(a @ b / (a.norm() * b.norm()))
            values = torch.stack(row)
            values = (values - values.mean()) / (values.var(unbiased=False) + 1e-5).sqrt()
            values = values * decoder.norm_scores.weight + decoder.norm_scores.bias
            torch.testing.assert_close(scores[image, :, patch // 4, patch % 4], values, rtol=1e-4, atol=1e-5)


def test_initial_weights_are_the_references() -> None:
    decoder = MaskTransformer(192, 50, 2, 0.1, RankShard(0, 1))
    assert float(decoder.tokens.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(decoder.patch_map.detach().std()) == pytest.approx(192**-0.5, rel=0.02)
    assert float(decoder.embed.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    blocks: Any = decoder.blocks
    assert [block.attention.heads for block in blocks] == [3, 3]
    assert sum(p.numel() for p in decoder.parameters()) == (
        192 * 192 * 3 + 192 + 50 * 192 + 2 * (12 * 192**2 + 13 * 192) + 2 * 192 + 2 * 50
    )


def test_dropout_hangs_on_seed_step_and_place_alone() -> None:
    shard = RankShard(3, 4, batch_number=7)
    drop = ItemDropout(0.3, 1, shard)
    whole = drop(torch.ones(4, 50, 40))
    kept = whole[whole > 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.7))
    assert float(whole.mean()) == pytest.approx(1, abs=0.03)
    shard.start = 2
    assert torch.equal(drop(torch.ones(2, 50, 40)), whole[2:])
    shard.batch_number = 8
    assert not torch.equal(drop(torch.ones(2, 50, 40)), whole[2:])
    assert torch.equal(drop.eval()(torch.ones(2, 3)), torch.ones(2, 3))


# Schedule and order


def test_steps_are_those_of_the_reference() -> None:
    """protocols/finetune_video_depth.md 1.2: about 161.7k, 80.1k and 80.4k; partial batches at the ends of epochs."""
    counts = {"ade20k_finetune": (20210, 161_728), "cityscapes_finetune": (2975, 80_352)}
    counts["pascal_context60_finetune"] = (4998, 80_128)
    for name, (images, steps) in counts.items():
        (found,) = find_tasks([name])
        assert found.settings().steps(images) == steps  # type: ignore[attr-defined]


def test_the_rate_falls_by_a_power_to_its_floor() -> None:
    (found,) = find_tasks(["ade20k_finetune"])
    settings: Any = found.settings()
    rates = [training.learning_rate(step, 1000, settings) for step in (0, 500, 999)]
    assert rates[0] == pytest.approx(1e-3, rel=1e-12)
    assert rates[1] == pytest.approx(0.00099 * 0.5358867312681466 + 1e-5, rel=1e-12)  # 0.5 ** 0.9
    assert rates[2] == pytest.approx(0.00099 * 0.0019952623149688795 + 1e-5, rel=1e-9)  # 0.001 ** 0.9


def test_epochs_are_permutations_and_processes_share_their_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = training.Epochs(10, 3, 0)
    items = [epochs[i] for i in range(len(epochs))]
    for epoch in range(3):
        assert sorted(items[10 * epoch : 10 * epoch + 10]) == [(epoch, i) for i in range(10)]
    assert [i for _, i in items[:10]] != [i for _, i in items[10:20]]
    batches = [epochs.batch(step, 4) for step in range(9)]
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    assert [i for batch in batches for i in batch] == list(range(30))
    for world in (2, 3, 4):
        monkeypatch.setattr(training.distributed, "world", lambda world=world: world)
        for batch in batches:
            parts: list[int] = []
            for rank in range(world):
                monkeypatch.setattr(training.distributed, "rank", lambda rank=rank: rank)
                parts += training.share_of_process(batch)
            assert parts == list(batch)


# Augmentation


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        ((480, 640), (512, 2048), (512, 683)),  # 682.67
        ((640, 480), (256, 1024), (341, 256)),
        ((1024, 2048), (1024, 2048), (1024, 2048)),
        ((100, 1000), (512, 2048), (205, 2048)),  # the long side decides
        ((375, 500), (520, 4160), (520, 693)),
    ],
)
def test_images_are_resized_into_a_box(size: tuple[int, int], box: tuple[int, int], expected: tuple[int, int]) -> None:
    assert size_within(*size, *box) == expected


def test_colours_turn_and_fade_as_in_hsv() -> None:
    """Against the standard library's conversion; Pillow's holds hue and saturation in bytes."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 30, 3), np.uint8)
    for saturation, turn in ((0.5, 0.0), (1.0, 0.1), (1.5, -0.05)):
        made, apart = recolour_hsv(image, saturation, turn).astype(float), []
        for before, after in zip(image.reshape(-1, 3), made.reshape(-1, 3), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*(before / 255))
            expected = 255 * np.array(colorsys.hsv_to_rgb((h + turn) % 1, min(1, s * saturation), v))
            apart.append(np.abs(after - expected).max())
        assert max(apart) < 8  # a step of hue is up to 6 of 255
        assert np.mean(apart) < 3


def test_distortion_without_range_changes_little_and_with_it_stays_in_range() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    still = Distortion(1.0, 0, (1.0, 1.0), (1.0, 1.0), 0.0, hsv=True)
    assert np.array_equal(still(image, np.random.default_rng(0)), image)
    strong = Distortion(1.0, 32, (0.5, 1.5), (0.5, 1.5), 0.1, hsv=True)
    made = [strong(image, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    never = Distortion(0.0, 32, (0.5, 1.5), (0.5, 1.5), 0.1, hsv=True)
    assert np.array_equal(never(image, np.random.default_rng(0)), image)


def test_bilinear_resizing_has_no_antialiasing() -> None:
    """At a fourth of the size a pixel is the mean of the two middle ones of four."""
    row = np.array([0, 40, 80, 200, 10, 20, 60, 90], np.uint8)
    image = np.broadcast_to(row[None, :, None], (8, 8, 3))
    assert resize_bilinear(image, 2, 2)[0, :, 0].tolist() == [60, 40]
    assert resize_bilinear(image, 8, 8) is image


def test_crops_hold_image_and_mask_together_and_pad_with_fill_and_void() -> None:
    mask = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3), np.ones((40, 40), np.uint8))
    image = np.repeat((40 * mask)[..., None], 3, 2)
    plain = Distortion(0.0, 0, (1, 1), (1, 1), 0, hsv=True)
    transform = ScaleCropDistort(64, (0.5, 1.5), 1.0, 0, 0.5, plain, (0.2, 0.4, 0.6), (64, 256))
    padded = 0
    for seed in range(12):
        made, target = transform(Sample(image, mask, "x"), np.random.default_rng(seed))
        assert made.shape == (3, 64, 64)
        assert target.shape == (64, 64)
        void = target == IGNORE
        padded += bool(void.any())
        values = np.rint(made.numpy() * 255)
        assert (np.abs(values[0] - 40.0 * target)[~void] > 20).mean() < 0.1  # but for edges
        for channel, fill in enumerate((0.2, 0.4, 0.6)):
            assert np.allclose(made[channel].numpy()[void], fill)
    assert 0 < padded < 12


# Windows and views


class Colours(Encoder):
    """The mean colour of cells of 8 pixels: an encoder without weights."""

    name, weights_id, embed_dim, stride = "colours", "0", 3, 8

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        return DenseFeatures(F.avg_pool2d(images, 8), 8)


@pytest.mark.parametrize("views", [{}, {"test_scales": (0.5, 1.0, 1.5), "test_flip": True}])
@pytest.mark.parametrize("shape", [(50, 90), (120, 70)])
def test_views_and_windows_are_averaged(views: dict[str, Any], shape: tuple[int, int]) -> None:
    settings = settings_of("ade20k_finetune@segmenter-linear-1", input_size=32, short_side=48, **views)
    segmenter = Segmenter(Colours(), 4, settings, 0).eval()
    assert segmenter.fixed
    nn.init.normal_(next(segmenter.decoder.parameters()))
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    total = torch.zeros(4, *shape)
    for scale in settings.test_scales:
        for flip in (False, True) if settings.test_flip else (False,):
            total += _probabilities(segmenter, image, scale, flip)
    classes = task.classify(segmenter, image, 32, settings, Context(batch_size=3))
    assert (classes == total.argmax(0).numpy()).mean() > 0.998  # the rest is ties up to rounding


def _probabilities(segmenter: Segmenter, image: np.ndarray, scale: float, flip: bool) -> Tensor:
    """Windows by hand: short side 48 times the scale, at least 32; windows every 16 pixels, the last at the edge."""
    height, width = image.shape[:2]
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    pixels = pixels.flip(-1) if flip else pixels
    factor = 48 * scale / min(height, width)
    size = [int(side * factor + 0.5) for side in (height, width)]
    pixels = F.interpolate(pixels, size, mode="bilinear").round() / 255
    if min(size) < 32:
        long = round(32 * max(size) / min(size))
        size = [32, long] if size[0] < size[1] else [long, 32]
        pixels = F.interpolate(pixels, size, mode="bilinear")
    scores, visits = torch.zeros(4, *size), torch.zeros(size)
    starts = [sorted({*range(0, side - 32, 16), side - 32}) for side in size]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (segmenter.encoder.mean, segmenter.encoder.std))
    for top in starts[0]:
        for left in starts[1]:
            cells = F.avg_pool2d((pixels[0, :, top : top + 32, left : left + 32] - mean) / std, 8)
            small = segmenter.decoder(cells[None])
            scores[:, top : top + 32, left : left + 32] += F.interpolate(small, (32, 32), mode="bilinear")[0].detach()
            visits[top : top + 32, left : left + 32] += 1
    large = F.interpolate((scores / visits)[None], (height, width), mode="bilinear")[0].softmax(0)
    return large.flip(-1) if flip else large


# One step


def _step(batch_size: int, **options: Any) -> tuple[float, Tensor]:
    """The loss of a first step on four images of which two are partly void, and the weights after it."""
    settings = settings_of(batch_size=4, drop_path=0.5, **options.pop("changes", {}))
    segmenter = small_segmenter(settings)
    segmenter.prepare(64, options.pop("checkpointing", False))
    trainer = training.Trainer(segmenter, settings, Context(batch_size=batch_size), 10)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 64, 64, generator=generator)
    masks = torch.randint(0, 9, (4, 64, 64), generator=generator)
    masks[0, :50] = IGNORE
    masks[1] = IGNORE
    loss = trainer.step(3, 0, 4, (images, masks))
    return loss, torch.cat([p.detach().flatten() for p in segmenter.trained])


@pytest.fixture(scope="module")
def whole_step() -> tuple[float, Tensor]:
    return _step(16)


def test_parts_of_a_batch_and_checkpointing_change_nothing(whole_step: tuple[float, Tensor]) -> None:
    """Stochastic depth and dropout are on: they follow from the place in the batch."""
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 16, "checkpointing": True}):
        loss, weights = _step(**options)
        assert loss == pytest.approx(whole_step[0], rel=1e-5)
        torch.testing.assert_close(weights, whole_step[1], rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_over_labelled_pixels_and_the_step_is_nesterovs() -> None:
    settings = settings_of(drop_path=0, decoder_dropout=0)
    segmenter = small_segmenter(settings)
    segmenter.prepare(64, False)
    twin = copy.deepcopy(segmenter)
    images, masks = torch.rand(2, 3, 64, 64), torch.randint(0, 9, (2, 64, 64))
    masks[0, :40] = IGNORE
    trainer = training.Trainer(segmenter, settings, Context(), 10)
    losses = [trainer.step(step, 0, 2, (images, masks)) for step in range(2)]
    momentum = [torch.zeros_like(p) for p in twin.trained]
    for step in range(2):
        rate = training.learning_rate(step, 10, settings)
        large = F.interpolate(twin(images), (64, 64), mode="bilinear", align_corners=False)
        loss = F.cross_entropy(large, masks, ignore_index=IGNORE)
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        gradients = torch.autograd.grad(loss, twin.trained)
        with torch.no_grad():
            for parameter, gradient, velocity in zip(twin.trained, gradients, momentum, strict=True):
                velocity.mul_(0.9).add_(gradient)
                parameter.sub_(rate * (gradient + 0.9 * velocity))
    for here, there in zip(segmenter.trained, twin.trained, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6)


def test_memory_that_runs_out_halves_the_parts(
    monkeypatch: pytest.MonkeyPatch, whole_step: tuple[float, Tensor]
) -> None:
    plain = Segmenter.backward

    def backward(self: Segmenter, images: Tensor, *rest: Any) -> float:
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, images, *rest)

    monkeypatch.setattr(Segmenter, "backward", backward)
    loss, weights = _step(16)
    assert loss == pytest.approx(whole_step[0], rel=1e-5)
    torch.testing.assert_close(weights, whole_step[1], rtol=1e-4, atol=1e-6)


def test_cost_counts_passes_and_windows() -> None:
    settings = settings_of(
        "ade20k_finetune", input_size=512, short_side=512, long_side=2048, window_overlap=32, epochs=2
    )
    data: Any = {role: load_segmentation("shapes", role, limit=10) for role in ("train", "val")}
    assert task.cost(settings, data, 16, 384).images == 3 * 2 * 10 + 3 * 10  # windows at 0, 480, 512 of 1024
    both = settings.model_copy(update={"test_flip": True})
    assert task.cost(both, data, 16, 384).images == 3 * 2 * 10 + 2 * 3 * 10
