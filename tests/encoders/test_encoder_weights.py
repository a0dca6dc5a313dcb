"""Official key layouts load to the same features, and whatever does not fit is an error that says what."""

from __future__ import annotations

import argparse
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neco_bench.core.errors import BadInputError, MissingError
from neco_bench.encoders import load_encoder
from neco_bench.encoders.weight_files import read_tensors
from neco_bench.encoders.weights import select

from .conftest import IMAGENET, reference_map

States = Callable[[str], dict[str, Tensor]]
PLAIN, REG, DINO = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_224"


def official_registers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's register layout as DINOv2's own: positions with a class position, and a mask token."""
    place = torch.randn(1, 1, 384, generator=torch.Generator().manual_seed(3))
    result = dict(state)
    result["register_tokens"] = result.pop("reg_token")
    result["cls_token"] = state["cls_token"] - place
    result["pos_embed"] = torch.cat([place, state["pos_embed"]], 1)
    return result | {"mask_token": torch.zeros(1, 384)}


def heads(prefix: str = "projection_head.") -> dict[str, Tensor]:
    return {f"{prefix}{i}.{kind}": torch.ones(4) for i in (0, 2, 4) for kind in ("weight", "bias")}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


@pytest.mark.slow
def test_dinov2_layout(states: States, images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "dinov2.pth"
    torch.save(states(PLAIN) | {"mask_token": torch.zeros(1, 384)}, path)
    encoder = load_encoder("dinov2_vits14?pos_interp=timm", weights=path)
    torch.testing.assert_close(encoder.encode(images).map, reference_map(PLAIN, states(PLAIN), images))
    assert encoder.weights_report is not None
    assert encoder.weights_report.dropped == ("mask_token",)


@pytest.mark.slow
def test_register_layout_and_one_id_for_two_files(states: States, images: Tensor, tmp_path: Path) -> None:
    save_file(states(REG), tmp_path / "timm.safetensors")
    torch.save(official_registers(states(REG)), tmp_path / "official.pth")
    ours = load_encoder("dinov2_vits14_reg", weights=tmp_path / "official.pth")
    native = load_encoder(f"timm:{REG}", weights=tmp_path / "timm.safetensors")
    expected = reference_map(REG, states(REG), images)
    torch.testing.assert_close(ours.encode(images).map, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(native.encode(images).map, expected)
    assert ours.weights_report is not None
    assert ours.weights_report.renamed["register_tokens"] == "reg_token"
    again = load_encoder("neco_dinov2r", weights=tmp_path / "timm.safetensors")
    assert again.weights_id == native.weights_id
    assert native.encode(images).prefix.shape == (2, 5, 384)  # type: ignore[union-attr]


@pytest.mark.slow
def test_neco_file_and_xr(states: States, images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(states(PLAIN) | heads() | {"register_tokens": torch.zeros(1, 4, 384)}, tmp_path / "xr.ckpt")
    with caplog.at_level(logging.WARNING, "neco_bench"):
        encoder = load_encoder("neco_dinov2r_xr?pos_interp=timm", weights=tmp_path / "xr.ckpt")
    torch.testing.assert_close(encoder.encode(images).map, reference_map(PLAIN, states(PLAIN), images))
    assert "register_tokens" in encoder.weights_report.dropped  # type: ignore[union-attr]
    assert "projection_head.0.bias" in caplog.text
    with pytest.raises(BadInputError, match="register tokens"):
        load_encoder("neco_dinov2", weights=tmp_path / "xr.ckpt")


@pytest.mark.slow
def test_lightning_branches(states: States, images: Tensor, tmp_path: Path) -> None:
    student, teacher = states(DINO), {k: v * 0.9 for k, v in states(DINO).items()}
    content = prefixed("model.", student | heads()) | prefixed("teacher.", teacher | heads())
    torch.save({"state_dict": content, "epoch": 3, "optimizer_states": [{"state": {}}]}, tmp_path / "l.ckpt")
    for spec, state in (("", student), ("?branch=teacher", teacher), ("?branch=student", student)):
        encoder = load_encoder(f"timm:{DINO}{spec}", weights=tmp_path / "l.ckpt")
        expected = reference_map(DINO, state, images := images[..., :160])
        torch.testing.assert_close(encoder.encode(images).map, expected, rtol=1e-4, atol=1e-4)
    assert any("teacher" in text for text in encoder.weights_report.dropped)  # type: ignore[union-attr]


@pytest.mark.slow
def test_dino_full_checkpoint_takes_the_teacher(states: States, images: Tensor, tmp_path: Path) -> None:
    teacher = states(DINO)
    student = {k: v * 0.5 for k, v in teacher.items()}
    content = {
        "student": prefixed("module.backbone.", student) | prefixed("module.head.", {"mlp.0.weight": torch.ones(2)}),
        "teacher": prefixed("backbone.", teacher) | prefixed("head.", {"mlp.0.weight": torch.ones(2)}),
        "args": argparse.Namespace(arch="vit_small"),
    }
    torch.save(content, tmp_path / "dino.pth")
    images = images[..., :160]
    encoder = load_encoder("dino_vits16?pos_interp=timm", weights=tmp_path / "dino.pth")
    torch.testing.assert_close(encoder.encode(images).map, reference_map(DINO, teacher, images, IMAGENET))


@pytest.mark.slow
def test_files_as_neco_writes_them(states: States, images: Tensor, tmp_path: Path) -> None:
    """A Lightning checkpoint of its training, whose student and teacher are also released each in a file of its own."""
    student = official_registers(states(REG))
    teacher = {k: v * 0.9 for k, v in student.items()}
    content = prefixed("model.", student) | prefixed("teacher.", teacher) | heads("projection_head.")
    content |= heads("teacher_projection_head.")
    torch.save({"state_dict": content, "epoch": 24, "global_step": 9, "loops": {}, "lr_schedulers": []}, tmp_path / "l")
    for branch, state, name in (("student", student, "neco_dinov2r"), ("teacher", teacher, "neco_dinov2r_teacher")):
        torch.save(state | heads(), tmp_path / "released.ckpt")
        released = load_encoder(name, weights=tmp_path / "released.ckpt")
        encoder = load_encoder(f"neco_dinov2r?branch={branch}", weights=tmp_path / "l")
        assert encoder.weights_id == released.weights_id
        token = state["cls_token"] + state["pos_embed"][:, :1]
        assert torch.equal(released.model.cls_token, token)  # type: ignore[union-attr, arg-type]
    assert load_encoder("neco_dinov2r", weights=tmp_path / "l").weights_id != encoder.weights_id  # the student's


@pytest.mark.slow
def test_one_leading_component(states: States, images: Tensor, tmp_path: Path) -> None:
    save_file(prefixed("backbone.", states(DINO)), tmp_path / "leopart.safetensors")
    encoder = load_encoder("neco_leopart?pos_interp=timm", weights=tmp_path / "leopart.safetensors")
    images = images[..., :160]
    torch.testing.assert_close(encoder.encode(images).map, reference_map(DINO, states(DINO), images, IMAGENET))


@pytest.mark.slow
def test_dinov2_training_checkpoint_with_chunks(states: States, tmp_path: Path) -> None:
    chunked = {k.replace("blocks.", "blocks.0.", 1): v for k, v in states(PLAIN).items()}
    content = prefixed("teacher.backbone.", chunked) | {"teacher.dino_head.last_layer.weight": torch.ones(2)}
    save_file(content, tmp_path / "t.safetensors")
    save_file(states(PLAIN), tmp_path / "plain.safetensors")
    ids = [load_encoder("dinov2_vits14", weights=tmp_path / f"{n}.safetensors").weights_id for n in ("t", "plain")]
    assert ids[0] == ids[1]


def test_the_grid_is_that_of_the_file(states: States, images: Tensor, tmp_path: Path) -> None:
    small = dict(states(PLAIN))
    small["pos_embed"] = small["pos_embed"][:, : 1 + 16 * 16].contiguous()
    save_file(small, tmp_path / "224.safetensors")
    encoder = load_encoder(f"timm:{PLAIN}", weights=tmp_path / "224.safetensors")
    assert encoder.model.patch_embed.grid_size == (16, 16)  # type: ignore[union-attr]
    assert encoder.weights_report.resized == ()  # type: ignore[union-attr]
    encoder.encode(images)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.3.attn.qkv.weight"), "1 missing: blocks.3.attn.qkv.weight"),
        (lambda s: s.update({"blocks.12.norm1.weight": torch.ones(3)}), "1 left over: blocks.12.norm1.weight"),
        (lambda s: s.update({"norm.weight": torch.ones(3)}), r"1 of another shape: norm.weight \(3,\) for \(384,\)"),
        (lambda s: s.update({"norm.weight": s["norm.weight"].char()}), r"1 quantised.*: norm.weight \(torch.int8\)"),
        (lambda s: s.update({"norm.bias": s["norm.bias"] + 1j}), r"1 quantised.*: norm.bias \(torch.complex64\)"),
    ],
)
def test_what_does_not_fit_is_named(
    states: States, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    state = dict(states(DINO))
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(BadInputError, match=message) as caught:
        load_encoder(f"timm:{DINO}", weights=tmp_path / "w.pth")
    assert "w.pth" in str(caught.value)


def test_a_sparse_tensor_is_named(states: States, tmp_path: Path) -> None:
    state = dict(states(DINO))
    state["norm.weight"] = state["norm.weight"].to_sparse()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(BadInputError, match=r"not dense: norm\.weight"):
        load_encoder(f"timm:{DINO}", weights=tmp_path / "w.pth")


def test_another_architecture(states: States, tmp_path: Path) -> None:
    save_file({"conv.weight": torch.ones(2), "conv.bias": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(BadInputError, match=r"does not fit.*conv\.bias"):
        load_encoder(f"timm:{DINO}", weights=tmp_path / "w.safetensors")


def test_branch_that_is_not_there(states: States, tmp_path: Path) -> None:
    save_file(states(DINO), tmp_path / "w.safetensors")
    with pytest.raises(BadInputError, match="teacher branch"):
        load_encoder(f"timm:{DINO}?branch=teacher", weights=tmp_path / "w.safetensors")


def test_two_prefixes_without_a_branch() -> None:
    tensors = {f"{p}.{k}": torch.ones(1) for p in ("a", "b") for k in ("x", "y")}
    with pytest.raises(BadInputError, match="one of: a, b"):
        select(tensors, ["x", "y"], Path("f"))


class _Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("attacked"),))  # type: ignore[return-value]


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"cls_token": _Attack()}, tmp_path / "bad.pth")
    with pytest.raises(BadInputError, match=r"would run code.*safetensors"):
        read_tensors(tmp_path / "bad.pth")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(_Attack()))
    with pytest.raises(BadInputError):
        read_tensors(tmp_path / "raw.pt")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_truncated_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    tensors = {"a": torch.ones(1000)}
    if name.endswith("pth"):
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(BadInputError, match="truncated"):
        read_tensors(path)
    path.write_bytes(b"")
    with pytest.raises(BadInputError):
        read_tensors(path)
    path.unlink()
    with pytest.raises(MissingError):
        read_tensors(path)


def test_a_file_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(BadInputError, match="no named tensors"):
        read_tensors(tmp_path / "w.pth")
