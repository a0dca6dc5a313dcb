"""Folders of training runs as model specs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from neco_bench.encoders import describe, load_encoder, request_id
from neco_bench.encoders.run_folder import architecture
from neco_bench.encoders.weights import inner_module
from neco_bench.errors import BadInputError, MissingError, NecoBenchError, UsageError

CODE = """
import torch
def make():
    module = torch.nn.Conv2d(3, 8, 16, stride=16)
    module.embed_dim, module.stride = 8, 16
    return module
"""


def run_folder(folder: Path, base: str, teacher: bool = False, **changes: Any) -> Any:
    """A run folder with the encoder that `base` names, its weights changed; returns that encoder."""
    encoder = load_encoder(base, device="cpu")
    (folder / "checkpoint-0000005").mkdir(parents=True)
    for role in ("student", "teacher")[: 1 + teacher]:
        for value in inner_module(encoder).state_dict().values():
            if value.is_floating_point():
                value += 0.01
        save_file(dict(inner_module(encoder).state_dict()), folder / f"checkpoint-0000005/{role}.safetensors")
    facts = {
        "format": 1, "base": architecture(base), "student": "checkpoint-0000005/student.safetensors",
        "teacher": "checkpoint-0000005/teacher.safetensors" if teacher else None, "mean": [0.5] * 3, "std": [0.25] * 3,
        "layers": None, "embed_dim": encoder.embed_dim, "stride": encoder.stride, "step": 5, "training_data": "none",
    }  # fmt: skip
    (folder / "encoder.json").write_text(json.dumps({**facts, **changes}))
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3
    return encoder


@pytest.mark.parametrize(
    "base",
    [
        "timm:vit_tiny_patch16_224?pretrained=false",
        "timm:vit_small_patch14_reg4_dinov2?pretrained=false&pos_interp=scale_offset",
        "timm:resnet18?pretrained=false",
        "timm:test_convnext?pretrained=false",
        "FILE:make",
    ],
)
def test_the_trained_encoder_comes_back(base: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    made = run_folder(tmp_path / "run", base.replace("FILE", str(tmp_path / "mine.py")))
    loaded = load_encoder(f"{tmp_path}/run/", device="cpu")
    size = loaded.stride * 4
    images = torch.rand(2, 3, size, size)
    assert torch.equal(loaded.encode(images).map, made.encode(images).map)
    assert loaded.name == f"{tmp_path}/run"
    assert (loaded.mean, loaded.std, loaded.pos_interp) == (made.mean, made.std, made.pos_interp)
    assert describe(str(tmp_path / "run"))["kind"] == "run"


def test_branches_layers_and_other_weights(tmp_path: Path) -> None:
    base = "timm:vit_tiny_patch16_224?pretrained=false"
    run_folder(tmp_path / "both", base, teacher=True)
    run_folder(tmp_path / "one", base)
    both = str(tmp_path / "both")
    ids = {load_encoder(spec, device="cpu").weights_id for spec in (both, f"{both}?branch=teacher")}
    assert len(ids) == 2
    assert load_encoder(f"{both}?layers=2,5", device="cpu").embed_dim == 2 * 192
    with pytest.raises(UsageError, match="no teacher's weights"):
        load_encoder(f"{tmp_path}/one?branch=teacher")
    teacher = tmp_path / "both/checkpoint-0000005/teacher.safetensors"
    assert load_encoder(str(tmp_path / "one"), weights=teacher, device="cpu").weights_id in ids
    assert request_id(both) != request_id(f"{both}?branch=teacher") != request_id(str(tmp_path / "one"))


def test_the_id_follows_the_weights(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", "timm:resnet18?pretrained=false")
    before = request_id(str(tmp_path / "run"))
    assert request_id(str(tmp_path / "run")) == before
    file = tmp_path / "run/checkpoint-0000005/student.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert request_id(str(tmp_path / "run")) != before


def test_architectures() -> None:
    assert architecture("dinov2_vits14_reg") == "timm:vit_small_patch14_reg4_dinov2?pos_interp=size_antialias"
    assert architecture("dinov2_vits14_reg?pos_interp=scale_offset").endswith("reg4_dinov2?pos_interp=scale_offset")
    assert architecture("dinov2_vits14_reg_xr") == "timm:vit_small_patch14_dinov2?pos_interp=scale_offset"
    assert architecture("timm:resnet18?pretrained=false&seed=3") == "timm:resnet18"
    assert architecture("baseline_hog") == "baseline_hog"


@pytest.mark.parametrize(
    ("content", "error", "told"),
    [
        ("{", BadInputError, "not a whole JSON"),
        ("{}", BadInputError, "does not describe a trained encoder"),
        ('{"format": 2}', BadInputError, "Upgrade neco-bench"),
        (None, MissingError, "holds no trained encoder"),
    ],
)
def test_broken_folders(content: str | None, error: type[NecoBenchError], told: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "encoder.json").write_text(content)
    with pytest.raises(error, match=told) as raised:
        load_encoder(str(tmp_path))
    assert str(tmp_path) in str(raised.value)


def test_missing_and_broken_weights(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", "timm:resnet18?pretrained=false")
    file = tmp_path / "run/checkpoint-0000005/student.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BadInputError, match=r"student\.safetensors"):
        load_encoder(str(tmp_path / "run"))
    file.unlink()
    with pytest.raises(MissingError, match="Copy the run folder whole"):
        load_encoder(str(tmp_path / "run"))
