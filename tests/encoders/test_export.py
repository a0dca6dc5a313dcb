"""Exported files: the official names with the very same tensors, and what has no such layout is message so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from neco_bench.core.errors import NecoBenchError, UsageError
from neco_bench.encoders import load_encoder
from neco_bench.encoders.adapters import timm_models
from neco_bench.encoders.export import export
from neco_bench.encoders.weight_files import read_tensors
from neco_bench.encoders.weights import inner_module
from tests.command import neco

from .test_encoder_weights import DINO, PLAIN, REG, official_registers
from .test_run_folder import leave_run

States = Callable[[str], dict[str, Tensor]]
TINY, SMALL = "timm:vit_tiny_patch16_224?pretrained=false", "timm:test_vit?pretrained=false"


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(("spec", "name"), [("dinov2_vits14", PLAIN), ("dino_vits16", DINO)])
def test_official_names_come_back_equal(states: States, tmp_path: Path, spec: str, name: str, suffix: str) -> None:
    """DINOv2's with its mask token, which is zero; DINO's has none."""
    official = dict(states(name)) | ({"mask_token": torch.zeros(1, 384)} if name == PLAIN else {})
    torch.save(official, tmp_path / "official.pth")
    encoder = load_encoder(spec, weights=tmp_path / "official.pth")
    path = export(encoder, "dinov2", tmp_path / "new" / f"out{suffix}")
    assert same(read_tensors(path), official)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.slow
def test_registers(states: States, images: Tensor, tmp_path: Path) -> None:
    official = official_registers(states(REG))
    torch.save(official, tmp_path / "official.pth")
    encoder = load_encoder("dinov2_vits14_reg", weights=tmp_path / "official.pth")
    written = load_file(export(encoder, "dinov2", tmp_path / "out.safetensors"))
    assert {name: value.shape for name, value in written.items()} == {n: v.shape for n, v in official.items()}
    # The position of the class token has become part of it.
    place = official["pos_embed"][:, :1]
    assert torch.equal(written["cls_token"], official["cls_token"] + place)
    assert not written["pos_embed"][:, :1].any()
    moved = {"cls_token": official["cls_token"] + place, "pos_embed": written["pos_embed"]}
    assert torch.equal(written["pos_embed"][:, 1:], official["pos_embed"][:, 1:])
    assert same(written, official | moved)
    again = load_encoder("dinov2_vits14_reg", weights=tmp_path / "out.safetensors")
    assert torch.equal(again.encode(images).map, encoder.encode(images).map)
    assert again.weights_id == encoder.weights_id


def test_the_gated_mlp_of_the_largest_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, small = timm_models.create, {"depth": 2, "embed_dim": 48, "num_heads": 2}
    monkeypatch.setattr(timm_models, "create", lambda name, seed, **options: create(name, seed, **options, **small))
    encoder = load_encoder("dinov2_vitg14_reg?pretrained=false")
    written = load_file(export(encoder, "dinov2", tmp_path / "out.safetensors"))
    assert {name for name in written if ".0.mlp." in name} == {
        f"blocks.0.mlp.{layer}.{kind}" for layer in ("w12", "w3") for kind in ("weight", "bias")
    }
    again = load_encoder("dinov2_vitg14_reg", weights=tmp_path / "out.safetensors")
    assert again.weights_id == encoder.weights_id
    tokens = torch.randn(1, 5, 48)
    mlp = [written[f"blocks.1.mlp.{name}"] for name in ("w12.weight", "w12.bias", "w3.weight", "w3.bias")]
    gate, value = F.linear(tokens, *mlp[:2]).chunk(2, dim=-1)  # DINOv2's SwiGLUFFN
    expected = F.linear(F.silu(gate) * value, *mlp[2:])
    torch.testing.assert_close(again.model.blocks[1].mlp(tokens), expected)  # type: ignore[union-attr, index]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("timm:vit_small_patch14_reg4_dinov2", {"img_size": 224}),
        ("timm:test_vit3?pretrained=false", {}),
        ("timm:resnet18?pretrained=false", {}),
        ("timm:vit_small_patch16_dinov3?pretrained=false", {}),
    ],
)
def test_timm_layout(states: States, tmp_path: Path, spec: str, options: dict[str, Any]) -> None:
    file = None
    if options:
        small = dict(states(REG)) | {"pos_embed": states(REG)["pos_embed"][:, : 16 * 16].contiguous()}
        save_file(small, file := tmp_path / "small.safetensors")
    encoder = load_encoder(spec, weights=file)
    path = export(encoder, "timm", tmp_path / "out.safetensors")
    name = spec.removeprefix("timm:").partition("?")[0]
    model = timm.create_model(name, num_classes=0, **options)
    model.load_state_dict(load_file(path))
    assert same(model.state_dict(), inner_module(encoder).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "layout", "message"),
    [
        ("timm:resnet18?pretrained=false", "dinov2", "only plain ViTs"),
        ("timm:test_vit3?pretrained=false", "dinov2", "no class token"),
        ("timm:vit_xsmall_patch16_clip_224?pretrained=false", "dinov2", "a norm before its blocks"),
        ("timm:vit_tiny_r_s16_p8_224?pretrained=false", "dinov2", "only plain ViTs"),
        ("baseline_hog", "timm", "not built by timm"),
        (TINY, "dinov", "Did you mean 'dinov2'"),
    ],
)
def test_no_such_layout(tmp_path: Path, spec: str, layout: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export(load_encoder(spec), layout, tmp_path / "out.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_only_whole_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, path = load_encoder(TINY), tmp_path / "out.pth"
    path.write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        export(encoder, "dinov2", path)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(NecoBenchError, match="No space left"):
            export(encoder, "dinov2", path, overwrite=True)
    assert path.read_text() == "mine"
    assert {file.name for file in tmp_path.iterdir()} == {"cache", "out.pth"}
    export(encoder, "dinov2", path, overwrite=True)
    assert "cls_token" in torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("spec", "layout", "reader"),
    [
        ("dinov2_vits14_reg?pos_interp=scale_offset", "dinov2", "dinov2_vits14_reg"),
        ("dinov2_vits14?pos_interp=size_antialias", "dinov2", "dinov2_vits14"),
        ("dinov2_vits14?pos_interp=timm", "dinov2", "dinov2_vits14"),
        ("dinov2_vits14", "timm", "timm:vit_small_patch14_dinov2"),
        ("dinov2_vits14", "dinov2", None),
        ("dinov2_vits14_reg", "dinov2", None),
        ("dinov2_vits14_reg", "timm", None),
        ("timm:vit_small_patch14_dinov2", "timm", None),
    ],
)
def test_another_rule_for_positions_is_reported(
    spec: str,
    layout: str,
    reader: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`reader` has the rule of the code that the layout belongs to: the same features at 98 pixels and not at 56."""
    create, small = timm_models.create, {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 98}
    monkeypatch.setattr(timm_models, "create", lambda name, seed, **options: create(name, seed, **{**options, **small}))
    encoder = load_encoder(f"{spec}{'&' if '?' in spec else '?'}pretrained=false", device="cpu")
    inner_module(encoder).pos_embed.data.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[operator]
    with caplog.at_level(logging.WARNING, "neco_bench"):
        path = export(encoder, layout, tmp_path / "out.safetensors")
    assert ("resizes position embeddings" in caplog.text) is (reader is not None)
    if reader is None:
        return
    assert "features are equal at 98 x 98 pixels only" in caplog.text
    theirs = load_encoder(reader, weights=path, device="cpu")
    for size, equal in ((98, True), (56, False)):
        image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))
        own, read = (
            model.encode(image, mean=encoder.mean, std=encoder.std).map.double() for model in (encoder, theirs)
        )
        assert torch.allclose(own.double(), read.double(), rtol=1e-4, atol=1e-4) is equal


