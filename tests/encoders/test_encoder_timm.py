"""The timm adapter: positions, norms, layers, attention, sizes, precision and seeds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from neco_bench.core.errors import BadInputError, MissingError, UsageError
from neco_bench.encoders import load_encoder
from neco_bench.encoders.adapters.timm_models import interpolate_positions

from .conftest import reference_map

TINY = "timm:vit_tiny_patch16_224?pretrained=false"


@pytest.mark.parametrize("size", [(16, 16), (8, 12), (40, 20)])
def test_position_rules_are_those_of_the_original_codes(size: tuple[int, int]) -> None:
    positions = torch.randn(1, 37 * 37, 6, generator=torch.Generator().manual_seed(0))
    image = positions.reshape(1, 37, 37, 6).permute(0, 3, 1, 2)
    by_factor = F.interpolate(image, scale_factor=((size[0] + 0.1) / 37, (size[1] + 0.1) / 37), mode="bicubic")
    by_size = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)
    for rule, expected in (("scale_offset", by_factor), ("size_antialias", by_size)):
        actual = interpolate_positions(positions, (37, 37), size, rule)
        torch.testing.assert_close(actual, expected.permute(0, 2, 3, 1).reshape(1, -1, 6), rtol=0, atol=0)
    assert not torch.equal(by_factor, by_size)
    assert interpolate_positions(positions, (37, 37), (37, 37), "scale_offset") is positions


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["timm", "scale_offset", "size_antialias"])
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_positions_reach_the_features(
    states: Callable[[str], dict[str, Tensor]], images: Tensor, tmp_path: Path, name: str, rule: str
) -> None:
    state = states(name)
    save_file(state, tmp_path / "w.safetensors")
    actual = load_encoder(f"timm:{name}?pos_interp={rule}", weights=tmp_path / "w.safetensors")
    # The same through timm alone: positions brought to the grid here, in a model built for that grid.
    prefix_count = state["pos_embed"].shape[1] - 37 * 37
    options = {"scale_offset": {"scale_factor": (8.1 / 37, 12.1 / 37)}}.get(rule, {"size": (8, 12), "antialias": True})
    grid = state["pos_embed"][:, prefix_count:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, mode="bicubic", **options).flatten(2).transpose(1, 2)
    model: Any = timm.create_model(name, num_classes=0, img_size=(112, 168)).eval()
    model.load_state_dict(state | {"pos_embed": torch.cat([state["pos_embed"][:, :prefix_count], grid], 1)})
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (actual.mean, actual.std))
    with torch.inference_mode():
        expected = model.forward_intermediates((images - mean) / std, indices=1, norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(actual.encode(images).map, expected, rtol=1e-4, atol=1e-4)
    assert actual.pos_interp == rule


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vit_tiny_patch16_224", (192, 16)),
        ("vit_base_patch32_siglip_256", (768, 32)),
        ("vit_small_patch16_dinov3", (384, 16)),
        ("eva02_tiny_patch14_224", (192, 14)),
        ("convnext_atto", (320, 32)),
        ("resnet18", (512, 32)),
        ("swin_tiny_patch4_window7_224", (768, 32)),
    ],
)
def test_families(name: str, shape: tuple[int, int]) -> None:
    encoder = load_encoder(f"timm:{name}?pretrained=false")
    dim, stride = shape
    assert (encoder.embed_dim, encoder.stride) == shape
    features = encoder.encode(torch.rand(1, 3, 4 * stride, 6 * stride))
    assert features.map.shape == (1, dim, 4, 6)
    assert features.map.dtype == torch.float32
    count = getattr(encoder.model, "num_prefix_tokens", 0)
    assert (features.prefix is None) == (count == 0)
    if count:
        assert features.prefix.shape == (1, count, dim)  # type: ignore[union-attr]


def test_layers_and_norm_against_timm() -> None:
    encoder = load_encoder(TINY, layers="3,-1")
    assert (encoder.embed_dim, encoder.layer) == (384, "blocks 3,11")
    images = torch.rand(1, 3, 224, 224)
    model: Any = encoder.model
    inputs = (images - 0.5) / 0.5
    for norm in (True, False):
        with torch.inference_mode():
            parts = model.forward_intermediates(inputs, indices=[3, 11], norm=norm, intermediates_only=True)
        features = encoder.encode(images, final_norm=norm)
        torch.testing.assert_close(features.map, torch.cat(parts, 1), rtol=1e-4, atol=1e-5)
        assert features.final_norm is norm
    before = load_encoder(f"{TINY}&final_norm=false")
    torch.testing.assert_close(before.encode(images).map, encoder.encode(images, final_norm=False).map[:, 192:])


def test_stages_have_their_own_stride() -> None:
    encoder = load_encoder("timm:convnext_atto?pretrained=false", layers=1)
    assert (encoder.embed_dim, encoder.stride, encoder.layer) == (80, 8, "stage 1")
    assert encoder.encode(torch.rand(1, 3, 64, 64)).map.shape == (1, 80, 8, 8)
    with pytest.raises(UsageError, match="give one layer only"):
        load_encoder("timm:convnext_atto?pretrained=false", layers=[1, 2])


@pytest.mark.parametrize("layers", [12, [-13], [3, 3], "a", []])
def test_layers_out_of_range(layers: object) -> None:
    with pytest.raises(UsageError, match=r"from 0 to 11|whole numbers"):
        load_encoder(TINY, layers=layers)  # type: ignore[arg-type]


def test_attention_is_that_of_the_last_block() -> None:
    encoder = load_encoder(TINY)
    images = torch.rand(2, 3, 64, 96)
    actual = encoder.encode(images, attention=True, keys=True)
    caught: list[Tensor] = []
    block: Any = encoder.model.blocks[-1]  # type: ignore[union-attr, index]
    hook = block.attn.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    encoder.encode(images)
    hook.remove()
    with torch.inference_mode():
        query, key, _ = block.attn.qkv(caught[0]).reshape(2, 25, 3, 3, 64).permute(2, 0, 3, 1, 4)
        full = (query @ key.transpose(-2, -1) / 8).softmax(-1)
    torch.testing.assert_close(actual.attention, full[:, :, 0, 1:].reshape(2, 3, 4, 6), rtol=1e-4, atol=1e-6)
    assert actual.keys is not None
    for (y, x), head in itertools.product(np.ndindex(4, 6), range(3)):  # heads side by side, patches row by row
        torch.testing.assert_close(actual.keys[:, head * 64 : head * 64 + 64, y, x], key[:, head, 1 + 6 * y + x])
    assert encoder.encode(images, attention=True).keys is None
    resnet = load_encoder("timm:resnet18?pretrained=false")
    with pytest.raises(UsageError, match="attention"):
        resnet.encode(images, attention=True)
    with pytest.raises(UsageError, match="keys of its last block"):
        resnet.encode(images, keys=True)


def test_keys_without_a_class_token() -> None:
    encoder = load_encoder("tiny_base")
    features = encoder.encode(torch.rand(1, 3, 40, 24), keys=True)
    assert features.keys is not None
    assert features.keys.shape == features.map.shape == (1, 128, 5, 3)
    assert not encoder.attentions


def test_seeds_and_the_global_generator() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = load_encoder(TINY)
    assert torch.equal(torch.rand(1), expected)
    assert load_encoder(f"{TINY}&seed=0").weights_id == first.weights_id
    assert load_encoder(f"{TINY}&seed=1").weights_id != first.weights_id
    assert not any(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(precision: str) -> None:
    images = torch.rand(1, 3, 64, 64)
    actual = load_encoder(TINY, precision=precision).encode(images).map
    torch.testing.assert_close(actual, load_encoder(TINY).encode(images).map, rtol=0.1, atol=0.1)
    assert actual.dtype == torch.float32


def test_pretrained_weights_in_the_cache_folder(tmp_path: Path, images: Tensor) -> None:
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    with pytest.raises(MissingError) as caught:
        load_encoder(f"timm:{name}")
    folder = tmp_path / "cache" / "weights" / name
    assert str(folder / "model.safetensors") in str(caught.value)
    assert "https://huggingface.co/timm/" in str(caught.value)
    folder.mkdir(parents=True)
    model: Any = timm.create_model(name.partition(".")[0])
    save_file(model.state_dict(), folder / "model.safetensors")
    encoder = load_encoder(f"timm:{name}")
    model.reset_classifier(0)
    expected = reference_map(name, model.state_dict(), images := images[..., :160])
    torch.testing.assert_close(encoder.encode(images).map, expected)
    save_file({k: v for k, v in model.state_dict().items() if k != "cls_token"}, folder / "model.safetensors")
    with pytest.raises(BadInputError, match="cls_token"):
        load_encoder(f"timm:{name}")


def test_zoo_weights_that_are_not_here(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        load_encoder("neco_dinov2_teacher")
    message = str(caught.value)
    assert "FunAILab/NeCo" in message
    assert str(tmp_path / "cache" / "weights" / "neco_dinov2_teacher" / "neco_on_dinov2_vit14_teacher.ckpt") in message
    assert "--weights" in message


def test_wrong_names() -> None:
    with pytest.raises(UsageError, match="vit_tiny_patch16_224"):
        load_encoder("timm:vit_tiny_patch16_225")
    with pytest.raises(UsageError, match="augreg_in21k"):
        load_encoder("timm:vit_tiny_patch16_224.nothing")
    with pytest.raises(UsageError, match="plain ViTs"):
        load_encoder("timm:resnet18?pretrained=false&pos_interp=scale_offset")
    with pytest.raises(UsageError, match="no final norm"):
        load_encoder("timm:resnet18?pretrained=false&final_norm=false")


def test_a_model_of_one_size() -> None:
    encoder = load_encoder("timm:mixer_s32_224?pretrained=false")
    assert encoder.encode(torch.rand(1, 3, 224, 224)).map.shape == (1, 512, 7, 7)
    with pytest.raises(UsageError, match="224x224"):
        encoder.encode(torch.rand(1, 3, 256, 256))
