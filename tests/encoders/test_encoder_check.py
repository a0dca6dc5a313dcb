"""The conformance check passes sound encoders and names each planted defect."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neco_bench.encoders import DenseFeatures, Encoder, check_encoder, load_encoder


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        "baseline_rgb",
        "baseline_hog",
        "timm:vit_tiny_patch16_224?pretrained=false",
        "timm:vit_tiny_patch16_224?pretrained=false&seed=3&final_norm=false",
        "timm:vit_small_patch14_reg4_dinov2?pretrained=false",
        "timm:vit_small_patch16_dinov3?pretrained=false",
        "timm:convnext_atto?pretrained=false",
        "timm:resnet18?pretrained=false",
    ],
)
def test_sound_encoders_pass(spec: str) -> None:
    assert [line for line in check_encoder(load_encoder(spec)) if not line.passed] == []


class _Planted(Encoder):
    """A sound ViT whose features `spoil` changes."""

    def __init__(self, base: str = "timm:vit_tiny_patch16_224?pretrained=false") -> None:
        super().__init__()
        self.inner = load_encoder(base)
        self.name, self.embed_dim, self.stride = "planted", self.inner.embed_dim, self.inner.stride

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        features = self.inner._encode(images, final_norm=True, attention=False)
        return DenseFeatures(self.spoil(features), self.stride)

    def spoil(self, features: DenseFeatures) -> Tensor:
        return features.map


class _LeftIn(_Planted):
    def spoil(self, features: DenseFeatures) -> Tensor:
        tokens = torch.cat([features.prefix.transpose(1, 2), features.map.flatten(2)], 2)  # type: ignore[union-attr]
        height, width = features.map.shape[-2:]
        return tokens[..., : height * width].unflatten(2, (height, width))


class _Transposed(_Planted):
    def spoil(self, features: DenseFeatures) -> Tensor:
        return features.map.transpose(2, 3).reshape(features.map.shape)


class _Mirrored(_Planted):
    def spoil(self, features: DenseFeatures) -> Tensor:
        return features.map.flip(3)


class _Dropout(_Planted):
    def spoil(self, features: DenseFeatures) -> Tensor:
        return F.dropout(features.map, 0.1, training=True)


class _BatchMean(_Planted):
    def spoil(self, features: DenseFeatures) -> Tensor:
        return features.map - 0.1 * features.map.mean(0)


class _Blurred(_Planted):
    def spoil(self, features: DenseFeatures) -> Tensor:
        return features.map.mean((2, 3), keepdim=True).expand_as(features.map) + torch.zeros_like(features.map)


class _WrongStride(_Planted):
    def __init__(self) -> None:
        super().__init__()
        self.stride = 8


class _NaN(_Planted):
    def spoil(self, features: DenseFeatures) -> Tensor:
        return features.map / 0.0


class _Square(_Planted):
    def spoil(self, features: DenseFeatures) -> Tensor:
        side = int(features.map[0, 0].numel() ** 0.5)
        return features.map.flatten(2)[..., : side * side].unflatten(2, (side, side))


class _Constant(_Planted):
    def spoil(self, features: DenseFeatures) -> Tensor:
        return torch.zeros_like(features.map)


class _StayingInTrainMode(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> _StayingInTrainMode:
        return super().train(True)


class _BatchNorm(_Planted):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = _StayingInTrainMode(self.embed_dim)

    def spoil(self, features: DenseFeatures) -> Tensor:
        return self.batch_norm(features.map)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "names", "message"),
    [
        (_LeftIn, {"prefix tokens"}, "1 class or register tokens are not removed"),
        (_Transposed, {"grid orientation"}, "transposed"),
        (_Mirrored, {"grid orientation"}, "mirrored left to right"),
        (_Dropout, {"deterministic"}, "dropout"),
        (_BatchMean, {"batch independence"}, "other images"),
        (_Blurred, {"locality"}, "of 10 changed cells"),
        (_WrongStride, {"shape and stride"}, "expected"),
        (_NaN, {"finite values"}, "NaN"),
        (_Square, {"non-square input"}, "expected"),
        (_BatchNorm, {"batch independence", "eval mode"}, "train mode"),
        (_Constant, {"locality"}, "features do not depend on the image"),
    ],
)
def test_planted_defects_are_named(planted: type[Encoder], names: set[str], message: str) -> None:
    failed = {line.name: line.detail for line in check_encoder(planted().eval()) if not line.passed}
    assert names <= failed.keys()
    assert any(message in failed[name] for name in names), failed


@pytest.mark.slow
def test_registers_left_in() -> None:
    lines = check_encoder(_LeftIn("timm:vit_small_patch14_reg4_dinov2?pretrained=false"))
    line = next(line for line in lines if line.name == "prefix tokens")
    assert not line.passed
    assert "5 class or register" in line.detail


def test_the_check_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    check_encoder(load_encoder("baseline_rgb"))
    assert torch.equal(torch.rand(1), expected)