def test_which_of_a_run_is_exported_is_reported(tmp_path: Path) -> None:
    for name, facts in (("both", {}), ("one", {"teacher": None})):
        leave_run(tmp_path / name, load_encoder(SMALL, device="cpu"), SMALL, **facts)
    for spec, role, message in (
        ("both", "student", "the student's weights; ?branch=teacher exports the teacher's"),
        ("both?branch=teacher", "teacher", "the teacher's weights; ?branch=student exports the student's"),
        ("one", "student", ""),
    ):
        answer = neco("export", f"{tmp_path}/{spec}", "--out", tmp_path / "out.pth", "--overwrite")
        assert (answer.code, answer.out.strip()) == (0, str(tmp_path / "out.pth")), answer.err
        assert message in answer.err
        assert ("branch" in answer.err) is bool(message)
        stored = load_file(tmp_path / spec.partition("?")[0] / f"checkpoint-0000500/{role}.safetensors")
        assert same(torch.load(tmp_path / "out.pth", weights_only=True), stored)


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    command = ("export", TINY, "--layout", "dinov2", "--out", tmp_path / "out.safetensors")
    answer = neco(*command)
    assert (answer.code, answer.out.strip()) == (0, str(tmp_path / "out.safetensors")), answer.err
    assert load_encoder(TINY, weights=tmp_path / "out.safetensors").weights_id == load_encoder(TINY).weights_id
    for arguments, message in (
        (command, "--overwrite"),
        ((*command[:-1], tmp_path / "out.ckpt"), ".safetensors or .pth"),
        ((*command[:-1], tmp_path), ".safetensors or .pth"),
        (("export", TINY, "--layout", "hf", "--out", "x.pth"), "dinov2 or timm"),
    ):
        answer = neco(*arguments)
        assert (answer.code, answer.out) == (2, "")
        assert message in answer.err
    assert neco(*command, "--overwrite", "--weights", tmp_path / "out.safetensors").code == 0
    assert neco("export", TINY, "--out", tmp_path / "timm.pth").code == 0
