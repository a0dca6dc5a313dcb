"""Exported weights: they load where they came from, and are what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from neco_bench.encoders import load_encoder
from neco_bench.encoders.export import export
from neco_bench.errors import UsageError

from ..command import neco
from .test_encoder_weights import official_registers

States = Callable[[str], dict[str, Tensor]]
PLAIN, REGISTERS, DINO = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_224"


def test_dinov2_and_dino_files_come_out_as_they_went_in(states: States, tmp_path: Path) -> None:
    for number, name in enumerate((PLAIN, DINO)):
        official = dict(states(name))
        if name == PLAIN:
            official["mask_token"] = torch.zeros(1, 384)
        torch.save(official, tmp_path / f"in{number}.pth")
        encoder = load_encoder(f"timm:{name}", weights=tmp_path / f"in{number}.pth", device="cpu")
        written = load_file(export(encoder, "dinov2", tmp_path / f"out{number}.safetensors"))
        assert written.keys() == official.keys()
        assert all(torch.equal(written[key], official[key]) for key in official)


def test_registers_keep_their_features(states: States, images: Tensor, tmp_path: Path) -> None:
    official = official_registers(states(REGISTERS))
    torch.save(official, tmp_path / "in.pth")
    first = load_encoder(f"timm:{REGISTERS}", weights=tmp_path / "in.pth", device="cpu")
    written = torch.load(export(first, "dinov2", tmp_path / "out.pth"), weights_only=True)
    assert written.keys() == official.keys() | {"mask_token"}
    assert {k: v.shape for k, v in written.items() if k in official} == {k: v.shape for k, v in official.items()}
    assert torch.equal(written["cls_token"], official["cls_token"] + official["pos_embed"][:, :1])
    assert not written["pos_embed"][:, 0].any()
    again = load_encoder(f"timm:{REGISTERS}", weights=tmp_path / "out.pth", device="cpu")
    assert torch.equal(first.encode(images).map, again.encode(images).map)


def test_swiglu_has_dinov2s_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(f"timm:{REGISTERS}?pretrained=false", device="cpu")
    small: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0, "reg_tokens": 4}
    gated = timm.create_model("vit_giant_patch14_reg4_dinov2", **{**small, "mlp_ratio": 2.0})
    encoder.model = gated
    written = load_file(export(encoder, "dinov2", tmp_path / "out.safetensors"))
    assert torch.equal(written["blocks.1.mlp.w12.weight"], gated.blocks[1].mlp.fc1.weight)
    assert torch.equal(written["blocks.1.mlp.w3.weight"], gated.blocks[1].mlp.fc2.weight)
    assert not any(".fc" in name for name in written)


def test_timm_layout_loads_strictly_into_timm(tmp_path: Path) -> None:
    for name in ("resnet18", "vit_tiny_patch16_224"):
        encoder = load_encoder(f"timm:{name}?pretrained=false&seed=3", device="cpu")
        written = load_file(export(encoder, "timm", tmp_path / f"{name}.safetensors"))
        timm.create_model(name, num_classes=0).load_state_dict(written, strict=True)


def test_command_and_what_is_refused(tmp_path: Path) -> None:
    model, out = "timm:vit_tiny_patch16_224?pretrained=false", tmp_path / "x.pth"
    assert neco("export", model, "--layout", "dinov2", "--out", out).code == 0
    before = out.read_bytes()
    again = neco("export", model, "--out", out)
    assert again.code == 2
    assert "--overwrite" in again.err
    assert out.read_bytes() == before
    assert neco("export", model, "--out", out, "--overwrite").code == 0
    assert ".safetensors or .pth" in neco("export", model, "--out", tmp_path / "x.bin").err
    assert "Did you mean 'dinov2'" in neco("export", model, "--out", tmp_path / "y.pth", "--layout", "dinov").err
    assert "plain ViTs" in neco(
        "export", "timm:resnet18?pretrained=false", "--out", tmp_path / "y.pth", "--layout", "dinov2"
    ).err  # fmt: skip
    with pytest.raises(UsageError, match="no timm layout"):
        export(load_encoder("baseline_rgb"), "timm", tmp_path / "y.pth")
